import numpy as np
import pandas as pd
import pytest

from tasks.engines import OnnxRuntime, TensorRT
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.mixed import Mixed
from tasks.quantization.sensitivity import measure_sensitivity
from tasks.quantization.token_times import read_times
from tasks.validation.latency import Speed
from tasks.validation.tpot import measure_tpot

ENGINE = OnnxRuntime(precision="float32")
SPEED = Speed(prompt_tokens=8, new_tokens=4, batch_sizes=(1,), num_blocks=3)
GROUPS = Grid(bits=4, group_size=16)
CHOICES = (GROUPS, Grid(), GROUPS.model_copy(update={"range": "mse"}))
TABLES = (Grid(), GROUPS)


def measured(checkpoint, data, out, **changes):
    out.mkdir()
    options = {"choices": CHOICES, "tables": TABLES, "ignore": (), "kv_cache": None, "options": SPEED} | changes
    return measure_tpot(checkpoint=checkpoint, data=data, engine=ENGINE, threads=1, out=out, **options)


@pytest.mark.slow
def test_every_choice_is_timed_on_the_engine_and_a_budget_is_kept_by_it(tiny_checkpoint, small_data, tmp_path):
    told = []
    times = measured(
        tiny_checkpoint, small_data, tmp_path / "times", report=lambda step, total, _: told.append((step, total))
    )
    assert read_times(tmp_path / "times") == times
    assert tuple(choice.grid for choice in times.blocks) == CHOICES
    assert tuple(choice.grid for choice in times.tables) == TABLES
    assert times.blocks[0].tpot_ms == times.tables[0].tpot_ms  # one engine
    assert times.blocks[0].tpot_ms == times.blocks[2].tpot_ms  # another range is as fast
    assert (times.engine, times.embedding, times.threads) == ("onnxruntime", "model.embed_tokens", 1)
    assert "onnxruntime" in times.versions
    assert told == [(step, 6) for step in range(1, 7)]  # three engines, three blocks of time
    assert {path.name for path in (tmp_path / "times").iterdir()} == {"tpot.json", "repetitions.parquet"}

    rows = pd.read_parquet(tmp_path / "times" / "repetitions.parquet")
    assert set(rows.subject) == {"original", "original (control)", "engine-0", "engine-1", "engine-2"}
    chosen = np.stack(rows[rows.subject == "engine-1"].chosen_after_s)
    assert times.blocks[1].tpot_ms == pytest.approx(np.median(1000 * (chosen[:, -1] - chosen[:, 0]) / 3))

    scores, out = tmp_path / "scores", tmp_path / "out"
    scores.mkdir()
    out.mkdir()
    measure_sensitivity(
        checkpoint=tiny_checkpoint, data=small_data, choices=CHOICES, embedding_choices=TABLES, ignore=(), out=scores
    )
    slowest = max(choice.tpot_ms for choice in times.blocks) + max(choice.tpot_ms for choice in times.tables)
    method = RoundToNearest(weights=Mixed(choices=CHOICES, embedding_choices=TABLES, tpot_ms=slowest))
    run = {"checkpoint": tiny_checkpoint, "data": small_data, "scores": scores, "times": tmp_path / "times"}
    summary = quantize_checkpoint(method=method, out=out, **run)
    assert summary.mixed.predicted_tpot_ms <= slowest
    assert summary.mixed.layers == "29 of 8 bits"  # enough time for the best
    method = RoundToNearest(weights=Mixed(choices=CHOICES, embedding_choices=TABLES, tpot_ms=1e-4))
    with pytest.raises(ValueError, match=r"ms per token on onnxruntime \(1 threads\); tpot_ms is 0\.0001"):
        quantize_checkpoint(method=method, out=out, **run)


def test_an_engine_that_cannot_run_here_is_refused(tiny_checkpoint, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(TensorRT, "missing", lambda self: "It needs tensorrt.")
    with pytest.raises(ValueError, match="`tpot_ms` is measured on the engine: It needs tensorrt"):
        measure_tpot(
            checkpoint=tiny_checkpoint,
            data=small_data,
            engine=TensorRT(precision="float16"),
            choices=CHOICES,
            tables=TABLES,
            ignore=(),
            kv_cache=None,
            options=SPEED,
            threads=1,
            out=tmp_path,
        )
