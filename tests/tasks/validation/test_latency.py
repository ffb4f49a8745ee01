import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from tasks.engines.encoder import encode_timed
from tasks.engines.generation import generate_timed
from tasks.validation.energy import Meter
from tasks.validation.latency import (
    CONTROL,
    Control,
    Prompts,
    Speed,
    Subject,
    Timings,
    _control,
    _write_repetitions,
    detectable_percent,
    judge_noise,
    measure_speed,
    measured,
    read_groups,
    summarize,
)
from tasks.validation.latency_worker import LatencyWorker
from tasks.validation.pooling import pooled_speed
from tasks.validation.statistics import Estimate
from tests.tasks.validation.nvml import install

OPTIONS = Speed(prompt_tokens=16, new_tokens=5, batch_sizes=(1, 2), num_blocks=4, num_batch_blocks=2)


def timings(ttft_s: float, gap_s: float, *, blocks: int = 6, new_tokens: int = 5, seed: int = 0, group: int = 0):
    """Timings of a subject whose blocks scatter by one percent."""
    rng = np.random.default_rng(seed)
    rows = [[slow * (ttft_s + gap_s * k) for k in range(new_tokens)] for slow in 1 + rng.normal(0, 0.01, blocks)]
    return Timings(load_s=1.0, size_bytes=10, group=group, idle_s=10.0, idle_cpu_s=0.1, batches={1: rows, 2: rows})


class SlowSession:
    """A session whose every call takes a known time."""

    vocab_size, max_length = 7, 100

    def __init__(self):
        self.seen = []

    def prefill(self, input_ids, num_logits=1):
        time.sleep(0.05)
        self.seen = [input_ids]
        return np.eye(7, dtype=np.float32)[None, [3]].repeat(len(input_ids), axis=0)

    def decode(self, input_ids):
        time.sleep(0.01)
        self.seen.append(input_ids)
        return np.eye(7, dtype=np.float32)[(input_ids + 1) % 7]


def test_times_are_those_of_each_token_and_tokens_are_the_likeliest_fed_back():
    session = SlowSession()
    times = generate_timed(session, np.zeros((2, 4), np.int64), 5)
    assert len(times) == 5
    assert 0.05 <= times[0] < 0.2
    assert 0.01 <= np.median(np.diff(times)) < 0.05
    assert [list(ids) for ids in session.seen[1:]] == [[3, 3], [4, 4], [5, 5], [6, 6]]


def test_tpot_ttft_and_throughput_are_their_definitions():
    timing = Timings(load_s=0, size_bytes=0, group=0, batches={1: [[0.5, 0.6, 0.9]], 8: [[1.0, 1.5, 2.0]]})
    assert timing.ttft_ms()[0, 0] == pytest.approx(500)
    assert timing.tpot_ms()[0, 0] == pytest.approx((900 - 500) / 2)
    assert timing.inter_token_ms()[0] == pytest.approx([100, 300])
    assert timing.tokens_per_s(8)[0, 0] == pytest.approx(8 * 3 / 2.0)


def test_a_subject_is_compared_with_the_original_and_its_baseline():
    group = {
        "original": timings(0.1, 0.04),
        CONTROL: timings(0.1, 0.04, seed=1),
        "float": timings(0.1, 0.02, seed=2),
        "int8": timings(0.1, 0.01, seed=3),
    }
    subjects = [Subject(name="float", bundle=Path("f")), Subject(name="int8", bundle=Path("i"), baseline="float")]
    summary = summarize([group], subjects, OPTIONS, threads=2, elapsed_s=1)
    int8 = summary.subjects["int8"]
    assert int8.tpot_ratios_to_original["p50"].value == pytest.approx(0.25, rel=0.05)
    assert int8.ttft_ratios_to_original["p50"].low < 1 < int8.ttft_ratios_to_original["p50"].high
    # end of request: 0.1 + 4 x 0.04 = 0.26 s, 0.18 s, 0.14 s
    assert int8.throughput[1].ratio_to_original.value == pytest.approx(0.26 / 0.14, rel=0.03)
    assert int8.throughput[1].ratio_to_baseline.value == pytest.approx(0.18 / 0.14, rel=0.03)
    assert summary.subjects["float"].throughput[1].ratio_to_baseline is None
    assert int8.idle_cpu_percent == pytest.approx(1.0)
    assert set(summary.subjects) == {"original", "float", "int8"}
    assert not summary.noisy


