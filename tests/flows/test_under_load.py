"""Engines under load through a whole flow, judged and drawn; and the version that it registered, validated by name."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.flows.command_line import slimline
from tests.flows.recipes import STDLIB, short

LIMITS = {
    "capacity_requests_per_s": {"min": 0.2},
    "capacity_tokens_per_s": {"min": 0.5},
    "goodput_requests_per_s": {"min": 0.05},
    "cost_per_million_tokens_under_load": {"max": 10_000},
}
"""So far from what any machine does that only a figure in another unit, or none, can break them."""


def recipe(source: Path) -> dict:
    content = short("served", source)
    content["validation"] |= {
        "price_per_hour": {"amount": 0.5, "currency": "EUR"},
        "load": {
            "users": [1, 2],
            "requests_per_s": {"factor": 4, "max_levels": 3},
            "prompt_tokens": {"distribution": "fixed", "tokens": 16},
            "new_tokens": {"distribution": "fixed", "tokens": 8},
            "seconds_per_level": 1.0,
            "within": {"latency_ms": 60_000, "fraction": 0.5},
        },
        "limits": LIMITS,
    }
    return content


def page_of(said: str) -> str:
    return Path(re.search(r"report\s+(/\S+\.html)", said)[1]).read_text()


def figures_of(said: str) -> dict:
    return json.loads(Path(re.search(r"figures\s+(/\S+\.json)", said)[1]).read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def served(tiny_checkpoint, home) -> subprocess.CompletedProcess[str]:
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe(tiny_checkpoint), sort_keys=False))
    return slimline("run", str(home / "recipe.yaml"), home=home)


def test_every_engine_is_put_under_both_kinds_of_load(served):
    assert served.returncode == 0, served.stderr
    load = figures_of(served.stdout)["load"]
    assert set(load["subjects"]) == {"original/onnxruntime", "int8/onnxruntime"}
    assert not load["failed"]
    for subject in load["subjects"].values():
        levels = subject["levels"]
        assert [level["users"] for level in levels[:2]] == [1, 2]
        rates = [level["offered_requests_per_s"] for level in levels[2:]]
        assert len(rates) >= 2
        assert rates[1] == pytest.approx(4 * rates[0])
        assert all(level["tokens_per_s"]["value"] > 0 for level in levels)


def test_limits_on_capacity_goodput_and_cost_under_load_are_judged(served):
    (judged,) = [row["judgement"] for row in figures_of(served.stdout)["rows"] if row["judgement"]]
    assert judged["verdict"] == "ACCEPT", judged["sentence"]
    checks = {check["figure"]: check for check in judged["checks"]}
    assert set(checks) == set(LIMITS)
    assert checks["cost_per_million_tokens_under_load"]["unit"] == "EUR per 10⁶ tokens"
    cost, tokens = (
        checks[name]["measured"] for name in ("cost_per_million_tokens_under_load", "capacity_tokens_per_s")
    )
    assert cost == pytest.approx(0.5 / 3600 / tokens * 1e6)
    assert "registered  served version 1: models:/served@candidate" in served.stdout


def test_the_curves_are_on_the_page(served):
    page = page_of(served.stdout)
    under_load = page.partition("<h2>Under load</h2>")[2].partition("<h2>")[0]
    assert under_load.count("<svg") == 2  # latency by rate, tokens by users
    assert "int8/onnxruntime: 2.00 users at a time" in under_load
    assert "goodput is the largest rate at which 50 % are" in under_load


@pytest.fixture(scope="module")
def by_name(served, home) -> subprocess.CompletedProcess[str]:
    """The registered version beside the model that it was made from, with a limit that nothing keeps."""
    source = yaml.safe_load((home / "recipe.yaml").read_text())["source"]
    arguments = ["--recipe", str(home / "recipe.yaml"), "--limit", "capacity_requests_per_s.min=1000000"]
    return slimline("validate", "models:/served@candidate", "--against", source, *arguments, home=home)


def test_a_registered_version_is_validated_by_its_name(by_name):
    assert by_name.returncode == 3, by_name.stderr
    found = figures_of(by_name.stdout)
    (row,) = found["rows"]
    assert row["steps"] == "models:/served@candidate"
    assert found["original_engine"] == "PyTorch float32"
    verdicts = {check["figure"]: check["verdict"] for check in row["judgement"]["checks"]}
    assert verdicts == {**dict.fromkeys(LIMITS, "ACCEPT"), "capacity_requests_per_s": "REJECT"}


def test_a_registered_version_is_what_another_is_validated_against(by_name, home):
    arguments = ["--set", "validation.speed=null", "--limit", "perplexity.max_degradation_percent=1"]
    arguments += ["--set", "data.num_evaluation_windows=8", "--set", "data.evaluation_window=64"]
    for role in ("training", "calibration", "evaluation"):
        arguments += ["--set", f"data.{role}={json.dumps(STDLIB)}"]
    arguments += ["--set", "data.num_training_tokens=0", "--set", "data.sequence_length=64"]
    same = slimline("validate", "models:/served/1", "--against", "models:/served@candidate", *arguments, home=home)
    assert same.returncode == 0, same.stderr
    found = figures_of(same.stdout)
    assert found["original_engine"] == "ONNX Runtime float32"
    assert found["rows"][0]["quality"]["perplexity_increase_percent"]["value"] == 0


def test_a_version_that_is_not_registered_is_named_with_those_that_are(served, home):
    said = slimline("validate", "models:/served@production", "--against", "models:/served@candidate", home=home)
    assert said.returncode == 2
    assert "There is no models:/served@production" in said.stderr
    assert "Registered: served." in said.stderr
