"""What orchestration costs: a flow's wall time without the time inside its stages.

    python tests/benchmarks/orchestration.py              # everything, about ten minutes
    python tests/benchmarks/orchestration.py --only linear

* `cold`: a run of the tiny model from an empty home; `cached`: the same again, everything from the cache. Both through
  the command line; what is spent on imports and on Prefect's server is taken from the run's own clock.
* `linear`: one flow of 50, 200 and 800 stages that do nothing but write a file: seconds per stage.

One line of JSON per measurement, with the machine and versions in the last.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.conftest import write_tiny_checkpoint  # noqa: E402
from tests.flows.recipes import ONNXRUNTIME, RTN_8, data  # noqa: E402

RUN = """
import json, sys, time
began = time.monotonic()
spent = {}

def lap(name, since):
    spent[name] = time.monotonic() - since
    return time.monotonic()

from flows.cli import _connect, _load
_connect()
recipe = _load(sys.argv[1], None)
from infra.services import begin_inner_server
wait_for_server = begin_inner_server()
from flows.optimize import optimize
import mlflow, mlflow.pyfunc
now = lap("imports", began)
wait_for_server()
now = lap("Prefect server, beyond the imports", now)
from infra.tracking import client
client()
now = lap("MLflow database", now)
from flows.running import Runner
called = Runner.__call__
stages = []

def timed(self, task, label="", /, **arguments):
    since = time.monotonic()
    try:
        return called(self, task, label, **arguments)
    finally:
        stages.append(time.monotonic() - since)

Runner.__call__ = timed
outcome = optimize(recipe)
now = lap("flow", now)
found = json.loads(outcome.report.with_suffix(".json").read_text())["stages"]
inside = sum(stage["elapsed_s"] for stage in found if not stage["cached"])
print(json.dumps({"spent_s": spent, "num_stages": len(found), "num_cached": sum(s["cached"] for s in found),
                  "inside_stages_s": inside, "calls_s": sum(stages)}))
"""
LINEAR = """
import json, sys, time
from pathlib import Path
from infra.settings import prepare_environment
prepare_environment()
from prefect import flow, task
from prefect.cache_policies import CacheKeyFnPolicy
from flows.running import Runner
from infra.services import start_inner_server
from infra.stage import run_stage
from infra.tracking import Parent, StageResult, flow_run
from small_stages import Done

policy = CacheKeyFnPolicy(cache_key_fn=lambda context, parameters: f"small-{parameters['number']}")

@task(cache_policy=policy, persist_result=True, result_serializer="json")
def small(number: int, *, parent: Parent, label: str = "") -> StageResult:
    return run_stage("small", "small_stages:small", parent=parent, inputs=[], params={}, result=Done, kind="test",
                     arguments={"number": number}, label=label)

@flow
def many(num_stages: int) -> tuple[float, float]:
    with flow_run("many", recipe_json="{}", tags={}) as parent:
        run = Runner(parent)
        since = time.monotonic()
        inside = sum(run(small, str(number), number=number).elapsed_s for number in range(num_stages))
        return time.monotonic() - since, inside

if __name__ == "__main__":
    start_inner_server()
    for how in ("cold", "cached"):
        elapsed_s, inside_s = many(int(sys.argv[1]))
        print(json.dumps({"linear": how, "num_stages": int(sys.argv[1]), "elapsed_s": elapsed_s,
                          "ms_per_stage": 1000 * elapsed_s / int(sys.argv[1]),
                          "ms_per_stage_outside": 1000 * (elapsed_s - inside_s * (how == "cold")) / int(sys.argv[1])}))
"""
SMALL = """
from pathlib import Path
from pydantic import BaseModel

class Done(BaseModel):
    number: int

def small(*, number: int, out: Path) -> Done:
    (out / "number").write_text(str(number))
    return Done(number=number)
"""


def recipe(source: Path) -> dict:
    """The shape of the default recipe: distillation, pruning, quantization, two engines, speed."""
    training = {"max_steps": 20, "batch_size": 4, "gradient_accumulation_steps": 1}
    return {
        "name": "orchestration",
        "source": str(source),
        "data": data(training_tokens=20_000, calibration=16, windows=12),
        "candidates": {
            "int8": {"quantization": RTN_8},
            "int4": {"quantization": {"method": "gptq"}, "engines": [ONNXRUNTIME]},
            "student": {
                "distillation": {"student": {"layers": 2}, "training": training},
                "quantization": RTN_8,
                "engines": [ONNXRUNTIME],
            },
        },
        "engines": [ONNXRUNTIME, {"engine": "openvino", "precision": "float32"}],
        "validation": {
            "speed": {"prompt_tokens": 16, "new_tokens": 8, "batch_sizes": [1], "num_blocks": 6},
            "limits": {"perplexity": {"max_degradation_percent": 1000}},
            "if_inconclusive": {"max_rounds": 0},
        },
        "register_as": "orchestration",
    }


def measure(code: str, argument: str, home: Path) -> list[dict]:
    """What a process that runs `code` says, with its wall time."""
    since = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, argument],
        cwd=ROOT,
        env={**os.environ, "SLIMLINE_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{home}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    wall_s = time.monotonic() - since
    return [json.loads(line) | {"wall_s": wall_s} for line in done.stdout.splitlines() if line.startswith("{")]


def say(**figures: object) -> None:
    """A line of JSON."""
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}
    sys.stdout.write(json.dumps(rounded) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["run", "linear"])
    parser.add_argument("--stages", type=int, nargs="+", default=[50, 200, 800])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slimline-orchestration-") as folder:
        if options.only != "linear":
            home = Path(folder) / "run"
            home.mkdir()
            source = Path(folder) / "tiny"
            write_tiny_checkpoint(source)
            (home / "recipe.yaml").write_text(yaml.safe_dump(recipe(source)))
            for how in ("cold", "cached"):
                (found,) = measure(RUN, str(home / "recipe.yaml"), home)
                outside_s = found["wall_s"] - found["inside_stages_s"]
                spent_s = {name: round(value, 2) for name, value in found.pop("spent_s").items()}
                per_stage_s = (found["calls_s"] - found["inside_stages_s"]) / found["num_stages"]
                say(run=how, **found, outside_stages_s=outside_s, per_stage_outside_s=per_stage_s, spent_s=spent_s)
        if options.only != "run":
            for num_stages in options.stages:
                home = Path(folder) / f"linear-{num_stages}"
                home.mkdir()
                (home / "small_stages.py").write_text(SMALL)
                for found in measure(LINEAR, str(num_stages), home):
                    say(**found)
    about = {name: version(name) for name in ("prefect", "mlflow", "torch")}
    say(processor=platform.processor() or platform.machine(), cores=len(os.sched_getaffinity(0)), **about)


if __name__ == "__main__":
    main()
