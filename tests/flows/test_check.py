from pathlib import Path

import pytest

from flows import check
from flows.check import Plan, notes
from flows.recipe import Recipe, parse
from flows.resources import PROCESS_MIB, disk_mib, peak_memory_mib
from tasks.calibration.checkpoints import SourceEstimate
from tasks.validation.energy import Meter
from tasks.validation.gpu_memory import GpuMemory
from tests.tasks.validation.nvml import Nvml

INT8 = {"method": "rtn", "weights": {"bits": 8}}
BILLION = 10**9


def recipe(candidate: dict, **validation) -> Recipe:
    return parse(
        {
            "name": "some_cpu",
            "source": "./model",
            "candidates": {"one": candidate},
            "engines": [{"engine": "onnxruntime", "precision": "float32"}],
            "validation": {"speed": None, **validation},
        }
    )


def test_training_needs_the_weights_the_optimizer_and_the_teacher():
    training = {"student": {"layers": 2}, "training": {"max_steps": 1}}
    without = peak_memory_mib(recipe({"quantization": INT8}), BILLION)
    with_training = peak_memory_mib(recipe({"distillation": training}), BILLION)
    assert without == pytest.approx(PROCESS_MIB + 2 * 4 * BILLION / 2**20)
    assert with_training == pytest.approx(PROCESS_MIB + (4 + 16) * BILLION / 2**20)


def test_training_a_quantized_model_is_counted():
    scales, everything = ({"quantization": INT8, "quantization_training": {"train": t}} for t in ("scales", "all"))
    assert peak_memory_mib(recipe(scales), BILLION) == peak_memory_mib(recipe({"quantization": INT8}), BILLION)
    assert peak_memory_mib(recipe(everything), BILLION) == pytest.approx(PROCESS_MIB + (4 + 16) * BILLION / 2**20)
    more = disk_mib(recipe(scales), BILLION, 0) - disk_mib(recipe({"quantization": INT8}), BILLION, 0)
    assert more == pytest.approx(BILLION / 2**20)


def test_engines_measured_at_once_stay_within_their_limit():
    small = peak_memory_mib(recipe({"quantization": INT8}, speed={"max_memory_mib": 1000}), 100_000_000)
    large = peak_memory_mib(recipe({"quantization": INT8}, speed={"max_memory_mib": 9000}), 100_000_000)
    assert small == pytest.approx(1000 + PROCESS_MIB)
    assert large > small


def test_engines_under_load_stay_within_their_limit():
    small, large = (
        peak_memory_mib(recipe({"quantization": INT8}, load={"max_memory_mib": mib}), 100_000_000)
        for mib in (1000, 90_000)
    )
    assert small == pytest.approx(1000 + PROCESS_MIB)
    assert large > small


def test_quantized_bundles_take_a_quarter_of_the_disk():
    model_mib = 4 * BILLION / 2**20
    unquantized = disk_mib(recipe({}), BILLION, 0)
    assert unquantized == pytest.approx(3 * model_mib)  # the checkpoint, the unchanged model's engine, the candidate's
    assert disk_mib(recipe({"quantization": INT8}), BILLION, 0) == pytest.approx(2.5 * model_mib)


def test_what_does_not_fit_is_an_obstacle_that_says_what_to_do():
    plan = Plan(
        estimate=SourceEstimate(kind="directory", download_bytes=0, num_parameters=1, checkpoint_bytes=1),
        peak_memory_mib=1e9,
        disk_mib=1e12,
    )
    check._compare_with_machine(plan)
    memory, disk = plan.obstacles
    assert "1,000,000,000 MiB of memory" in memory
    assert "smaller model" in memory
    assert "SLIMLINE_HOME" in disk


def test_an_engine_that_is_only_built_here_is_said(monkeypatch):
    from tasks.engines.tensorrt import TensorRT

    monkeypatch.setattr(TensorRT, "missing", lambda self: None)
    monkeypatch.setattr(TensorRT, "cannot_run", lambda self: "There is no GPU.")
    monkeypatch.setattr(TensorRT, "executable", False)
    told = recipe({"engines": [{"engine": "tensorrt", "precision": "float16"}]})
    assert notes(told) == ["tensorrt-float16: built, but not run here. There is no GPU."]


def test_a_budget_of_time_on_an_engine_that_cannot_run_here_is_an_obstacle(monkeypatch):
    from tasks.engines.tensorrt import TensorRT

    monkeypatch.setattr(TensorRT, "missing", lambda self: None)
    monkeypatch.setattr(TensorRT, "cannot_run", lambda self: "There is no GPU.")
    monkeypatch.setattr(TensorRT, "executable", False)
    weights = {"choices": [{"bits": 4, "group_size": 128}, {"bits": 8}], "tpot_ms": 20}
    engines = [{"engine": "tensorrt", "precision": "float16"}]
    timed = recipe({"quantization": {"method": "rtn", "weights": weights}, "engines": engines}, speed={})
    (reason,) = check._unmeasurable_budgets(timed)
    assert reason == "one: `tpot_ms` is measured on tensorrt-float16. There is no GPU. Set another budget."
    assert reason in check.obstacles(timed)


def test_a_limit_on_energy_is_an_obstacle_where_no_counter_can_be_read(monkeypatch):
    monkeypatch.setattr(check, "Meter", lambda: Meter(Path("/none"), lambda: None))
    limited = recipe({}, speed={}, limits={"energy_j_per_token": {"max": 5}})
    (reason,) = check.unmeasurable_limits(limited)
    assert reason.startswith("limits.energy_j_per_token: energy is not measured: there is no /none")
    assert "no GPU answers through NVML" in reason
    assert reason in check.obstacles(limited)
    monkeypatch.setattr(check, "Meter", lambda: Meter(Path("/none"), Nvml))
    assert check.unmeasurable_limits(limited) == []