def test_a_baseline_of_another_group_is_compared_through_the_original_of_each():
    slow = 3  # the machine is three times slower while the second group runs
    first = {"original": timings(0.1, 0.04), CONTROL: timings(0.1, 0.04), "float": timings(0.1, 0.02, seed=1)}
    second = {
        "original": timings(slow * 0.1, slow * 0.04, group=1),
        CONTROL: timings(slow * 0.1, slow * 0.04, group=1),
        "int8": timings(slow * 0.1, slow * 0.01, seed=2, group=1),
    }
    subjects = [Subject(name="float", bundle=Path("f")), Subject(name="int8", bundle=Path("i"), baseline="float")]
    summary = summarize([first, second], subjects, OPTIONS, threads=2, elapsed_s=1)
    ratio = summary.subjects["int8"].throughput[1].ratio_to_baseline
    assert ratio.low < 0.18 / 0.14 < ratio.high
    assert summary.subjects["int8"].throughput[1].ratio_to_original.value == pytest.approx(0.26 / 0.14, rel=0.03)
    assert summary.num_groups == 2
    assert summary.subjects["original"].ttft_ms.num == 12


@pytest.mark.parametrize(
    ("low", "high", "noisy"), [(0.98, 1.02, False), (1.01, 1.05, False), (1.04, 1.1, True), (0.7, 1.3, True)]
)
def test_a_machine_is_noisy_when_the_original_is_not_as_fast_as_itself(low, high, noisy):
    fine = Estimate(value=1, low=0.99, high=1.01)
    found, sentence = judge_noise(
        Control(ttft_ratio=fine, tpot_ratio=Estimate(value=(low + high) / 2, low=low, high=high), throughput_ratio=fine)
    )
    assert found is noisy
    assert f"[{low:.3f}, {high:.3f}]" in sentence


def test_a_difference_that_a_run_could_tell_is_told_in_four_of_five_runs():
    def control(seed: int, factor: float) -> Control:
        return _control(timings(0.1, 0.04, seed=2 * seed), timings(0.1, 0.04 * factor, seed=2 * seed + 1), seed=0)

    smallest = np.mean([detectable_percent(control(seed, 1.0))["tpot_ms"] for seed in range(40)])
    assert 0.5 < smallest < 5  # blocks scatter by one percent
    told = [control(seed, 1 + smallest / 100).tpot_ratio.low > 1 for seed in range(100, 180)]
    assert 0.6 < np.mean(told) < 0.97


def test_what_can_be_told_follows_from_the_half_width_and_the_confidence_of_the_control():
    def told(confidence: float) -> float:
        control = _control(timings(0.1, 0.04), timings(0.1, 0.04, seed=1), seed=0, confidence=confidence)
        return detectable_percent(control, confidence)["tpot_ms"] / (control.tpot_ratio.high - control.tpot_ratio.low)

    # z(0.8) / z, where z of 99.9 % is 3.29
    assert (told(0.95), told(0.999)) == pytest.approx((50 * (1 + 0.8416 / 1.96), 50 * (1 + 0.8416 / 3.2905)), rel=1e-3)


def test_a_single_block_tells_no_difference():
    unknown = Estimate(value=1, low=None, high=None)
    assert detectable_percent(Control(ttft_ratio=unknown, tpot_ratio=unknown, throughput_ratio=unknown)) == {}


