"""A stage function in several processes that work on one thing, by torchrun: on one machine, or on several.

The stage's own process starts torchrun, and in it the first process, which reports and answers. Other machines take
part by `slimline join RECIPE`. All share the home, where they find the request, its inputs and the work directory.
"""

import ctypes
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, model_validator, validate_call
from pydantic_core import to_jsonable_python

from infra.settings import environment, outer, settings

ROOT = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1
Report = Callable[[int, int, dict[str, float]], None]


class Torchrun(BaseModel, frozen=True, extra="forbid"):
    """How many processes train together. Steps stay those of the recipe: each process does its share of a batch."""

    processes_per_node: int = Field(1, ge=1, description="Of each machine: one per GPU.")
    nodes: int = Field(1, ge=1, description="Machines that share the home; all but the run's: slimline join RECIPE.")
    rendezvous: str | None = Field(
        None, pattern=r"^[^:/\s]+:\d{1,5}$", description="HOST:PORT of the run's machine, for several nodes."
    )

    @model_validator(mode="after")
    def _nodes_find_each_other(self) -> Self:
        if (self.nodes > 1) != (self.rendezvous is not None):
            raise ValueError(
                f"`rendezvous` says where several nodes meet; got {self.nodes} nodes and rendezvous "
                f"{self.rendezvous}. Give both, or neither."
            )
        return self

    @property
    def processes(self) -> int:
        """Of all nodes together."""
        return self.processes_per_node * self.nodes

    @property
    def request(self) -> Path:
        """Where the first process leaves what is to be done."""
        name = self.rendezvous.replace(":", "-") if self.rendezvous else f"process-{os.getpid()}"
        return settings().home / "torchrun" / f"{name}.json"


def command(how: Torchrun, rank: int, request: Path) -> tuple[list[str], dict[str, str]]:
    """What the node of this rank runs, and its environment."""
    place = ["--standalone"]
    if how.rendezvous:
        host, _, port = how.rendezvous.partition(":")
        place = ["--nnodes", str(how.nodes), "--node-rank", str(rank), "--master-addr", host, "--master-port", port]
    words = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node", str(how.processes_per_node)]
    threads = str(max(1, settings().num_threads // how.processes_per_node))
    variables = environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    return [*words, "-m", "infra.torchrun", str(request)], variables


def run(*, function: str, arguments: dict[str, Any], how: Torchrun, out: Path, work_dir: Path, report: Report) -> Any:
    """The result of calling a stage function in all processes at once, as JSON.

    Args:
        function: "package.module:name"; its first process writes `out` and decides the result.
        arguments: of it, besides the following.
        how: how many processes, and where they meet.
        out: empty directory.
        work_dir: for what survives a kill.
        report: is told what the first process reports.

    Raises:
        ValueError: the function's own.
        RuntimeError: a process died, or the other nodes did not come.
    """
    request = how.request
    request.parent.mkdir(parents=True, exist_ok=True)
    answer = request.with_suffix(".answer")
    answer.unlink(missing_ok=True)
    given = {**arguments, "out": str(out), "work_dir": str(work_dir)}
    request.write_text(json.dumps({"function": function, "arguments": given, "answer": str(answer)}))
    words, variables = command(how, 0, request)
    try:
        with subprocess.Popen(words, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as torchrun:
            assert torchrun.stdout
            for line in torchrun.stdout:
                if line.startswith('{"progress"'):
                    report(*json.loads(line)["progress"])
                else:
                    sys.stdout.write(line)
        said = json.loads(answer.read_bytes()) if answer.exists() else {}
    finally:
        request.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)
    if "failed" in said:
        raise ValueError(said["failed"])
    if torchrun.returncode or "result" not in said:
        raise RuntimeError(f"torchrun of {how.processes} processes ended with exit code {torchrun.returncode}")
    return said["result"]


def join(how: Torchrun, rank: int) -> None:
    """Take part in one call as the node of this rank; returns when it is over, or failed, or nobody came."""
    words, variables = command(how, rank, how.request)
    subprocess.run(words, cwd=ROOT, env=variables, check=False)


def main() -> None:
    """What every process of torchrun does; it ends with torchrun, also when that is killed."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.loads(Path(sys.argv[1]).read_bytes())
    module, _, name = request["function"].partition(":")
    call = getattr(importlib.import_module(module), name)
    arguments, first = request["arguments"], outer("RANK") == "0"
    if first and "report" in inspect.signature(call).parameters:
        arguments["report"] = _report
    try:
        said = {"result": to_jsonable_python(validate_call(call)(**arguments))}
    except ValueError as error:
        said = {"failed": str(error)}
    if first:
        Path(request["answer"]).write_text(json.dumps(said))
    sys.exit("failed" in said)


def _report(step: int, total: int, metrics: dict[str, float]) -> None:
    sys.stdout.write(json.dumps({"progress": [step, total, metrics]}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
