"""The whole chain on a tiny model, through the command line, as a user runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from tests.flows.command_line import ROOT, slimline
from tests.flows.recipes import ONNXRUNTIME, data

INT8 = {"method": "rtn", "weights": {"bits": 8, "symmetric": True}, "embeddings": {"bits": 8, "symmetric": True}}
MIXED = {
    "method": "gptq",
    "weights": {"choices": [{"bits": 4, "group_size": 32}, {"bits": 8}], "bits_per_weight": 6},
}
TUNING = {"prompt_tokens": 16, "new_tokens": 8, "num_rounds": 3}
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-6f1e",
    "MLFLOW_TRACKING_USERNAME": "trainer",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-6f1e",
    "HF_TOKEN": "hf_planted6f1e",
    "PREFECT_API_AUTH_STRING": "admin:planted-prefect-6f1e",
}
"""Secrets that a run has and does not need; they are looked for in all that it leaves."""
TRAINING = {"max_steps": 6, "batch_size": 4, "gradient_accumulation_steps": 1, "save_every_steps": 2}


def recipe(tiny_checkpoint: Path, **changes) -> dict:
    return {
        "name": "tiny_cpu",
        "source": str(tiny_checkpoint),
        "data": data(training_tokens=20_000, calibration=16, windows=12),
        "candidates": {
            "int8": {"quantization": INT8},
            "mixed": {"quantization": MIXED, "engines": [ONNXRUNTIME], "tune": TUNING},
            "pruned": {
                "pruning": {"method": "width", "keep": 0.5, "round_to": 32},
                "recovery": {"training": TRAINING},
                "quantization": INT8,
                "quantization_training": {"training": {**TRAINING, "max_steps": 2}},
                "engines": [ONNXRUNTIME],
            },
        },
        "engines": [ONNXRUNTIME, {"engine": "openvino", "precision": "float32"}],
        "validation": {
            "speed": {"prompt_tokens": 16, "new_tokens": 8, "batch_sizes": [1, 2], "num_blocks": 6},
            "tasks": {"humaneval": {"task": "code_generation", "num_items": 2, "max_new_tokens": 4, "seed": 1}},
            "limits": {"perplexity": {"max_degradation_percent": 5}, "humaneval.pass_at_1": {"max_degradation": 1}},
        },
        "register_as": "tiny",
        **changes,
    }


def write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(tiny_checkpoint, home) -> subprocess.CompletedProcess[str]:
    return slimline("run", str(write(home / "recipe.yaml", recipe(tiny_checkpoint))), home=home, **PLANTED)


def test_the_chain_ends_with_a_table_a_report_and_a_registered_version(first):
    assert first.returncode == 0, first.stderr
    for column in ("perplexity", "TTFT", "TPOT", "verdict"):
        assert column.lower() in first.stdout.lower()
    assert "int8/onnxruntime" in first.stdout
    assert "pruned/onnxruntime" in first.stdout
    assert "ACCEPT" in first.stdout
    assert "models:/tiny@candidate" in first.stdout
    assert "make up" in first.stdout
    assert "Traceback" not in first.stdout + first.stderr


def test_secrets_of_the_environment_are_in_nothing_that_a_run_leaves(first, home):
    """Databases of MLflow and Prefect, logs, tags, artifacts, reports, and what was said."""
    assert "6f1e" not in first.stdout + first.stderr
    files = [path for path in home.rglob("*") if path.is_file()]
    assert {"mlflow.db", "prefect.db", "manifest.json"} <= {path.name for path in files}
    assert [str(path) for path in files if b"6f1e" in path.read_bytes()] == []


def test_programs_that_candidates_wrote_were_run_and_judged(first, home):
    items = [pd.read_parquet(path) for path in home.glob("artifacts/*/files/items.parquet")]
    asked = [table for table in items if "outcome" in table]
    assert len(asked) >= 2  # candidates that answer alike have one artifact: it is named by its content
    assert all(list(table["num_passed"]) == [0, 0] for table in asked)  # a random model writes no programs
    found = re.search(r"(/\S+\.html)", first.stdout)
    checks = [check for row in json.loads(Path(found[1]).with_suffix(".json").read_text())["rows"]
              for check in (row["judgement"] or {"checks": []})["checks"]]  # fmt: skip
    assert {check["verdict"] for check in checks if check["figure"] == "humaneval.pass_at_1"} == {"ACCEPT"}


def test_the_report_is_one_page_that_needs_nothing_else(first):
    found = re.search(r"(/\S+\.html)", first.stdout)
    assert found, first.stdout
    page = Path(found[1]).read_text()
    assert "<svg" in page
    assert "pruned" in page
    assert "recovered; W8 per channel, symmetric; scales trained after it" in page
    assert "pruned train-quantized" in page
    assert "mixed precision, 6 bits per weight, GPTQ" in page
    assert "mixed measure-sensitivity" in page
    assert "mixed/onnxruntime tune" in page
    assert re.search(r"; tuned: threads \d", page)
    assert "16 parts; model.layers." in page
    assert not re.search(r"""(src|href)=["']https?://(?!127\.0\.0\.1|localhost)""", page)


def test_a_second_run_is_served_from_the_cache(first, home):
    again = slimline("run", str(home / "recipe.yaml"), home=home)
    assert again.returncode == 0, again.stderr
    done = [line for line in again.stderr.splitlines() if line.strip().startswith("done")]
    assert len(done) > 10
    assert all(line.rstrip().endswith("cached") for line in done), again.stderr
    version = re.compile(r"tiny version (\d+)")
    assert version.search(again.stdout)[1] == version.search(first.stdout)[1]


