"""Rounds of measuring more; stages are stand-ins that write what real ones write, judged by the real code."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from flows.deciding import decide, undecided
from flows.judging import quality_of_all
from flows.pipeline import ORIGINAL, Products
from flows.recipe import Recipe, parse
from infra.artifacts import publish
from infra.isolation import StageCrashed
from infra.settings import settings
from tasks.validation.quality import summarize
from tasks.validation.verdicts import Check, conclude

ENGINE = {"engine": "onnxruntime", "precision": "float32"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield
    settings.cache_clear()


def items(loss_percent: float, *, first_document: int, num: int = 8, spread: float = 0.03) -> pd.DataFrame:
    """Windows of one document each, on which the candidate loses about so much perplexity."""
    rng = np.random.default_rng(first_document)
    stray = rng.normal(0, spread, num)
    per_token = np.log1p(loss_percent / 100) + stray - stray.mean()
    return pd.DataFrame(
        {
            "window": range(num),
            "document": first_document + np.arange(num),
            "num_tokens": 500,
            "num_bytes": 2000,
            "nll": 500 * (3 + per_token),
            "original_nll": 1500.0,
            "num_same_top1": 480,
            "num_same_top5": 2400,
            "num_kl_positions": 10,
            "kl_sum": 0.1,
        }
    )


def measured(directory: Path, losses: pd.DataFrame) -> SimpleNamespace:
    directory.mkdir(parents=True)
    losses.to_parquet(directory / "items.parquet", index=False)
    metrics = summarize(losses, seed=0).model_dump(mode="json")
    return SimpleNamespace(artifact=publish(directory), metrics=metrics, elapsed_s=10.0)


CHECKPOINT = {"architecture": "L", "num_parameters": 1, "size_bytes": 400, "vocab_size": 9, "num_layers": 1,
              "hidden_size": 2, "dtype": "float32"}  # fmt: skip


def products(directory: Path, **losses: float) -> Products:
    stage = SimpleNamespace(metrics=CHECKPOINT, artifact=None)
    found = Products(stage, stage, stage)
    for name, loss in {ORIGINAL: 0.0, **losses}.items():
        key = f"{name}/onnxruntime"
        found.quality[key] = measured(directory / name, items(loss, first_document=0))
        found.bundles[key] = SimpleNamespace(artifact=SimpleNamespace(size_bytes=100), metrics={})
    return found


def recipe(max_rounds: int = 2, max_minutes: float = 20) -> Recipe:
    return parse(
        {
            "name": "tiny",
            "source": "./tiny",
            "data": {"num_evaluation_windows": 8},
            "candidates": {"good": {}, "open": {}, "bad": {}},
            "engines": [ENGINE],
            "validation": {
                "speed": None,
                "limits": {"perplexity": {"max_degradation_percent": 3}},
                "if_inconclusive": {"max_rounds": max_rounds, "max_minutes": max_minutes},
            },
        }
    )


class Stages:
    """Stands for the stages of a round; each measures `loss` on eight windows more, until the corpus ends."""

    def __init__(self, directory: Path, loss: float, num_rounds: int = 9, failing: str = "") -> None:
        self.failing = failing
        self.directory, self.loss, self.num_rounds = directory, loss, num_rounds
        self.titles: list[str] = []

    def __call__(self, task, label="", /, **arguments):
        self.titles.append(f"{label} {task.name}")
        if task.name == self.failing:
            raise StageCrashed("it died with SIGKILL.")
        if task.name == "more-windows":
            number = arguments["skip"] // arguments["num_windows"]
            left = arguments["num_windows"] if number <= self.num_rounds else 0
            return SimpleNamespace(metrics={"num_evaluation_windows": left}, elapsed_s=1.0)
        if task.name == "measure-reference":
            return SimpleNamespace(elapsed_s=1.0)
        number = int(label.split()[1])
        return measured(self.directory / label, items(self.loss, first_document=100 * number))


def test_only_what_is_undecided_is_measured_again_and_pooled_with_what_was(tmp_path):
    run = Stages(tmp_path, loss=1.5)
    found = products(tmp_path, good=-1.0, open=1.5, bad=9.0)
    verdicts = {key: judgement.verdict for key, judgement in decide(recipe(), found, run).items()}
    assert verdicts == {"good/onnxruntime": "ACCEPT", "open/onnxruntime": "ACCEPT", "bad/onnxruntime": "REJECT"}
    assert run.titles == [
        "round 1 more-windows",
        "round 1 original measure-reference",
        "round 1 open/onnxruntime measure-quality",
    ]
    (again,) = found.rounds
    assert list(again.quality) == ["open/onnxruntime"]
    quality = quality_of_all(recipe(), found)  # what the report shows
    assert [quality[f"{name}/onnxruntime"].num_windows for name in ("good", "open")] == [8, 16]


def test_what_more_data_would_not_decide_stays_inconclusive_and_says_how_much_would(tmp_path):
    found = products(tmp_path, open=2.9)
    judgement = decide(recipe(), found, Stages(tmp_path, loss=2.9))["open/onnxruntime"]
    (check,) = judgement.checks
    assert judgement.verdict == "INCONCLUSIVE"
    assert check.confidence == pytest.approx(1 - 0.05 / 3)
    assert check.sentence.endswith("would decide if the figures stayed.")
    assert "It rests on 24 documents or blocks; about" in check.sentence, check.sentence


def test_without_rounds_nothing_is_measured_again_and_intervals_are_those_of_95_percent(tmp_path):
    run = Stages(tmp_path, loss=1.5)
    judgement = decide(recipe(max_rounds=0), products(tmp_path, open=1.5), run)["open/onnxruntime"]
    assert (judgement.verdict, judgement.checks[0].confidence, run.titles) == ("INCONCLUSIVE", 0.95, [])


def test_rounds_end_with_the_budget_of_time_and_with_the_corpus(tmp_path):
    run = Stages(tmp_path / "time", loss=2.9)
    decide(recipe(max_rounds=9, max_minutes=0.1), products(tmp_path / "a", open=2.9), run)  # a round takes 12 s
    assert len(run.titles) == 3
    run = Stages(tmp_path / "corpus", loss=2.9, num_rounds=1)
    decide(recipe(max_rounds=9), products(tmp_path / "b", open=2.9), run)
    assert run.titles[3:] == ["round 2 more-windows"]


def test_a_round_that_fails_costs_no_verdict_and_an_engine_that_dies_in_one_its_own(tmp_path):
    found = products(tmp_path / "a", good=-1.0, open=1.5)
    verdicts = decide(recipe(), found, Stages(tmp_path / "r", loss=1.5, failing="measure-reference"))
    assert [verdicts[f"{name}/onnxruntime"].verdict for name in ("good", "open")] == ["ACCEPT", "INCONCLUSIVE"]
    found = products(tmp_path / "b", good=-1.0, open=1.5)
    verdicts = decide(recipe(), found, Stages(tmp_path / "q", loss=1.5, failing="measure-quality"))
    assert verdicts["good/onnxruntime"].verdict == "ACCEPT"
    assert verdicts["open/onnxruntime"].failure == "it died with SIGKILL."


@pytest.mark.parametrize("figure", ["cost_per_million_tokens.batch_8", "tpot_ms.p50.batch_1", "speedup_over_original"])
def test_what_follows_from_speed_is_settled_by_more_blocks(figure):
    about = {"metric": "cost", "bound": "max", "limit": 1, "measured": 1, "unit": "EUR", "sentence": "Open."}
    check = Check(figure=figure, verdict="INCONCLUSIVE", can_be_settled=True, **about)
    content = {
        "name": "tiny",
        "source": "./tiny",
        "candidates": {"open": {}},
        "engines": [ENGINE],
        "validation": {"price_per_hour": {"amount": 1, "currency": "EUR"}},
    }
    assert undecided(parse(content), {"open/onnxruntime": conclude([check])}) == ([], ["open/onnxruntime"])
