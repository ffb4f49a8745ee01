"""Run a stage function in a process of its own: its memory goes back, its crash is one error, its end is certain.

Native libraries crash, hang and run out of memory; in the flow's process that would end every later stage too. Stages
are forked from a server process that has imported torch and transformers (5 s of CPU each time otherwise) and done
nothing with them: a fork after torch has used its threads hangs. A stage leads a process group of its own and ends
with the flow's process even when that is killed, by watching a pipe that only the flow holds open.
"""

import errno
import importlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import BaseModel, TypeAdapter, ValidationError, validate_call
from pydantic_core import to_jsonable_python

from infra.failures import InfrastructureError, explain, is_full

Progress = Callable[[int, int, dict[str, float]], None]
T = TypeVar("T")
OOM_COUNTERS = tuple(
    map(Path, ("/proc/vmstat", "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"))
)
NO_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory", "bad_alloc", "bad allocation")
"""What libraries say that have no MemoryError."""
PRELOADED = ["torch", "transformers", "transformers.models.llama.modeling_llama", "transformers.models.auto"]


class StageError(Exception):
    """A stage ended without a result."""


class StageFailed(StageError):
    """A stage said what is wrong, in a sentence for the user."""


class StageCrashed(StageError):
    """A stage died of something it did not foresee; the log holds the rest."""


class NativeCrash(StageCrashed):
    """A signal ended a stage: a fault in native code, or somebody's SIGKILL."""


class TookTooLong(StageCrashed):
    """A stage was ended at its time limit."""


class OutOfMemory(StageCrashed):
    """There was not memory enough for a stage; `left_mib` is what others left it."""

    def __init__(self, message: str, left_mib: float) -> None:
        super().__init__(message)
        self.left_mib = left_mib

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.left_mib)


class Finished(BaseModel, frozen=True):
    """How the child ended: its result as JSON, and what it cost."""

    value: Any
    elapsed_s: float
    peak_memory_mib: float


