"""Runs programs that a model wrote, each where it can do no harm, and says whether they passed.

A program gets a process of its own, which gives up everything before it reads the program (sandbox_child.py): limits
(setrlimit) on CPU time, address space and file sizes; a seccomp filter that allows computing and no more: no sockets,
no other processes, no signals, no other programs; no writing outside of its own empty directory (Landlock), which is
removed afterwards, or no writing at all where the kernel is older than 6.2. Neither needs privileges or a container.
Where the filter cannot be had, programs are not run.

What is not promised: a program can read files that this user can read (and tell nobody), and one that searches its
process for how success is reported can report it. It is a sandbox for code that is wrong, not for an adversary who
knows it.
"""

import json
import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from tasks.validation.benchmarks import sandbox_child

CHILD = Path(sandbox_child.__file__)
MACHINES = tuple(sandbox_child.ALLOWED)
MOST_ANSWER_BYTES = 4096


class SandboxLimits(BaseModel, frozen=True, extra="forbid"):
    """What one program may use."""

    cpu_s: int = Field(5, ge=1, le=3600, description="Seconds of CPU time.")
    wall_s: float = Field(20.0, gt=0, le=7200, description="Seconds by the clock; for programs that wait.")
    memory_mib: int = Field(1024, ge=128, description="Address space, Python itself included.")
    file_mib: int = Field(16, ge=0, description="Size of a file that it writes.")


class Outcome(BaseModel, frozen=True):
    """How a program ended."""

    passed: bool
    how: Literal["passed", "raised", "ended early", "out of time", "killed"]
    detail: str = ""
    writes: Literal["own directory", "nowhere"] | None = Field(
        None, description="Where it could write; None: not known."
    )


def run_program(program: str, limits: SandboxLimits = SandboxLimits()) -> Outcome:  # noqa: B008
    """Whether `program` runs to its end without an exception.

    Ending is not enough: the child reports success itself, after the last line, so that sys.exit(0) before the tests
    does not pass. Nothing of it is left: neither process nor file.

    Raises:
        ValueError: it cannot be confined here.
    """
    if problem := missing():
        raise ValueError(problem)
    secret = secrets.token_hex(16)
    request = json.dumps({"program": program, "secret": secret, **limits.model_dump()})
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as directory:
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"HOME": directory, "TMPDIR": directory, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **_ONE_THREAD},
            start_new_session=True,
        )
        try:
            answer, in_time = _talk(child, request.encode(), limits.wall_s)
        finally:
            _end(child)
    return _outcome(answer, secret, child.returncode, in_time=in_time)


def missing() -> str | None:
    """Why programs cannot be confined on this kind of machine; None if they can."""
    if sys.platform == "linux" and platform.machine() in MACHINES:
        return None
    return (
        f"Generated code runs only where it can be confined: Linux on {' or '.join(MACHINES)}; this is "
        f"{platform.system()} on {platform.machine()}. Leave the task `code_generation` out, or run it elsewhere."
    )


_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


def _talk(child: "subprocess.Popen[bytes]", request: bytes, wall_s: float) -> tuple[bytes, bool]:
    """The first bytes the child answers, and whether it closed its end in time."""
    assert child.stdin
    assert child.stdout
    deadline = time.monotonic() + wall_s
    try:
        child.stdin.write(request)
        child.stdin.close()
    except BrokenPipeError:  # it died; how tells its return code
        pass
    answer = b""
    while (left := deadline - time.monotonic()) > 0 and len(answer) < MOST_ANSWER_BYTES:
        ready, _, _ = select.select([child.stdout], [], [], left)
        if not ready:
            break
        piece = os.read(child.stdout.fileno(), MOST_ANSWER_BYTES - len(answer))
        if not piece:
            return answer, True
        answer += piece
    return answer, len(answer) == MOST_ANSWER_BYTES  # whoever says more than the child does is ended at once


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Ends the child, which cannot have started others nor left its process group."""
    try:
        child.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe and not pipe.closed:
            pipe.close()


def _outcome(answer: bytes, secret: str, returncode: int, *, in_time: bool) -> Outcome:
    try:
        said = json.loads(answer)
    except ValueError:
        said = {}
    if isinstance(said, dict) and said.get("secret") == secret:
        if "unconfined" in said:
            raise ValueError(
                f"Generated code runs only where it can be confined; here that failed: {said['unconfined']}. Leave the "
                "task `code_generation` out, or run it on a machine that allows seccomp filters."
            )
        if said.get("passed") is True and in_time:
            return Outcome(passed=True, how="passed", writes=said["writes"])
        if "raised" in said:
            return Outcome(passed=False, how="raised", detail=str(said["raised"]), writes=said["writes"])
    if not in_time or returncode == -signal.SIGXCPU:
        return Outcome(passed=False, how="out of time")
    if returncode < 0:
        return Outcome(passed=False, how="killed", detail=signal.Signals(-returncode).name)
    return Outcome(passed=False, how="ended early", detail=f"exit code {returncode} before its last line")
