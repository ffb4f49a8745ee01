"""One subject of `latency.py` in a process of its own: the parent's handle on it, and what the child does.

Commands go as JSON lines to the child's stdin, answers come as JSON lines through a pipe of their own (stdout is for
whatever libraries print). When stdin ends, the parent is gone, and the child goes at once, however the parent ended.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.engines.generation import generate_timed

if TYPE_CHECKING:
    from tasks.engines.generation import Session


class Memory(NamedTuple):
    """Resident set of a process in MiB."""

    now: float
    peak: float


class Worker:
    """A child process that holds one subject and answers one command at a time."""

    def __init__(self, name: str, *, threads: int) -> None:
        self.name = name
        self.idle_s = 0.0
        self.idle_cpu_s = 0.0
        self.max_length = 0
        self._threads = threads
        read_fd, write_fd = os.pipe()
        variables = [
            f"PYTHONPATH={os.pathsep.join(entry for entry in sys.path if entry)}",
            *(f"{library}_NUM_THREADS={threads}" for library in ("OMP", "MKL", "OPENBLAS")),
            "TOKENIZERS_PARALLELISM=false",
        ]
        self._process = subprocess.Popen(
            # env(1) adds to what is inherited, and before anything is imported
            ["env", *variables, sys.executable, "-c", f"from {__name__} import main; main({write_fd})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[write_fd],
            text=True,
            bufsize=1,
        )
        os.close(write_fd)
        self._answers = os.fdopen(read_fd, "r")

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, path: Path, *, original: bool) -> float:
        """Seconds to load an engine bundle, or the original checkpoint in PyTorch, the engine's import included."""
        answer = self._ask(load=str(path), original=original, threads=self._threads)
        self.max_length = int(answer["max_length"])
        return float(answer["load_s"])

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> list[float]:
        """Seconds from the request until each new token of the batch was chosen, see `generate_timed`."""
        times: list[float] = self._ask(input_ids=input_ids.tolist(), new_tokens=new_tokens)["chosen_after_s"]
        return times

    def memory_mib(self) -> Memory:
        """Memory of the process, that of its libraries and the interpreter included."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            raise ChildProcessError(self._obituary()) from None
        kib = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines) if key in KEYS}
        if len(kib) < len(KEYS):
            raise ChildProcessError(self._obituary())
        return Memory(now=kib["VmRSS"] / 1024, peak=kib["VmHWM"] / 1024)

    def close(self) -> None:
        """End the process and wait for it; closing again does nothing."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._answers.close()

    def _ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            ValueError: the subject refused, in its own words.
            RuntimeError: the subject failed in a way it did not foresee.
            ChildProcessError: the process died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ChildProcessError(self._obituary())
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise ValueError(f"The speed of {self.name!r} cannot be measured: {answer['refused']}")
        if "failed" in answer:
            raise RuntimeError(f"Measuring the speed of {self.name!r} failed: {answer['failed']}")
        self.idle_s += answer["idle_s"]
        self.idle_cpu_s += answer["idle_cpu_s"]
        return answer

    def _obituary(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return (
                f"The process of {self.name!r} was killed (SIGKILL) while its speed was measured, most likely for lack "
                "of memory. Free some, lower speed.max_memory_mib, or measure smaller batches."
            )
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"The process of {self.name!r} died with {how} while its speed was measured; its log says more."


KEYS = ("VmRSS", "VmHWM")


def load(path: Path, *, original: bool, threads: int) -> "Session":
    """The session of an engine bundle, or of the original checkpoint in PyTorch and float32.

    Without its tokenizer, whose library would bring PyTorch into the memory of every other engine.
    """
    if original:
        from tasks.engines.pytorch import PyTorch

        return PyTorch(precision="float32").load(path, threads=threads)
    from tasks.engines.compiling import read_manifest

    engine = read_manifest(path).engine
    if problem := engine.missing() or engine.cannot_run():
        raise ValueError(problem)
    return engine.load(path, threads=threads)


def _answer(command: dict[str, Any], session: "Session | None") -> "tuple[dict[str, Any], Session]":
    if "load" in command:
        started_at = time.perf_counter()
        session = load(Path(command["load"]), original=command["original"], threads=command["threads"])
        return {"load_s": time.perf_counter() - started_at, "max_length": session.max_length}, session
    assert session is not None, "load comes first"
    times = generate_timed(session, np.array(command["input_ids"], np.int64), command["new_tokens"])
    return {"chosen_after_s": times}, session


def main(answers_fd: int) -> None:
    """Answer commands until stdin ends; an error is an answer too."""
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            commands.put(line)
        os._exit(0)  # also out of the middle of a computation

    threading.Thread(target=listen, daemon=True).start()
    session: Session | None = None
    with os.fdopen(answers_fd, "w", buffering=1) as answers:
        while True:
            waits_since, cpu_before = time.perf_counter(), time.process_time()
            command = json.loads(commands.get())
            idle = {"idle_s": time.perf_counter() - waits_since, "idle_cpu_s": time.process_time() - cpu_before}
            try:
                answer, session = _answer(command, session)
            except (ValueError, OSError) as error:
                answer = {"refused": str(error)}
            except Exception as error:  # noqa: BLE001  the parent raises it, with the subject's name
                answer = {"failed": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer | idle) + "\n")
