"""A subject of a measurement in a process of its own: it may crash, hang or fill the memory, and the others go on.

Commands go as JSON lines to the child's stdin, answers come as JSON lines through a pipe of their own (stdout is for
whatever libraries print). The child leads a process group, which is ended as a whole when it does not answer in time;
when its parent is gone, it goes at once, however the parent ended.
"""

import contextlib
import ctypes
import errno
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STATUS_KEYS = ("VmRSS", "VmHWM")
PR_SET_PDEATHSIG = 1
FAILURES = (ValueError, RuntimeError, ChildProcessError, TimeoutError)
"""What asking a worker may raise because of its subject."""
SURROUNDINGS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
)
"""Errors of the disk or the system, which no subject is to blame for."""


class Memory(NamedTuple):
    """Resident set of a process in MiB."""

    now: float
    peak: float


class Worker:
    """A child process that holds one subject and answers one command at a time."""

    program = "from tasks.validation.worker import answer_commands; answer_commands({answers_fd}, lambda command: {{}})"
    """Python that the child runs; it calls `answer_commands`."""

    def __init__(self, name: str, *, threads: int, timeout_s: float | None = None) -> None:
        """Starts the process.

        Args:
            name: of the subject, for messages.
            threads: of OpenMP and its like in the child, which runs on as many cores.
            timeout_s: for each answer, after which its process group is ended; None waits for ever.
        """
        self.name = name
        self.threads = threads
        self.idle_s = 0.0
        self.idle_cpu_s = 0.0
        self._timeout_s = timeout_s
        self._received = b""
        self._answers_fd, write_fd = os.pipe()
        variables = [
            f"PYTHONPATH={os.pathsep.join(entry for entry in sys.path if entry)}",
            *(f"{library}_NUM_THREADS={threads}" for library in ("OMP", "MKL", "OPENBLAS")),
            "TOKENIZERS_PARALLELISM=false",
        ]
        cores = choose_cores(threads)
        pinned = f"import os; os.sched_setaffinity(0, {cores}); " if cores else ""
        self._process = subprocess.Popen(
            # env(1) adds to what is inherited, and before anything is imported
            ["env", *variables, sys.executable, "-c", pinned + self.program.format(answers_fd=write_fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[write_fd],
            start_new_session=True,
        )
        os.close(write_fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, *, extra_s: float = 0.0, **command: Any) -> dict[str, Any]:
        """The answer to a command.

        Args:
            extra_s: added to the time it may take.
            command: anything that JSON holds.

        Raises:
            ValueError: the subject refused, in its own words.
            RuntimeError: the subject failed in a way it did not foresee.
            ChildProcessError: the process died.
            TimeoutError: it did not answer in time, and was ended with its whole group.
            OSError: of the disk or the system, see `SURROUNDINGS`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(extra_s)
        except BrokenPipeError:
            line = b""
        if not line:
            raise ChildProcessError(self._obituary())
        answer: dict[str, Any] = json.loads(line)
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["file"])
        if "refused" in answer:
            raise ValueError(f"The speed of {self.name!r} cannot be measured: {answer['refused']}")
        if "failed" in answer:
            raise RuntimeError(f"Measuring the speed of {self.name!r} failed: {answer['failed']}")
        self.idle_s += answer.pop("idle_s")
        self.idle_cpu_s += answer.pop("idle_cpu_s")
        return answer

    def memory_mib(self) -> Memory:
        """Memory of the process, that of its libraries and the interpreter included."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            raise ChildProcessError(self._obituary()) from None
        pairs = (line.partition(":") for line in lines)
        kib = {key: int(value.split()[0]) for key, _, value in pairs if key in STATUS_KEYS}
        if len(kib) < len(STATUS_KEYS):
            raise ChildProcessError(self._obituary())
        return Memory(now=kib["VmRSS"] / 1024, peak=kib["VmHWM"] / 1024)

    def close(self) -> None:
        """End the process and its group, and wait for it; closing again does nothing."""
        self._kill()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._answers_fd >= 0:
            os.close(self._answers_fd)
            self._answers_fd = -1

    def _kill(self) -> None:
        if self._process.poll() is None:  # else its number may be another's by now
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not yet begun to lead a group
                self._process.kill()
        self._process.wait()

    def _read_line(self, extra_s: float) -> bytes:
        """The next line; "" at the end of what the child writes."""
        limit_s = None if self._timeout_s is None else self._timeout_s + extra_s
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while b"\n" not in self._received:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._answers_fd], [], [], left_s)[0]:
                self._kill()
                raise TimeoutError(
                    f"{self.name!r} did not answer within {limit_s:g} s while its speed was measured, and its "
                    "process group was ended. Raise timeout_s if it needs longer."
                )
            received = os.read(self._answers_fd, 1 << 16)
            if not received:
                return b""
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _obituary(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._kill()
        code = self._process.returncode
        if code == -signal.SIGKILL:
            return (
                f"The process of {self.name!r} was killed (SIGKILL) while its speed was measured, most likely for lack "
                "of memory. Free some, lower max_memory_mib, or measure fewer requests at a time."
            )
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"The process of {self.name!r} died with {how} while its speed was measured; its log says more."


def choose_cores(threads: int) -> list[int]:
    """The cores that every subject runs on, as many as it has threads; empty: all that there are.

    All subjects get the same ones, since one works at a time, so that none is luckier; one per physical core as far as
    there are. Its threads may change places among them: a thread that is tied to one core waits whenever something else
    runs there.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if threads >= len(allowed):
        return []
    siblings = {core: _siblings(core) for core in allowed}
    firsts = [core for core in allowed if core == min(siblings[core] & set(allowed) or {core})]
    return sorted([*firsts, *(core for core in allowed if core not in firsts)][:threads])


def _siblings(core: int) -> set[int]:
    """Hardware threads of the same physical core."""
    file = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        parts = file.read_text().strip().split(",")
    except OSError:
        return {core}
    ends = [part.partition("-")[::2] for part in parts]
    return {number for first, last in ends for number in range(int(first), int(last or first) + 1)}


def answer_commands(answers_fd: int, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child: answers commands until stdin ends; an error is an answer too."""
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    _end_with_parent()

    def listen() -> None:
        for line in sys.stdin:
            commands.put(line)
        os.killpg(0, signal.SIGKILL)  # also out of the middle of a computation

    threading.Thread(target=listen, daemon=True).start()
    with os.fdopen(answers_fd, "w", buffering=1) as answers:
        while True:
            waits_since, cpu_before = time.perf_counter(), time.process_time()
            command = json.loads(commands.get())
            idle = {"idle_s": time.perf_counter() - waits_since, "idle_cpu_s": time.process_time() - cpu_before}
            try:
                found = answer(command)
            except OSError as error:
                ours = error.errno in SURROUNDINGS
                found = {"errno": error.errno, "file": error.filename} if ours else {"refused": str(error)}
            except ValueError as error:
                found = {"refused": str(error)}
            except Exception as error:  # noqa: BLE001  the parent raises it, with the subject's name
                found = {"failed": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(found | idle) + "\n")


def _end_with_parent() -> None:
    """Lets Linux kill this process with its parent, also while it is stopped or hangs in native code."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
