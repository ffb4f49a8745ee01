"""What a stage asks of its machine, and waiting until it may have it.

Stages that time something run alone on their machine: workers that share it would spoil each other's figures. A stage
on a GPU takes a slot of the fleet's limit where SLIMLINE_GPU_LIMIT names one. Both are free again when their holder is
gone: at once on a machine, after `LEASE_S` in Prefect.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel

from infra.settings import settings

LEASE_S = 60.0
"""Of a slot whose holder does not renew it; the shortest that Prefect gives."""


class Needs(BaseModel, frozen=True):
    """What a stage asks for. `memory_mib` is an estimate, None where there is none."""

    cores: int
    gpu: bool = False
    alone: bool = False
    memory_mib: float | None = None


@contextmanager
def slots(needs: Needs, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Within, the stage has what it needs.

    Args:
        needs: of the stage.
        on_wait: called once for everything that has to be waited for, with what that is.

    Raises:
        ValueError: SLIMLINE_GPU_LIMIT names a limit that the Prefect server does not have.
    """
    limit = settings().gpu_limit if needs.gpu else None
    with _gpu_slot(limit), _machine(settings().machine_lock, needs.alone, on_wait):
        yield


@contextmanager
def _machine(file: Path, alone: bool, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Within, no stage that wants to be alone runs beside this one, or no other at all.

    Whoever waits stands in a queue before a second file, so that stages that come and go do not keep one waiting
    that wants to be alone.
    """
    queue = _open(file.with_name(f"{file.name}.queue"))
    try:
        lock = _open(file)
        try:
            _flock(queue, fcntl.LOCK_EX, on_wait, "its turn on this machine: a stage before it waits to be timed alone")
            what = "the other stages on this machine to end: it is timed alone" if alone else "a stage that is timed"
            _flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, on_wait, what)
            fcntl.flock(queue, fcntl.LOCK_UN)
            yield
        finally:
            os.close(lock)
    finally:
        os.close(queue)


def _open(file: Path) -> int:
    """A descriptor to lock. The file is everybody's on this machine, so nothing is ever written to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(file, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    return os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _flock(descriptor: int, how: int, on_wait: Callable[[str], None], what: str) -> None:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait(what)
        fcntl.flock(descriptor, how)


@contextmanager
def _gpu_slot(limit: str | None) -> Iterator[None]:
    if limit is None:
        yield
        return
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    # Strict: without it a limit that does not exist limits nothing. A lease that could not be renewed ends no stage:
    # the worst is that one more runs on the GPU.
    slot = concurrency(limit, strict=True, lease_duration=LEASE_S, raise_on_lease_renewal_failure=False)
    try:
        slot.__enter__()
    except ConcurrencySlotAcquisitionError as error:
        raise ValueError(
            f"SLIMLINE_GPU_LIMIT={limit} needs a concurrency limit of that name on the Prefect server, which said: "
            f"{error}. Create it: prefect gcl create {limit} --limit NUMBER_OF_GPUS. Or unset the variable."
        ) from None
    with ExitStack() as stack:
        stack.push(slot)
        yield