def run_isolated(
    function: str,
    arguments: dict[str, Any],
    *,
    result: type[T],
    log_path: Path,
    on_progress: Progress | None = None,
    timeout_s: float | None = None,
) -> tuple[T, Finished]:
    """The result of calling `function` ("package.module:name") with keyword `arguments` in a child process.

    Args:
        function: a stage function; pydantic validates its arguments against its annotations.
        arguments: anything pydantic can turn into JSON.
        result: what it returns; a pydantic model or a type pydantic knows.
        log_path: receives everything the child prints.
        on_progress: called in this process for every progress report of the child.
        timeout_s: wall-clock limit in seconds; None waits for ever.

    The number of threads is that of the flow's environment (OMP_NUM_THREADS) when its first stage starts.

    Raises:
        StageFailed: the function raised ValueError or OSError; the message is its own.
        NativeCrash: it died of a signal; names it, and the log.
        OutOfMemory: the kernel ended it for lack of memory, or it was refused some.
        TookTooLong: the limit.
        StageCrashed: any other exception.
        InfrastructureError: the disk is full or cannot be written, however the function ended for that.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    started_at = time.monotonic()
    left_mib, killed_for_memory = _available_mib(), _killed_for_memory()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    messages, answers = context.Pipe(duplex=False)
    watched, lifeline = context.Pipe(duplex=False)
    request = json.dumps(to_jsonable_python(arguments))
    child = context.Process(target=_serve, args=(function, request, answers, watched, str(log_path)), daemon=False)
    timer = threading.Timer(timeout_s, _kill_group, [child]) if timeout_s else None
    outcome: dict[str, Any] | None = None
    try:
        child.start()
        answers.close()
        watched.close()
        if timer:
            timer.daemon = True
            timer.start()
        while True:
            try:
                message = json.loads(messages.recv_bytes())
            except EOFError:
                break
            if "progress" not in message:
                outcome = message
                break
            if on_progress:
                on_progress(*message["progress"])
        child.join()
    finally:
        if timer:
            timer.cancel()
        if child.pid:
            _kill_group(child)
            child.join()
        lifeline.close()
        messages.close()
    elapsed_s = time.monotonic() - started_at
    near = Path(arguments.get("out", log_path.parent))
    if outcome is None:
        if timeout_s and elapsed_s >= timeout_s:
            raise TookTooLong(f"{function} was ended after its limit of {timeout_s:.0f} s. Its log: {log_path}.")
        left_mib = min(left_mib, _available_mib())  # the stage has given its own back
        for_memory = killed_for_memory is None or killed_for_memory != _killed_for_memory()
        raise _death(function, child.exitcode or 0, log_path, near, for_memory, left_mib)
    if "surroundings" in outcome:
        raise InfrastructureError(outcome["surroundings"])
    if "failed" in outcome:
        raise StageFailed(outcome["failed"])
    if "memory" in outcome:
        left_mib = min(left_mib, _available_mib())
        raise OutOfMemory(_out_of_memory(f"was refused memory: {outcome['memory']}", function, log_path), left_mib)
    if "crashed" in outcome:
        raise StageCrashed(f"{function} failed: {outcome['crashed']}. The whole story is in {log_path}.")
    value = TypeAdapter(result).validate_python(outcome["result"])
    return value, Finished(value=outcome["result"], elapsed_s=elapsed_s, peak_memory_mib=outcome["peak_memory_mib"])


def _kill_group(child: Any) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or has not yet begun to lead a group
        child.kill()


def _death(
    function: str, returncode: int, log_path: Path, near: Path, for_memory: bool, left_mib: float
) -> StageCrashed | InfrastructureError:
    """Why a stage left no result."""
    if is_full(near):  # mapped memory that has no room on its disk ends a process with SIGBUS
        error = OSError(f"{function} died, and there is no room on its disk")
        return InfrastructureError(explain(error, near, servers=False))
    if returncode == -signal.SIGKILL and for_memory:
        said = _out_of_memory("was killed (SIGKILL), most likely for lack of memory", function, log_path)
        return OutOfMemory(said, left_mib)
    if returncode >= 0:
        return StageCrashed(f"{function} died with exit code {returncode} and left no result. Its log: {log_path}.")
    how = signal.Signals(-returncode).name
    by = ", which the kernel did not send for lack of memory," if returncode == -signal.SIGKILL else ""
    return NativeCrash(f"{function} died with {how}{by} and left no result. Its log: {log_path}.")


def _out_of_memory(how: str, function: str, log_path: Path) -> str:
    return (
        f"{function} {how}. Free some, use a smaller batch or sequence length, or a smaller model. Its log: {log_path}."
    )


def _available_mib() -> float:
    return float(psutil.virtual_memory().available) / 2**20


def _killed_for_memory() -> int | None:
    """How many processes the kernel has killed for lack of memory; None where it does not say."""
    lines = [line.split() for file in OOM_COUNTERS if file.exists() for line in file.read_text().splitlines()]
    counts = [int(line[1]) for line in lines if line[0] == "oom_kill"]
    return sum(counts) if counts else None


def _end_with_flow(watched: Connection) -> None:
    """End this process group when the flow's process goes, however it goes: then the pipe it holds open ends."""

    def watch() -> None:
        try:
            watched.recv_bytes()
        except (EOFError, OSError):
            os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def peak_memory_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _serve(function: str, request: str, answers: Connection, watched: Connection, log_path: str) -> None:
    os.setsid()
    _end_with_flow(watched)
    lock = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with lock:
            answers.send_bytes(json.dumps(message).encode())

    near = Path(log_path)
    try:
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        arguments = json.loads(request)
        near = Path(arguments.get("out", near))
        module, _, name = function.partition(":")
        call = getattr(importlib.import_module(module), name)
        if "report" in inspect.signature(call).parameters:
            arguments["report"] = lambda step, total, metrics: send({"progress": [step, total, metrics]})
        value = validate_call(call)(**arguments)
        send({"result": to_jsonable_python(value), "peak_memory_mib": peak_memory_mib()})
    except Exception as error:  # noqa: BLE001 it is raised again in the flow
        surroundings = explain(error, near, servers=False)  # first: saying it may need the disk too
        if surroundings:
            send({"surroundings": surroundings})
        elif _lacks_memory(error):
            send({"memory": f"{type(error).__name__}: {error}"})
        elif isinstance(error, ValidationError | ValueError | OSError):
            send({"failed": _sentence(error)})
        else:
            send({"crashed": f"{type(error).__name__}: {error}"})
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _lacks_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return f"{os.strerror(error.errno)}: {error.filename}"
    return str(error)
