"""A student trained by two nodes, as two processes on loopback that share a home, from a recipe."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from flows.recipe import RecipeError, parse
from tasks.calibration.checkpoints import load_model
from tasks.distillation import Distillation
from tasks.distillation.training import distill
from tests.flows.command_line import ROOT, slimline
from tests.flows.recipes import data, short
from tests.infra.asking import unused_port

TRAINING = {"max_steps": 5, "batch_size": 4, "gradient_accumulation_steps": 1}
DISTILLATION = {"student": {"layers": 2}, "training": TRAINING}


def recipe(source: Path, **training: object) -> dict:
    return short(
        "nodes",
        source,
        data=data(training_tokens=4_000),
        candidates={"student": {"distillation": DISTILLATION}},
        execution={"training": training},
    )


def artifact(home: Path, layers: int) -> Path:
    """The plain checkpoint of so many layers."""
    configs = home.glob("artifacts/*/files/config.json")
    (found,) = [
        path.parent
        for path in configs
        if (path.parent / "model.safetensors").exists() and json.loads(path.read_text())["num_hidden_layers"] == layers
    ]
    return found


@pytest.mark.slow
def test_two_nodes_train_the_student_that_one_would(tiny_checkpoint, tmp_path):
    home, file = tmp_path / "home", tmp_path / "recipe.yaml"
    meeting = {"nodes": 2, "rendezvous": f"127.0.0.1:{unused_port()}"}
    file.write_text(yaml.safe_dump(recipe(tiny_checkpoint, **meeting)))
    home.mkdir()
    with (tmp_path / "other.txt").open("wb") as log:
        other = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "join", str(file)],
            cwd=ROOT,
            env={**os.environ, "SLIMLINE_HOME": str(home), "SLIMLINE_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        said = slimline("run", str(file), home=home, SLIMLINE_THREADS="1")
        assert said.returncode == 0, said.stderr
        assert other.poll() is None  # it waits for the next training
    finally:
        other.send_signal(signal.SIGINT)
    assert other.wait(60) == 130, (tmp_path / "other.txt").read_text()
    (prepared,) = [path.parent for path in home.glob("artifacts/*/files/data.json")]
    work, alone = tmp_path / "work", tmp_path / "alone"
    alone.mkdir()
    options = Distillation.model_validate(DISTILLATION)
    distill(teacher=artifact(home, 4), data=prepared, options=options, seed=0, work_dir=work, out=alone)
    expected = load_model(alone).state_dict()
    for name, weight in load_model(artifact(home, 2)).state_dict().items():  # sums in another order
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


def test_a_step_that_cannot_be_shared_and_nodes_that_cannot_meet_are_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(RecipeError, match=r"batch_size 4\. Make one of them a multiple of 3"):
        parse(recipe(tiny_checkpoint, processes_per_node=3))
    with pytest.raises(RecipeError, match="got 2 nodes and rendezvous None"):
        parse(recipe(tiny_checkpoint, nodes=2))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tiny_checkpoint)))
    said = slimline("join", str(tmp_path / "recipe.yaml"), home=tmp_path)
    assert said.returncode == 2
    assert "--rank must be below execution.training.nodes of the recipe, which is 1; got 1." in said.stderr
