"""Promotions and rollbacks in processes of their own, at once or killed at a step: what test_release_faults.py starts.

Python and MLflow are imported once; each process is a fork from there, which has talked to nobody. What it returns, or
that a signal ended it, is said as a line of JSON. Champions are loaded through MLflow and asked in such a process.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

# What talking to MLflow and loading a champion import, once instead of in every process
import mlflow.pyfunc
import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store
import onnxruntime  # noqa: F401
import prefect.runtime  # noqa: F401
import transformers.models.auto
import transformers.models.llama  # noqa: F401

import tasks.engines.compiling
import tasks.engines.text  # noqa: F401
from flows import releasing
from flows.approving import answer, ask
from infra import releases
from infra.ledger import append, entries
from infra.releases import SmokeTestFailed

PROMOTION = ("copy", "start", "move", "smoke_test", "keep_previous", "tell", "tell_registry")
ROLLBACK = ("make_whole", "start", "move", "smoke_test", "keep_previous", "tell", "tell_registry")
RETURN = ("go_back", "after the alias is back")
"""Of a promotion whose version does not answer."""
FAILS = "no answer"


def forked(function: Callable[..., Any], *arguments: Any) -> Callable[[], dict[str, Any]]:
    """Starts it; call the result for what came of it: {"value": ...}, {"error": ...} or {"signal": ...}."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = {"value": function(*arguments)}
        except BaseException as error:  # noqa: BLE001 it is told
            said = {"error": f"{type(error).__name__}: {error}"}
        os.write(write_end, json.dumps(said).encode())
        os._exit(0)
    os.close(write_end)

    def result() -> dict[str, Any]:
        with os.fdopen(read_end, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        return json.loads(said) if said else {"signal": os.WTERMSIG(status)}

    return result


def alone(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    return forked(function, *arguments)()


def asks(model: str, version: str) -> str:
    """What the champion answers; that of another version is not `version`'s."""
    served = mlflow.pyfunc.load_model(f"models:/{model}@champion")
    return str(served.predict(list(releases.PROMPTS), params={"max_new_tokens": 4}))


def request(model: str, version: str) -> int:
    asked = ask(model, version, who="ada", why="x", two_person=False, approval_hours=1, revalidate="never")
    answer(asked, who="ben", why="fine", approve=True)
    return asked.number


def promote(model: str, number: int, step: str = "") -> str:
    prepare(step)
    return releasing.carry_out(entries(model)[number - 1]).what


def roll_back(model: str, step: str = "") -> str:
    prepare(step)
    return releasing.roll_back(model, who="ada", why="x").version


def prepare(step: str) -> None:
    """From now on this process kills itself when it comes to `step`."""
    releases.smoke_test = asks

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(*_: Any) -> None:
        raise SmokeTestFailed("It does not answer.")

    if step in (*RETURN, FAILS):
        releases.smoke_test = fail
    if step == "after the alias is back":
        releasing.append = lambda *given, **more: die() if more["what"] == "failed" else append(*given, **more)
    elif step == "tell_registry":
        releases.tell_registry = die
    elif step and step != FAILS:
        assert hasattr(releasing, step)
        setattr(releasing, step, die)


def state(model: str) -> dict[str, Any]:
    """What is there now: the aliases, whether the champion answers, and the ledger, which must be whole."""
    holders = {alias: releases.holder(model, alias) for alias in ("champion", "previous")}
    answers = bool(holders["champion"]) and bool(asks(model, ""))
    return {**holders, "answers": answers, "ledger": [[entry.what, entry.version] for entry in entries(model)]}


def killed(model: str, step: str, is_rollback: bool) -> dict[str, Any]:
    """A promotion of version 2, or a rollback from it, that is killed at `step`; and what another attempt does then."""
    first = alone(request, model, "1")["value"]
    assert alone(promote, model, first) == {"value": "promoted"}
    second = alone(request, model, "2")["value"]
    if is_rollback:
        assert alone(promote, model, second) == {"value": "promoted"}
        ended = alone(roll_back, model, step)
    else:
        ended = alone(promote, model, second, step)
    then = alone(state, model)["value"]
    again = alone(roll_back, model) if is_rollback else alone(promote, model, second, FAILS if step in RETURN else "")
    return {"step": step, "ended": ended, "then": then, "again": again, "at_the_end": alone(state, model)["value"]}


def at_once(model: str, count: int) -> dict[str, Any]:
    """`count` versions are asked for and approved, and then all of them promoted at once."""
    numbers = [alone(request, model, str(version))["value"] for version in range(1, count + 1)]
    running = [forked(promote, model, number) for number in numbers]
    return {"ended": [result() for result in running], "at_the_end": alone(state, model)["value"]}


def main() -> None:
    what, model, *more = sys.argv[1:]
    if what == "at_once":
        said = [at_once(model, int(more[0]))]
    else:
        said = [killed(f"{model}-{index}", step, what == "rollback") for index, step in enumerate(more)]
    for each in said:
        sys.stdout.write(json.dumps(each) + "\n")


if __name__ == "__main__":
    main()