def test_check_says_what_is_cached_and_what_a_changed_option_runs_again(first, home, tiny_checkpoint):
    plan = slimline("check", str(home / "recipe.yaml"), home=home)
    assert plan.returncode == 0, plan.stderr
    assert ", 0 to run" in plan.stderr
    changed = recipe(tiny_checkpoint)
    changed["candidates"]["pruned"]["recovery"]["training"] = {**TRAINING, "max_steps": 8}
    plan = slimline("check", str(write(home / "changed.yaml", changed)), home=home)
    lines = {line.split("  ")[0].strip(): line.split()[-1] for line in plan.stderr.splitlines() if "  " in line}
    assert lines["pruned prune"] == "cached"
    assert lines["pruned recover"] == "run"
    assert lines["pruned quantize"] == "run"
    assert lines["pruned train-quantized"] == "run"
    assert lines["int8 quantize"] == "cached"


def test_the_candidate_answers_in_a_fresh_process(first, home, tmp_path):
    code = (
        "from infra.settings import prepare_environment; prepare_environment()\n"
        "from infra.tracking import client; client()\n"
        "import mlflow\n"
        "model = mlflow.pyfunc.load_model('models:/tiny@candidate')\n"
        "import json; print(json.dumps(list(model.predict(['def f(x):', 'import'], params={'max_new_tokens': 4}))))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "SLIMLINE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    texts = json.loads(answer.stdout.splitlines()[-1])
    assert len(texts) == 2
    assert all(isinstance(text, str) and text for text in texts)


def long_training(tiny_checkpoint: Path, max_steps: int) -> dict:
    chosen = recipe(tiny_checkpoint, engines=[ONNXRUNTIME], register_as=None)
    chosen["validation"]["speed"] = None
    training = {**TRAINING, "max_steps": max_steps}
    chosen["candidates"] = {"student": {"distillation": {"student": {"layers": 2}, "training": training}}}
    return chosen


def start(path: Path, home: Path, until: str, errors: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """A run in a session of its own, as a terminal gives it, under nohup, when `until` is in a work directory."""
    home.mkdir()
    running = subprocess.Popen(
        ["nohup", sys.executable, "-m", "flows.cli", "run", str(path)],
        cwd=ROOT,
        env={**os.environ, "SLIMLINE_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not list(home.glob(f"work/*/{until}")) and time.monotonic() < deadline:
        assert running.poll() is None, "it ended too early"
        time.sleep(0.02)
    return running


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGTERM to all"])
def test_an_interrupted_run_ends_with_one_sentence_and_leaves_nothing(tiny_checkpoint, tmp_path, how):
    path = write(tmp_path / "recipe.yaml", long_training(tiny_checkpoint, max_steps=100_000))
    running = start(path, tmp_path / "home", "checkpoint-*", errors=subprocess.PIPE)
    os.killpg(running.pid, signal.SIGHUP)
    time.sleep(1)
    assert running.poll() is None, "nohup did not keep it"
    if how == "Ctrl-C":
        os.killpg(running.pid, signal.SIGINT)  # a terminal signals all that runs in its foreground
    elif how == "SIGTERM":
        os.kill(running.pid, signal.SIGTERM)
    else:  # as a service manager does; the server inside the run goes first
        os.killpg(running.pid, signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert "Finished stages are kept; the same command goes on from there." in said, said
    if how == "SIGTERM to all":
        assert running.returncode in (1, 130), said
    else:
        assert running.returncode == 130, said
        assert "Interrupted." in said
        assert "Traceback" not in said
        assert "ERROR" not in said
    deadline = time.monotonic() + 10  # Python's fork server goes when it notices that its parent went
    while (left := started_for(tmp_path / "home")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def started_for(home: Path) -> list[str]:
    """What runs with this home in its environment."""
    return [repr(p) for p in psutil.process_iter() if str(home) in environment_of(p).values()]


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def long_quantization(tiny_checkpoint: Path) -> dict:
    chosen = recipe(tiny_checkpoint, engines=[ONNXRUNTIME], register_as=None)
    chosen["data"]["num_calibration_sequences"] = 256
    chosen["validation"]["speed"] = None
    chosen["candidates"] = {"int4": {"quantization": {"method": "gptq"}}}
    return chosen


@pytest.mark.parametrize("stage", ["training", "quantization"])
def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(tiny_checkpoint, tmp_path, stage):
    killed_home, calm_home = tmp_path / "killed", tmp_path / "calm"
    calm_home.mkdir()
    training = stage == "training"
    content = long_training(tiny_checkpoint, max_steps=40) if training else long_quantization(tiny_checkpoint)
    path = write(tmp_path / "recipe.yaml", content)
    running = start(path, killed_home, "checkpoint-*" if training else "block-0.safetensors")
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    resumed = slimline("run", str(path), home=killed_home)
    assert resumed.returncode in (0, 3), resumed.stderr
    with pytest.raises(ProcessLookupError):  # what the killed run left, Prefect's server, was ended by the next
        os.killpg(running.pid, 0)
    calm = slimline("run", str(path), home=calm_home)
    assert calm.returncode in (0, 3), calm.stderr

    def models(home: Path) -> set[str]:
        return {p.parent.parent.name for p in home.glob("artifacts/*/files/model.safetensors")}

    assert models(killed_home) == models(calm_home)
    assert len(models(calm_home)) == 2  # the original and what was made of it
    assert not list(killed_home.glob("work/*"))