def test_latency_is_that_of_whole_requests_at_every_batch_size():
    rows = [[0.5, 0.6, 0.9]] * 4
    slower = [[1.0, 1.2, 1.8]] * 4
    group = {
        "original": Timings(load_s=0, size_bytes=1, group=0, batches={1: rows, 2: slower}, joules=[3.0, 3.0, 6.0, 3.0]),
        CONTROL: Timings(load_s=0, size_bytes=1, group=0, batches={1: rows}),
    }
    original = summarize([group], [], OPTIONS, threads=1, elapsed_s=1).subjects["original"]
    assert original.latency_ms.p95.value == pytest.approx(900)
    assert original.by_batch_size[2].latency_ms.p50.value == pytest.approx(1800)
    assert original.by_batch_size[2].tpot_ms.p50.value == pytest.approx(400)
    assert original.energy_j_per_token.value == pytest.approx(1.0)


def test_latency_is_a_metric_beside_the_original():
    group = {
        "original": timings(0.1, 0.04),
        CONTROL: timings(0.1, 0.04, seed=1),
        "int8": timings(0.05, 0.02, seed=2),
    }
    for timing in group.values():
        timing.peak_memory_mib = 100.0
    summary = summarize([group], [Subject(name="int8", bundle=Path("i"))], OPTIONS, threads=1, elapsed_s=1)
    found = measured(summary, "int8")["latency_ms.p50.batch_1"]
    assert found.value.value == pytest.approx(130, rel=0.02)
    assert found.degradation_percent.value == pytest.approx(-50, abs=2)


def test_energy_is_a_metric_beside_the_original_block_by_block():
    group = {"original": timings(0.1, 0.04), CONTROL: timings(0.1, 0.04, seed=1), "int8": timings(0.05, 0.02, seed=2)}
    group["original"].joules, group["int8"].joules = [10.0, 10.1, 9.9, 10.0, 10.2, 9.8], [4.0, 4.1, 3.9, 4.0, 4.2, 3.8]
    for timing in group.values():
        timing.peak_memory_mib = 1.0
    summary = summarize([group], [Subject(name="int8", bundle=Path("i"))], OPTIONS, threads=1, elapsed_s=1)
    found = measured(summary, "int8")["energy_j_per_token.batch_1"]
    assert found.value.value == pytest.approx(4 / 5)  # of five tokens
    assert found.original == pytest.approx(10 / 5)
    assert found.degradation_percent.value == pytest.approx(-60)
    assert found.degradation_percent.low <= -60 <= found.degradation_percent.high


@pytest.mark.parametrize("joules", [[], [0.0] * 6, [4.0, 4.1]])
def test_energy_of_no_counter_or_one_that_stands_still_or_missed_blocks_is_not_measured(joules):
    group = {"original": timings(0.1, 0.04), CONTROL: timings(0.1, 0.04, seed=1), "int8": timings(0.05, 0.02, seed=2)}
    group["original"].joules, group["int8"].joules = [10.0] * 6, joules
    for timing in group.values():
        timing.peak_memory_mib = 1.0
    summary = summarize([group], [Subject(name="int8", bundle=Path("i"))], OPTIONS, threads=1, elapsed_s=1)
    assert summary.subjects["int8"].energy_j_per_token is None
    assert "energy_j_per_token.batch_1" not in measured(summary, "int8")


def test_gpu_memory_is_the_most_that_was_seen_in_any_group():
    first, second = (
        {"original": timings(0.1, 0.04), CONTROL: timings(0.1, 0.04), "a": timings(0.1, 0.02)} for _ in "12"
    )
    for mib, timing in ((None, first["a"]), (70.0, first["a"]), (65.0, first["a"]), (90.0, second["a"])):
        timing.saw_gpu_memory(mib)
    for timing in (*first.values(), *second.values()):
        timing.peak_memory_mib = 1.0
    summary = summarize([first, second], [Subject(name="a", bundle=Path("a"))], OPTIONS, threads=1, elapsed_s=1)
    assert summary.subjects["a"].peak_gpu_memory_mib == 90
    assert measured(summary, "a")["peak_gpu_memory_mib"].value.value == 90
    assert summary.subjects["original"].peak_gpu_memory_mib is None


