"""Promotions and rollbacks that are killed at a step, and that many do at once."""

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.settings import environment
from tests.flows.release_processes import PROMOTION, RETURN, ROLLBACK
from tests.flows.released import ROOT, compiled, several
from tests.homes import home_at

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with home_at(tmp_path_factory.mktemp("home")) as where:
        yield where


@pytest.fixture(scope="module")
def versions(home: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], None]:
    """Registers so many versions of a model."""
    return several(compiled(tiny_checkpoint, tmp_path_factory.mktemp("engine")))


FEW = ("move", "smoke_test", "tell")
"""All of them, and those of rollbacks: `make test-real`."""


def processes(home: Path, *arguments: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.flows.release_processes", *arguments],
        cwd=ROOT,
        env=environment(SLIMLINE_HOME=str(home), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def killed(what: str, steps: tuple[str, ...], versions: Callable[[str, int], None], home: Path) -> list[dict]:
    """What was found of a promotion or rollback per step at which it was killed, each of a model of its own."""
    model = f"{what}-{len(steps)}"
    for index in range(len(steps)):
        versions(f"{model}-{index}", 2)
    found = processes(home, what, model, *steps)
    assert [each["step"] for each in found] == list(steps)
    return found


def check_killed(found: dict, steps: tuple[str, ...], old: str, new: str, what: str) -> None:
    """The old or the new one serves, and running it again completes it, once."""
    step, then, last = found["step"], found["then"], found["at_the_end"]
    assert found["ended"] == {"signal": signal.SIGKILL}, found
    moved = steps.index(step) > steps.index("move")
    assert (then["champion"], then["answers"]) == (new if moved else old, True), found
    assert (last["champion"], last["answers"]) == (new, True), found
    assert Counter(map(tuple, last["ledger"]))[what, new] == 1, found


@pytest.mark.slow
@pytest.mark.parametrize("steps", [FEW, pytest.param(PROMOTION, marks=pytest.mark.real)], ids=["few", "all"])
def test_a_promotion_that_is_killed_at_a_step_leaves_a_champion_and_is_completed(steps, versions, home):
    for each in killed("promotion", steps, versions, home):
        check_killed(each, PROMOTION, "1", "2", "promoted")
        assert each["again"] == {"value": "promoted"}, each
        assert each["at_the_end"]["previous"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("steps", [FEW[1:2], pytest.param(ROLLBACK, marks=pytest.mark.real)], ids=["few", "all"])
def test_a_rollback_that_is_killed_at_a_step_leaves_a_champion_and_is_completed(steps, versions, home):
    for each in killed("rollback", steps, versions, home):
        check_killed(each, ROLLBACK, "2", "1", "rolled back")
        if each["step"] == "tell_registry":  # it was done, but for what MLflow's page says
            assert "has no earlier champion than version 1" in each["again"]["error"]
        else:
            assert each["again"] == {"value": "1"}, each


@pytest.mark.real
def test_a_version_without_an_answer_is_taken_back_also_when_that_is_killed(versions, home):
    for index in range(len(RETURN)):
        versions(f"return-{index}", 2)
    for found in processes(home, "promotion", "return", *RETURN):
        assert found["ended"] == {"signal": signal.SIGKILL}, found
        assert found["then"]["champion"] == ("2" if found["step"] == "go_back" else "1"), found
        assert "It does not answer" in found["again"]["error"] or "is done" in found["again"]["error"], found
        assert found["at_the_end"]["champion"] == "1", found
        assert ["failed", "2"] in found["at_the_end"]["ledger"], found


def check_at_once(found: dict, count: int) -> None:
    ended = [each.get("value") or each["error"] for each in found["ended"]]
    assert ended.count("promoted") == 1, ended
    refused = [each for each in ended if "was to replace nothing; the champion is version" in each]
    assert len(refused) == count - 1, ended
    ledger = Counter(what for what, _ in found["at_the_end"]["ledger"])
    assert ledger == {"requested": count, "approved": count, "started": 1, "promoted": 1, "refused": count - 1}
    (winner,) = (version for what, version in found["at_the_end"]["ledger"] if what == "promoted")
    assert (found["at_the_end"]["champion"], found["at_the_end"]["answers"]) == (winner, True)


@pytest.mark.slow
def test_of_promotions_at_once_one_wins_and_the_others_are_refused(versions, home):
    versions("eight", 8)
    check_at_once(processes(home, "at_once", "eight", "8")[0], 8)


@pytest.mark.real
def test_of_32_promotions_at_once_one_wins_and_the_others_are_refused(versions, home):
    versions("many", 32)
    check_at_once(processes(home, "at_once", "many", "32")[0], 32)
