import numpy as np
import pandas as pd
import pytest

from tasks.validation.latency import (
    CONTROL,
    ORIGINAL,
    Speed,
    Subject,
    Timings,
    _write_repetitions,
    read_timings,
    summarize,
)
from tasks.validation.pooling import pooled_quality, pooled_speed

OPTIONS = Speed(num_blocks=8, new_tokens=4, batch_sizes=(1, 2))
BASELINES = {"int8": "float"}


def group(rng, slow: float, *names: str, num_blocks: int = 8) -> dict[str, Timings]:
    """Timings of a group; the machine is `slow` times slower while it runs. int8 takes half of the original's time."""
    factor = {ORIGINAL: 1.0, CONTROL: 1.0, "int8": 0.5, "float": 0.8}
    found = {}
    for name in (ORIGINAL, CONTROL, *names):
        times = (
            slow * factor[name] * np.exp(0.02 * rng.normal(size=(num_blocks, 1))) * np.array([[0.1, 0.11, 0.12, 0.13]])
        )
        batches = {1: times.tolist(), 2: times[:3].tolist()}
        found[name] = Timings(load_s=1, size_bytes=9, group=0, peak_memory_mib=5, batches=batches, joules=[3.0] * 8)
    return found


def measurement(directory, groups):
    directory.mkdir()
    _write_repetitions(groups, directory / "repetitions.parquet")
    names = {name for timings in groups for name in timings} - {ORIGINAL, CONTROL}
    subjects = [Subject(name=n, bundle=".", baseline=BASELINES.get(n)) for n in sorted(names)]
    return directory, summarize(groups, subjects, OPTIONS, threads=1, elapsed_s=1)


def test_one_measurement_pooled_is_that_measurement(tmp_path):
    one = measurement(tmp_path / "a", [group(np.random.default_rng(0), 1, "int8", "float")])
    pooled = pooled_speed([one], BASELINES, OPTIONS)
    assert pooled.subjects["int8"].tpot_ms == one[1].subjects["int8"].tpot_ms
    assert pooled.subjects["int8"].throughput == one[1].subjects["int8"].throughput
    assert pooled.subjects["int8"] == one[1].subjects["int8"].model_copy(update={"idle_cpu_percent": 0.0})
    assert pooled.control == one[1].control


def test_a_second_run_on_a_slower_machine_narrows_the_ratio_and_does_not_move_it(tmp_path):
    rng = np.random.default_rng(0)
    first = measurement(tmp_path / "a", [group(rng, 1, "int8", "float")])
    second = measurement(tmp_path / "b", [group(rng, 3, "int8", "float", num_blocks=24)])
    pooled = pooled_speed([first, second], BASELINES, OPTIONS).subjects["int8"]
    assert pooled.tpot_ms.num == 32
    ratio, before = pooled.tpot_ratios_to_original["p50"], first[1].subjects["int8"].tpot_ratios_to_original["p50"]
    assert (ratio.num, before.num) == (32, 8)
    assert ratio.value == pytest.approx(0.5, rel=0.05)
    assert pooled.throughput[1].ratio_to_baseline.value == pytest.approx(1.6, rel=0.05)


def test_what_was_measured_once_keeps_its_blocks_beside_the_original_of_its_own_run(tmp_path):
    rng = np.random.default_rng(0)
    first = measurement(tmp_path / "a", [group(rng, 1, "int8", "float")])
    second = measurement(tmp_path / "b", [group(rng, 3, "int8")])
    pooled = pooled_speed([first, second], BASELINES, OPTIONS).subjects
    assert (pooled["float"].tpot_ms.num, pooled["int8"].tpot_ms.num, pooled["original"].tpot_ms.num) == (8, 16, 16)
    assert pooled["float"].tpot_ratios_to_original["p50"].value == pytest.approx(0.8, rel=0.05)
    assert pooled["int8"].throughput[1].ratio_to_baseline.value == pytest.approx(1.6, rel=0.1)  # through the original


def test_what_a_measurement_wrote_is_read_back_with_the_blocks_of_all_groups(tmp_path):
    rng = np.random.default_rng(0)
    groups = [group(rng, 1, "float"), group(rng, 3, "int8")]
    found = read_timings(*measurement(tmp_path / "a", groups))
    assert found.keys() == {ORIGINAL, CONTROL, "float", "int8"}
    assert found[ORIGINAL].batches[1] == groups[0][ORIGINAL].batches[1] + groups[1][ORIGINAL].batches[1]
    assert (found["int8"].tpot_ms() == groups[1]["int8"].tpot_ms()).all()
    assert found["int8"].batches[2] == groups[1]["int8"].batches[2]


def test_windows_of_two_measurements_are_one_sample_of_their_documents(tmp_path):
    rng = np.random.default_rng(0)
    for part in (0, 1):
        (tmp_path / str(part)).mkdir()
        original = 500 * (3 + rng.normal(0, 0.1, 10))
        items = {"document": 5 * part + np.arange(10), "num_tokens": 500, "num_bytes": 2000,
                 "nll": original + 5, "original_nll": original, "num_same_top1": 480, "num_same_top5": 2400,
                 "num_kl_positions": 3, "kl_sum": 0.1}  # fmt: skip
        pd.DataFrame(items).to_parquet(tmp_path / str(part) / "items.parquet")
    pooled = pooled_quality([tmp_path / "0", tmp_path / "1"], seed=0)
    assert (pooled.num_windows, pooled.num_documents) == (20, 15)  # five documents are in both
    assert pooled.perplexity_increase_percent.value == pytest.approx(100 * np.expm1(0.01))
    wider = pooled_quality([tmp_path / "0", tmp_path / "1"], seed=0, confidence=0.99).perplexity
    assert wider.low < pooled.perplexity.low < pooled.perplexity.high < wider.high