@pytest.mark.slow
def test_energy_and_gpu_memory_are_asked_of_nvml_where_it_answers(
    tiny_checkpoint, tiny_bundle, small_data, tmp_path, monkeypatch
):
    install(monkeypatch)
    summary = measure_speed(
        subjects=[Subject(name="tiny", bundle=tiny_bundle)],
        original=tiny_checkpoint,
        data=small_data,
        options=OPTIONS.model_copy(update={"num_blocks": 3}),
        threads=1,
        out=tmp_path,
    )
    assert summary.energy == summary.gpu_memory == "NVML of 2 GPUs"
    assert summary.subjects["tiny"].peak_gpu_memory_mib == pytest.approx(96)
    assert summary.subjects["tiny"].energy_j_per_token.value == pytest.approx(4 / 5)  # one per GPU and look
    assert summary.subjects["tiny"].energy_ratio_to_original.value == pytest.approx(1)
    again = pooled_speed([(tmp_path, summary)] * 2, {}, OPTIONS)
    assert again.subjects["tiny"].peak_gpu_memory_mib == pytest.approx(96)
    assert again.gpu_memory == "NVML of 2 GPUs"


def test_prompts_are_evaluation_text_and_hardly_ever_the_same(small_data):
    prompts = Prompts(small_data, OPTIONS)
    tokens = np.load(small_data / "evaluation.npy").reshape(-1)
    drawn = np.concatenate([prompts.draw(2) for _ in range(8)])
    assert drawn.shape == (16, 16)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, 16)
    assert all((windows == row).all(axis=1).any() for row in drawn)
    assert len({tuple(row) for row in drawn}) >= 14


def test_prompts_longer_than_the_text_are_refused(small_data):
    with pytest.raises(ValueError, match="at least 400 evaluation tokens; got 288"):
        Prompts(small_data, Speed(prompt_tokens=200))


@pytest.mark.parametrize("batch_sizes", [(8,), (1, 8, 4), (1, 1)])
def test_batch_sizes_ascend_from_one(batch_sizes):
    with pytest.raises(ValidationError, match="must ascend from 1"):
        Speed(batch_sizes=batch_sizes)


@pytest.mark.slow
def test_engines_and_the_original_are_measured_side_by_side(tiny_checkpoint, tiny_bundle, small_data, tmp_path):
    told = []
    summary = measure_speed(
        subjects=[Subject(name="tiny/onnxruntime", bundle=tiny_bundle)],
        original=tiny_checkpoint,
        data=small_data,
        options=OPTIONS,
        threads=1,
        out=tmp_path,
        report=lambda *args: told.append(args),
    )
    assert set(summary.subjects) == {"original", "tiny/onnxruntime"}
    subject = summary.subjects["tiny/onnxruntime"]
    assert subject.ttft_ms.num == 4
    assert subject.inter_token_ms.num == 4 * 4
    assert subject.throughput[2].num == 2
    assert subject.by_batch_size[2].latency_ms.num == 2
    assert summary.conditions.versions["onnxruntime"]
    assert "other processes used" in summary.noise.lower()
    assert summary.energy == Meter().says
    assert 20 < subject.peak_memory_mib < summary.subjects["original"].peak_memory_mib  # PyTorch is not loaded
    assert subject.size_bytes == sum(f.stat().st_size for f in tiny_bundle.iterdir())
    assert [step for step, _, _ in told] == [1, 2, 3, 4]
    assert "tpot_ms.tiny/onnxruntime" in told[-1][2]
    rows = pd.read_parquet(tmp_path / "repetitions.parquet")
    assert len(rows) == 4 * 3 + 2 * 2  # the control takes no part in larger batches
    again = 1000 * np.median([r[0] for r in rows[(rows.subject == "original") & (rows.batch_size == 1)].chosen_after_s])
    assert again == pytest.approx(summary.subjects["original"].ttft_ms.p50.value)


