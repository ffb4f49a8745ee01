"""A few of the kills that `make bench-faults` does by the hundred; and two runs of one recipe at once."""

import subprocess
import sys
from collections import Counter

import pytest
import yaml

from tests.flows.command_line import ROOT
from tests.flows.kills import Lane, Stack
from tests.flows.recipes import short


@pytest.mark.parametrize("kind", [Lane, pytest.param(Stack, marks=[pytest.mark.real, pytest.mark.servers])])
def test_runs_that_are_killed_complete_and_leave_nothing_amiss(kind, tiny_checkpoint, tmp_path):
    found = kind(tmp_path / "home", tiny_checkpoint, seed=1).disturb(kills=3)
    assert found.kills.total() == 3
    assert found.runs >= 1
    assert found.stages > 0
    assert {name: faults for name, faults in found.faults().items() if faults} == {}, found.said()


def test_two_runs_of_one_recipe_at_once_do_every_stage_once(tiny_checkpoint, tmp_path):
    lane = Lane(tmp_path / "home", tiny_checkpoint, seed=2)
    file = lane.home / "recipe.yaml"
    file.write_text(yaml.safe_dump(short("kills", tiny_checkpoint, seed=5)))
    command = [sys.executable, "-m", "flows.cli", "run", str(file)]
    both = [
        subprocess.Popen(command, cwd=ROOT, env=lane.environment(), stderr=subprocess.PIPE, stdout=-1, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=1800)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    ended: Counter[tuple[str, bool]] = Counter()
    for line in "".join(said).splitlines():
        if line.strip().startswith("done"):
            title = line.split("  done  ", 1)[1].rsplit("  ", 1)[0].strip()
            ended[title, line.endswith("cached")] += 1
    assert len(ended) >= 14
    assert set(ended.values()) == {1}, ended  # one of the two ran it, the other found it
    lane.look()
    assert {name: faults for name, faults in lane.found.faults().items() if faults} == {}
