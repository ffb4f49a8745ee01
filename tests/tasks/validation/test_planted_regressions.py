"""Planted losses of quality, in a real engine: a limit of 2 % has to reject 3 %, accept 0.2 %, and not guess."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasks.validation.limits import Limits
from tasks.validation.quality import METRICS, Quality, measure_quality, measure_reference, measured, summarize
from tasks.validation.verdicts import Judgement, judge

LIMIT = Limits.model_validate({"perplexity": {"max_degradation_percent": 2}})


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, small_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    options = Quality(num_kl_positions=4)
    measure_reference(checkpoint=tiny_checkpoint, data=small_data, options=options, threads=1, out=out)
    return out


def planted(checkpoint: Path, data: Path, rise_percent: float, out: Path) -> Path:
    """A copy of the checkpoint whose perplexity on the evaluation windows is higher by `rise_percent`.

    Its last norm is scaled until it is: the logits grow with it, and a random model that is surer of itself is worse.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(data / "evaluation.npy").astype(np.int64))
    norm = model.model.norm.weight.detach().clone()

    @torch.no_grad()
    def loss(factor: float) -> float:
        model.model.norm.weight.copy_(factor * norm)
        return float(model(input_ids=tokens, labels=tokens).loss)

    wanted, low, high = loss(1.0) + np.log1p(rise_percent / 100), 1.0, 1.2
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) < wanted else (low, middle)
    loss(high)
    shutil.copytree(checkpoint, out)
    model.save_pretrained(out)
    return out


def measure(checkpoint: Path, data: Path, reference: Path, directory: Path) -> pd.DataFrame:
    """items.parquet of a checkpoint in ONNX Runtime."""
    from tasks.engines.compiling import compile_engine
    from tasks.engines.onnxruntime import OnnxRuntime

    bundle, out = directory / "bundle", directory / "quality"
    bundle.mkdir()
    out.mkdir()
    engine = OnnxRuntime(precision="float32")
    compile_engine(checkpoint=checkpoint, data=data, engine=engine, threads=1, out=bundle)
    options = Quality(num_kl_positions=4)
    measure_quality(bundle=bundle, reference=reference, data=data, options=options, threads=1, out=out)
    return pd.read_parquet(out / "items.parquet")


def verdict_on(items: pd.DataFrame) -> Judgement:
    return judge(LIMIT, measured(summarize(items, seed=0)), {metric.name: metric for metric in METRICS})


@pytest.mark.parametrize(("rise_percent", "verdict"), [(3.0, "REJECT"), (0.2, "ACCEPT")])
def test_a_planted_loss_gets_its_verdict_and_too_few_documents_get_none(
    tiny_checkpoint, small_data, reference, tmp_path, rise_percent, verdict
):
    pytest.importorskip("onnxruntime")
    worse = planted(tiny_checkpoint, small_data, rise_percent, tmp_path / "worse")
    items = measure(worse, small_data, reference, tmp_path)
    judgement = verdict_on(items)
    (check,) = judgement.checks
    assert check.measured == pytest.approx(rise_percent, abs=0.1)
    assert judgement.verdict == verdict, judgement.sentence

    document = items.loc[items["num_kl_positions"] > 0, "document"].iloc[0]
    alone = verdict_on(items[items["document"] == document])
    assert alone.verdict == "INCONCLUSIVE"
    assert "An interval needs at least 2 documents or blocks; it rests on 1." in alone.sentence