@pytest.mark.slow
def test_subjects_that_do_not_fit_together_are_measured_in_groups(tiny_checkpoint, tiny_bundle, small_data, tmp_path):
    summary = measure_speed(
        subjects=[
            Subject(name="a", bundle=tiny_bundle),
            Subject(name="b", bundle=tiny_bundle, baseline="a"),
        ],
        original=tiny_checkpoint,
        data=small_data,
        options=OPTIONS.model_copy(
            update={"max_memory_mib": 1, "max_minutes": 1e-6, "num_blocks": 6, "num_batch_blocks": 3}
        ),
        threads=1,
        out=tmp_path,
    )
    assert summary.num_groups == 2
    assert (summary.subjects["a"].group, summary.subjects["b"].group) == (0, 1)
    assert summary.subjects["b"].throughput[1].ratio_to_baseline is not None
    assert summary.num_blocks == 5  # no time at all, but never fewer than three of either batch size: 0, 2, 4
    assert summary.subjects["b"].throughput[2].num == 3


def test_a_bundle_that_cannot_be_loaded_is_named(tmp_path):
    worker = LatencyWorker("broken/onnxruntime", threads=1)
    try:
        with pytest.raises(ValueError, match="speed of 'broken/onnxruntime' cannot be measured"):
            worker.load(tmp_path, original=False)
    finally:
        worker.close()


def test_requests_longer_than_a_model_reads_are_refused(tiny_checkpoint, small_data, tmp_path):
    with pytest.raises(ValueError, match=r"at most 512 tokens; speed.prompt_tokens and speed.new_tokens need 515"):
        measure_speed(
            subjects=[],
            original=tiny_checkpoint,
            data=small_data,
            options=Speed(prompt_tokens=16, new_tokens=500),
            threads=1,
            out=tmp_path,
        )


def test_subjects_need_names_of_their_own(small_data, tmp_path):
    for names in (["a", "a"], ["original"]):
        with pytest.raises(ValueError, match="different names"):
            measure_speed(
                subjects=[Subject(name=name, bundle=tmp_path) for name in names],
                original=tmp_path,
                data=small_data,
                options=OPTIONS,
                threads=1,
                out=tmp_path,
            )


def test_a_process_that_is_killed_is_named_with_the_likely_reason(tiny_bundle):
    worker = LatencyWorker("int8/onnxruntime", threads=1)
    try:
        worker.load(tiny_bundle, original=False)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match=r"'int8/onnxruntime' was killed \(SIGKILL\).*memory"):
            worker.generate(np.zeros((1, 4), np.int64), 2)
    finally:
        worker.close()


def test_an_idle_subject_burns_no_cpu(tiny_bundle):
    worker = LatencyWorker("idle", threads=2)
    try:
        worker.load(tiny_bundle, original=False)
        worker.generate(np.ones((1, 16), np.int64), 8)
        worker.idle_s = worker.idle_cpu_s = 0.0
        time.sleep(0.5)
        worker.generate(np.ones((1, 16), np.int64), 2)
        assert worker.idle_s >= 0.5
        assert worker.idle_cpu_s < 0.1 * worker.idle_s
    finally:
        worker.close()


def test_subjects_end_when_their_parent_is_killed():
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                """
                import sys, time
                from tasks.validation.latency_worker import LatencyWorker
                print(LatencyWorker("orphan", threads=1).pid, flush=True)
                time.sleep(60)
                """
            ),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the subject outlived its parent by ten seconds")


ENCODER = Speed(prompt_tokens=20, new_tokens=0, batch_sizes=(1, 4), num_blocks=6, num_batch_blocks=6)


