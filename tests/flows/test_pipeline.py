"""What the pipeline does about stages that fail; every stage is a stand-in here, the real ones run end to end."""

from types import SimpleNamespace

import pytest

from flows.pipeline import pipeline
from flows.recipe import Recipe, parse
from infra.failures import InfrastructureError
from infra.isolation import StageCrashed, StageFailed

WEIGHTS = {"bits": 8, "symmetric": True}


def recipe(tmp_path, validation: dict | None = None, **candidates: dict) -> Recipe:
    (tmp_path / "config.json").write_text("{}")
    int8 = {"quantization": {"method": "rtn", "weights": WEIGHTS}}
    return parse(
        {
            "name": "tiny",
            "source": str(tmp_path),
            "candidates": {"int8": int8, "plain": {}, **candidates},
            "validation": validation or {},
            "engines": [
                {"engine": "onnxruntime", "precision": "float32"},
                {"engine": "openvino", "precision": "float32"},
            ],
        }
    )


class Stages:
    """Stands for all stages; those whose title is in `failing` fail."""

    def __init__(self, failing: dict[str, Exception]) -> None:
        self.failing = failing
        self.timed: list[str] = []
        self.loaded: list[str] = []

    def __call__(self, task, label="", /, **arguments):
        title = f"{label} {task.name}".strip()
        if title in self.failing:
            raise self.failing[title]
        if task.name == "measure-speed":
            self.timed = list(arguments["bundles"])
            assert set(arguments["baselines"].values()) <= set(self.timed)
        if task.name == "measure-load":
            self.loaded = list(arguments["bundles"])
            assert arguments["options"].users == (1, 4)
        return SimpleNamespace(artifact=None, metrics={})


def made(failing: dict[str, Exception], chosen: Recipe):
    run = Stages(failing)
    return pipeline(chosen, run), run


def test_an_engine_that_crashes_ends_what_it_was_for_and_nothing_else(tmp_path):
    crash = StageCrashed("tasks.validation.quality:measure_quality died with SIGSEGV.")
    products, run = made({"int8/openvino measure-quality": crash}, recipe(tmp_path))
    assert products.failed == {"int8/openvino": str(crash)}
    assert "int8/onnxruntime" in run.timed
    assert "int8/openvino" not in run.timed
    assert len(run.timed) == 5


def test_a_disk_that_is_full_is_no_verdict_but_the_end_of_the_flow(tmp_path):
    full = InfrastructureError("The disk is full.")
    for stage in (
        "int8 quantize",
        "int8/openvino compile",
        "int8/openvino measure-quality",
        "original/openvino compile",
    ):
        with pytest.raises(InfrastructureError, match="The disk is full"):
            made({stage: full}, recipe(tmp_path))


def test_every_engine_that_answers_is_put_under_load_when_the_recipe_asks(tmp_path):
    failing = {"int8/openvino measure-quality": StageCrashed("died")}
    products, run = made(failing, recipe(tmp_path, {"load": {}}))
    assert products.load
    assert run.loaded == run.timed
    products, run = made({}, recipe(tmp_path))
    assert products.load is None
    assert not run.loaded


def test_a_checkpoint_that_cannot_be_made_fails_in_every_engine(tmp_path):
    products, run = made({"int8 quantize": StageFailed("4 bits of what?")}, recipe(tmp_path))
    assert products.failed == dict.fromkeys(["int8/onnxruntime", "int8/openvino"], "4 bits of what?")
    assert set(run.timed) == {
        f"{name}/{engine}" for name in ("original", "plain") for engine in ("onnxruntime", "openvino")
    }


def test_an_unchanged_model_that_does_not_compile_is_no_baseline(tmp_path):
    _, run = made({"original/openvino compile": StageFailed("no")}, recipe(tmp_path))
    assert "original/openvino" not in run.timed
    assert "int8/openvino" in run.timed


def test_when_nothing_is_left_to_judge_the_failure_is_the_flow_s(tmp_path):
    failing = {f"{name}/{engine} compile": StageFailed(f"{name} is too odd")
               for name in ("int8", "plain") for engine in ("onnxruntime", "openvino")}  # fmt: skip
    with pytest.raises(StageFailed, match="plain is too odd"):
        made(failing, recipe(tmp_path))


def test_what_all_need_ends_the_flow(tmp_path):
    with pytest.raises(StageFailed, match="not finite"):
        made({"original measure-reference": StageFailed("logits are not finite")}, recipe(tmp_path))
