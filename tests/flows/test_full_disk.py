"""A disk that really fills up in the middle of a flow, and a home that nobody may write to."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows import reporting
from infra.artifacts import new_directory, publish
from tests.flows.command_line import ROOT
from tests.flows.recipes import ONNXRUNTIME, data
from tests.homes import home_at


@pytest.fixture
def recipe(wide_checkpoint, tmp_path) -> Path:
    content = {
        "name": "wide_cpu",
        "source": str(wide_checkpoint),
        "data": data(windows=4),
        "candidates": {"same": {}},
        "engines": [ONNXRUNTIME],
        "validation": {"speed": None, "limits": {"size_mib": {"max": 100}}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
def test_a_flow_whose_disk_fills_up_ends_with_what_is_free_and_leaves_nothing_half_written(
    recipe, tmp_path, small_disk
):
    """The home takes the imported checkpoint of 19 MB, and not a second one: the engine's weights."""
    home = tmp_path / "home"
    home.mkdir()
    slimline = f"{shlex.quote(sys.executable)} -m flows.cli"
    steps = [
        f"{slimline} run {recipe}",
        "echo exit code $?",
        "echo left: $(ls $SLIMLINE_HOME/scratch) $(ls $SLIMLINE_HOME/work $SLIMLINE_HOME/reports 2> /dev/null)",
        "for file in $SLIMLINE_HOME/artifacts/*/manifest.json; do test -s $file && echo whole; done",
        f"{slimline} check {recipe} 2>&1 | grep cached",
    ]
    command = ("sh", "-c", "; ".join(steps))
    ran = small_disk(home, "40m", *command, SLIMLINE_HOME=str(home), COLUMNS="200", PYTHONPATH=str(ROOT))
    said = ran.stdout.splitlines()
    assert "exit code 1" in said, ran.stderr
    # Compiling, as a rule; on a slow machine the databases grow, and a stage before it finds no room.
    ended = re.search(r"error original\S* ([a-z-]+) could not be finished\. The disk is full", ran.stderr)
    assert ended, ran.stderr
    assert f"MiB are free at {home}" in ran.stderr
    assert "REJECT" not in ran.stdout
    assert "Traceback" not in ran.stderr
    assert "left:" in said
    assert "whole" in said
    cached = [line.split("  ")[0] for line in said if line.rstrip().endswith("cached")]
    assert ended[1] == "import-checkpoint" or "original import-checkpoint" in cached, ran.stderr


def test_a_home_that_may_not_be_written_is_named(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "home").mkdir(mode=0o500)
    command = [sys.executable, "-m", "flows.cli", "run", str(recipe)]
    if os.geteuid() == 0:  # root may write anywhere; without its capabilities it is as others are
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    environment = {**os.environ, "SLIMLINE_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1, ran.stderr
    assert f"error {tmp_path / 'home'} cannot be used: Permission denied" in ran.stderr
    assert "Let this user write there, or set SLIMLINE_HOME" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.fixture
def home(tmp_path):
    with home_at(tmp_path / "home") as where:
        yield where


def no_room(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_an_artifact_that_cannot_be_published_is_not_left_behind(home, monkeypatch):
    out = new_directory()
    (out / "weights").write_bytes(b"12345")
    monkeypatch.setattr(Path, "write_bytes", no_room)
    with pytest.raises(OSError, match="No space left"):
        publish(out)
    assert not list((home / "scratch").iterdir())
    assert not (home / "artifacts").exists()


def test_a_page_that_cannot_be_written_whole_does_not_appear(home, monkeypatch):
    def render(data, out: Path) -> Path:
        out.write_text("<html>half of")
        no_room()

    monkeypatch.setattr(reporting, "render", render)
    with pytest.raises(OSError, match="No space left"):
        reporting.write_page(None, "some-run")
    assert not list((home / "reports").iterdir())