def answers(answer_s: float, *, seed: int = 0, group: int = 0) -> Timings:
    """Of an encoder: one time per batch; four sequences take three times as long as one."""
    slow = 1 + np.random.default_rng(seed).normal(0, 0.01, 6)
    batches = {size: [[factor * answer_s * each] for each in slow] for size, factor in ((1, 1), (4, 3))}
    return Timings(load_s=1.0, size_bytes=10, group=group, peak_memory_mib=9.0, batches=batches, tokens_read=20)


def encoders() -> dict[str, Timings]:
    return {
        "original": answers(0.1),
        CONTROL: answers(0.1, seed=1),
        "float": answers(0.06, seed=2),
        "int8": answers(0.05, seed=3),
    }


def test_an_encoder_has_latency_and_what_it_reads_per_second_and_no_times_per_token():
    subjects = [Subject(name="float", bundle="."), Subject(name="int8", bundle=".", baseline="float")]
    summary = summarize([encoders()], subjects, ENCODER, threads=1, elapsed_s=1)
    int8 = summary.subjects["int8"]
    assert int8.ttft_ms is int8.tpot_ms is int8.inter_token_ms is summary.control.tpot_ratio is None
    assert int8.time_ms == int8.latency_ms
    assert int8.latency_ms.p50.value == pytest.approx(50, rel=0.02)
    assert int8.throughput[4].tokens_per_s.value == pytest.approx(4 * 20 / 0.15, rel=0.02)
    assert int8.throughput[1].ratio_to_baseline.value == pytest.approx(1.2, rel=0.02)
    assert "ratios of throughput" in summary.noise
    assert "TTFT" not in summary.noise
    figures = measured(summary, "int8")
    assert figures["samples_per_s.batch_4"].value.value == pytest.approx(4 / 0.15, rel=0.02)
    assert figures["samples_per_s.batch_4"].original == pytest.approx(4 / 0.3, rel=0.02)
    assert figures["latency_ms.p90.batch_4"].degradation_percent.value == pytest.approx(-50, rel=0.05)
    assert "ttft_ms.p50.batch_1" not in figures
    names = {metric.name for metric in ENCODER.metrics()}
    assert {figure.split(".")[0] for figure in figures} <= names
    assert not {"ttft_ms", "tpot_ms"} & names


def test_an_encoders_repetitions_are_read_again_as_they_were(tmp_path):
    group = encoders()
    summary = summarize([group], [], ENCODER, threads=1, elapsed_s=1)
    _write_repetitions([group], tmp_path / "repetitions.parquet")
    (again,) = read_groups(tmp_path, summary)
    assert again["int8"].tokens_per_s(4).tolist() == group["int8"].tokens_per_s(4).tolist()
    assert again["int8"].latency_ms().tolist() == group["int8"].latency_ms().tolist()


@pytest.mark.parametrize(
    ("kind", "new_tokens", "fits"),
    [("encoder", 0, True), ("encoder", 8, False), ("decoder", 8, True), ("encoder-decoder", 0, False)],
)
def test_new_tokens_are_of_what_writes(kind, new_tokens, fits):
    assert (Speed(new_tokens=new_tokens).misfit(kind) is None) == fits


@pytest.mark.parametrize(("class_name", "new_tokens"), [("BertModel", 0), ("T5ForConditionalGeneration", 3)])
def test_originals_of_other_kinds_are_timed_in_pytorch(class_name, new_tokens, transformer_checkpoint):
    from tasks.validation.latency_worker import load

    kind, session = load(transformer_checkpoint(class_name), original=True, threads=1)
    ids = np.random.default_rng(0).integers(3, 90, (2, 12))
    assert Speed(new_tokens=new_tokens).misfit(kind) is None
    if kind == "encoder":
        assert encode_timed(session, ids) > 0
    else:
        assert len(generate_timed(session, ids, new_tokens)) == new_tokens
    session.close()
