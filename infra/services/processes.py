"""Processes that are ours: told from strangers with the same number, found by a mark in their environment, ended.

Everything `slimline up` starts carries MARK, so that `down` finds what is left of it even when the supervisor was
killed. Everything a flow run starts carries RUN_MARK.
"""

import contextlib
import os
from pathlib import Path

import psutil
from pydantic import BaseModel

MARK = "SLIMLINE_SERVICES_OF"
"""Environment variable of every process of the services; its value is the home directory."""
RUN_MARK = "SLIMLINE_RUN"


class ProcessId(BaseModel, frozen=True):
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    started_at: float

    @classmethod
    def own(cls) -> "ProcessId":
        """Of the calling process."""
        return cls(pid=os.getpid(), started_at=psutil.Process().create_time())

    def alive(self) -> bool:
        """Whether that very process still runs."""
        try:
            process = psutil.Process(self.pid)
            # The system computes start times from the boot time, which moves a little when the clock is set.
            same = abs(process.create_time() - self.started_at) < 2
            return bool(same and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


def marked(home: Path) -> list[psutil.Process]:
    """Living processes started by the services of `home`, the caller excepted."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == str(home):
                found.append(process)
    return found


def kill(home: Path) -> None:
    """SIGKILL every marked process but the caller, and what each started, until none is left."""
    while left := marked(home):
        for process in list(left):  # PostgreSQL's own children write over the environment by which they would be found
            with contextlib.suppress(psutil.NoSuchProcess):
                left += process.children(recursive=True)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid != os.getpid():
                    process.kill()
        psutil.wait_procs(left, timeout=1)


def run_mark(home: Path) -> dict[str, str]:
    """A variable by which the processes that a flow run starts can be found when the run itself was killed."""
    own = ProcessId.own()
    return {RUN_MARK: f"{own.pid} {own.started_at} {home}"}


def end_orphans(home: Path) -> int:
    """End what killed runs of `home` left behind, and say how many processes that were.

    Prefect's server inside a flow is one: it ends with the flow unless the flow gets a SIGKILL.
    """
    found = orphans(home)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=10)
    return len(found)


def orphans(home: Path) -> list[psutil.Process]:
    """Processes that killed runs of `home` left behind."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            pid, started_at, of = (process.environ().get(RUN_MARK) or "0 0 ").split(" ", 2)
            if of == str(home) and not ProcessId(pid=int(pid), started_at=float(started_at)).alive():
                found.append(process)
    return found