def test_a_limit_on_gpu_memory_is_an_obstacle_without_a_gpu_or_an_engine_on_one(monkeypatch):
    limits = {"peak_gpu_memory_mib": {"max": 500}}
    (reason,) = check.unmeasurable_limits(recipe({}, speed={}, limits=limits))
    assert reason.startswith("limits.peak_gpu_memory_mib is of engines on a GPU (tensorrt); this recipe's are onnxrun")
    on_gpu = recipe({"engines": [{"engine": "tensorrt", "precision": "float16"}]}, speed={}, limits=limits)
    monkeypatch.setattr(check, "GpuMemory", lambda: GpuMemory(lambda: None))
    (reason,) = check.unmeasurable_limits(on_gpu)
    assert "memory of GPUs is not measured: no GPU answers through NVML" in reason
    monkeypatch.setattr(check, "GpuMemory", lambda: GpuMemory(Nvml))
    assert check.unmeasurable_limits(on_gpu) == []


def test_a_budget_of_time_measures_the_engine_before_quantization(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(check, "earlier_result", lambda task, arguments: None)
    weights = {"choices": [{"bits": 4, "group_size": 32}, {"bits": 8}], "tpot_ms": 20}
    content = recipe({"quantization": {"method": "rtn", "weights": weights}}, speed={}).model_dump(mode="json")
    titles = [step.title for step in check.plan(parse({**content, "source": str(tiny_checkpoint)})).steps]
    assert titles.index("one measure-tpot") == titles.index("one quantize") - 1


def test_engines_that_are_built_to_keep_a_budget_of_time_are_counted():
    groups, channels = {"bits": 4, "group_size": 32}, {"bits": 8}
    choices = [groups, {**groups, "range": "mse"}, channels, *({"bits": bits} for bits in (3, 5, 6, 7))]
    chosen = {"choices": choices, "embedding_choices": [channels, groups]}
    num_engines = 6 + 1  # a range is no engine of its own; the tables on their second choice are one

    def mixed(*budgets: dict) -> Recipe:
        methods = [{"method": "rtn", "weights": {**chosen, **budget}} for budget in budgets]
        content = recipe({}, speed={"max_memory_mib": 10**6}).model_dump(mode="json")
        candidates = {str(number): {"quantization": method} for number, method in enumerate(methods)}
        return parse({**content, "candidates": candidates})

    model_mib = 4 * BILLION / 2**20
    of_bits, of_time = mixed({"bits_per_weight": 6}), mixed({"tpot_ms": 20})
    for found, sizes in ((of_bits, [1, 1, 1, 1 / 4]), (of_time, [1, 1] + num_engines * [1 / 4])):
        expected = PROCESS_MIB * (1 + len(sizes) / 2) + model_mib * sum(sizes)
        assert peak_memory_mib(found, BILLION) == pytest.approx(expected)
    temporary = model_mib * (num_engines / 4 + 1 / 4)  # and the checkpoint that an engine is compiled from
    assert disk_mib(of_time, BILLION, 0) - disk_mib(of_bits, BILLION, 0) == pytest.approx(temporary)
    one_after_another = disk_mib(mixed({"tpot_ms": 20}, {"tpot_ms": 30}), BILLION, 0)
    without = disk_mib(mixed({"bits_per_weight": 6}, {"bits_per_weight": 7}), BILLION, 0)
    assert one_after_another - without == pytest.approx(temporary)


def test_a_stage_that_candidates_share_is_planned_once(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(check, "earlier_result", lambda task, arguments: None)
    student = {"distillation": {"student": {"layers": 2}, "training": {"max_steps": 1}}}
    both = recipe(student).model_dump(mode="json")
    both["source"] = str(tiny_checkpoint)
    both["candidates"]["two"] = {**student, "quantization": INT8}
    plan = check.plan(parse(both))
    steps = {step.title: step for step in plan.steps}
    assert steps["two distill"].shared_with == "one distill"
    assert steps["two quantize"].shared_with is None
    check.show(plan)
    told = capsys.readouterr().err
    assert "same as one distill" in told
    assert f"{len(plan.steps) - 1} stages, {len(plan.steps) - 1} to run." in told


def test_checkpoints_that_candidates_share_are_counted_once():
    student = {"distillation": {"student": {"layers": 2}, "training": {"max_steps": 1}}}
    one = recipe(student).model_dump(mode="json")
    two = {**one, "candidates": {**one["candidates"], "two": {**student, "quantization": INT8}}}
    model_mib = 4 * BILLION / 2**20
    more = disk_mib(parse(two), BILLION, 0) - disk_mib(parse(one), BILLION, 0)
    assert more == pytest.approx(model_mib / 4 + model_mib / 4)  # the quantized checkpoint and its engine


def test_a_grid_that_undoes_training_is_pointed_out():
    student = {"student": {"layers": 2}, "training": {"max_steps": 1}}
    weights = {"bits": 4, "symmetric": False, "group_size": 32, "zero_point": "real"}
    quantization = {"method": "rtn", "weights": weights}
    (note,) = notes(recipe({"distillation": student, "quantization": quantization}))
    assert "one: `zero_point: real`" in note
    assert notes(recipe({"quantization": quantization})) == []
