"""How long a promotion and a rollback of a bundle of about 100 MB take, beside the smoke test.

    python tests/benchmarks/release.py              # --mb 100 --rounds 3; a home, no servers
    SLIMLINE_TRACKING_URI=... python tests/benchmarks/release.py    # MLflow elsewhere, likewise SLIMLINE_RELEASE_STORE

The engine is that of a small random model, with a file beside it that makes up the size. One line of JSON per promotion
or rollback, from the call until the version answers as champion, by step; the last line has the medians, the machine
and the versions.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
STEPS = ("copy", "make_whole", "start", "move", "smoke_test", "keep_previous", "tell")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slimline-release-") as folder:
        os.environ.setdefault("SLIMLINE_HOME", str(Path(folder) / "home"))
        from infra.settings import prepare_environment

        prepare_environment()
        measure(Path(folder), options.mb, options.rounds)


def measure(folder: Path, mb: float, rounds: int) -> None:
    """Promote `rounds` versions after the first and go back from each."""
    from flows import releasing
    from flows.approving import answer, ask
    from infra.hardware import hardware, versions
    from infra.tracking import start_flow
    from tests.conftest import write_tiny_checkpoint
    from tests.flows.released import compiled, register

    (folder / "checkpoint").mkdir()
    write_tiny_checkpoint(folder / "checkpoint")
    bundle = compiled(folder / "checkpoint", folder)
    parent = start_flow("release", recipe_json='{"seed": 0}', tags={})
    spent: dict[str, float] = {}
    for step in STEPS:
        setattr(releasing, step, timed(getattr(releasing, step), step, spent))
    found: dict[str, list[dict[str, float]]] = {"promote": [], "rollback": []}

    def take(what: str, call: Callable[[], Any]) -> None:
        spent.clear()
        started_at = time.monotonic()
        call()
        total_s = time.monotonic() - started_at
        beside_s = total_s - spent["smoke_test"]
        found[what].append({"total_s": total_s, "beside_the_smoke_test_s": beside_s, **spent})
        sys.stdout.write(json.dumps({what: {name: round(value, 3) for name, value in found[what][-1].items()}}) + "\n")
        sys.stdout.flush()

    for number in range(rounds + 1):
        version = register("release", bundle, "x" * (number + 1), parent, int(mb * 1e6), with_code=True).version
        options = {"two_person": False, "approval_hours": 1.0, "revalidate": "if_hardware_differs"}
        asked_at = time.monotonic()
        asked = ask("release", version, who="ada", why="measured", **options)
        answer(asked, who="ben", why="measured", approve=True)
        asked_s = time.monotonic() - asked_at
        take("promote", lambda asked=asked: releasing.carry_out(asked))
        found["promote"][-1]["asked_s"] = asked_s
        if number:
            take("rollback", lambda: releasing.roll_back("release", who="ada", why="measured"))
    medians = {
        what: {name: round(statistics.median(each[name] for each in taken), 2) for name in taken[0]}
        for what, taken in found.items()
    }
    about = {"mb": mb, "rounds": rounds, "hardware": hardware(), "versions": versions("mlflow", "torch", "onnxruntime")}
    sys.stdout.write(json.dumps({"medians": medians, **about}) + "\n")


def timed(step: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """`step`, whose time is added to `spent`."""

    def call(*arguments: Any, **options: Any) -> Any:
        started_at = time.monotonic()
        try:
            return step(*arguments, **options)
        finally:
            spent[name] = spent.get(name, 0.0) + time.monotonic() - started_at

    return call


if __name__ == "__main__":
    main()
