"""The runner's handles on contenders' processes."""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ANSWER_S = 600
"""No request takes so long; a process that does hangs."""
FREE_MIB = 3500
"""What must be available before another process starts; less, and one that waits ends, to start again in its turn."""


@dataclass(frozen=True)
class Contender:
    """What the runner knows of one."""

    name: str
    tool: str
    kind: str
    options: dict[str, Any]
    python: Path
    script: Path
    bundle: Path
    environ: dict[str, str] = field(repr=False)


class Memory(NamedTuple):
    """Resident set of a process in MiB."""

    now: float
    peak: float


class Worker:
    """A process that serves one contender, and answers one request at a time."""

    def __init__(self, contender: Contender, *, threads: int, log: Path) -> None:
        self.name = contender.name
        command: list[str | Path] = [contender.python, contender.script, "serve", _served(contender)]
        command += ["--bundle", contender.bundle, "--threads", str(threads)]
        with log.open("a") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=contender.environ,
                start_new_session=True,
            )
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise
        self.idle_s = self.idle_cpu_s = 0.0

    def generate(self, rounds: list[NDArray[np.int64]], new_tokens: int) -> dict[str, Any]:
        """ttft_s and total_s of each round, and the tokens of the last."""
        return self._ask(rounds=[prompts.tolist() for prompts in rounds], new_tokens=new_tokens)

    def log_probs(self, windows: NDArray[np.int64]) -> list[float | None]:
        """Of every window, the sum over its tokens but the first; None: the contender cannot tell."""
        found: list[float | None] = self._ask(windows=windows.tolist())["log_probs"]
        return found

    def memory_mib(self) -> Memory:
        """Of the process, libraries and interpreter included."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        kib = {key: value.split()[0] for key, _, value in (line.partition(":") for line in lines) if key[:2] == "Vm"}
        if "VmRSS" not in kib:
            raise ChildProcessError(self._obituary())
        return Memory(now=int(kib["VmRSS"]) / 1024, peak=int(kib["VmHWM"]) / 1024)

    def close(self) -> None:
        """Ends the process, with those it forked, and waits for it; closing again does nothing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer will not come, and says why
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._answer()
        if "failed" in answer:
            raise RuntimeError(f"{self.name} failed: {answer['failed']}")
        self.idle_s += answer["idle_s"]
        self.idle_cpu_s += answer["idle_cpu_s"]
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
        if not readable:
            raise TimeoutError(f"{self.name} did not answer for {ANSWER_S} s.")
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(self._obituary())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _obituary(self) -> str:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"The process of {self.name} died with {how}."


def _served(contender: Contender) -> str:
    """The name that the contender's script knows: a control is the same contender once more."""
    served: str = contender.options.get("control_of", contender.name)
    return served


class Pool:
    """Processes that wait for their turns, as many as memory takes."""

    def __init__(self, start: Callable[[Contender], Worker]) -> None:
        self._start = start
        self._workers: dict[str, Worker] = {}

    def get(self, contender: Contender) -> Worker:
        """The contender's process; started if it doesn't wait."""
        worker = self._workers.pop(contender.name, None)
        if worker is None:
            while self._workers and available_mib() < FREE_MIB:
                self._workers.pop(next(iter(self._workers))).close()
                time.sleep(0.5)
            worker = self._start(contender)
        self._workers[contender.name] = worker  # the last one used is the last to be ended
        return worker

    def drop(self, name: str) -> None:
        """Ends a process; the next `get` starts another."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """Ends all."""
        for name in list(self._workers):
            self.drop(name)


def available_mib() -> float:
    """Memory that processes can still get without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) / 1024
