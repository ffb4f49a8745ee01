"""Which failures of a stage are worth another attempt, and how many: the recipe's `execution`.

A wrong input stays wrong and a limit stays a limit, so neither is tried again. A server or store that did not answer
may answer in a moment; a crash in native code may be a race; and memory that others took may come back.
"""

import time
from typing import Literal

import psutil
from pydantic import BaseModel, Field

from infra.console import console
from infra.failures import is_transient
from infra.isolation import NativeCrash, OutOfMemory
from infra.torchrun import Torchrun

Failure = Literal["transient", "crash", "out_of_memory"]
MAX_DELAY_S = 600.0
MORE_MEMORY = 1.25
"""Times what the stage had, to try again: less would hardly end otherwise."""


class Retries(BaseModel, frozen=True, extra="forbid"):
    """How many times a stage is tried again, by what ended it. Anything else ends it for good."""

    transient: int = Field(3, ge=0, le=10, description="A server or store did not answer.")
    crash: int = Field(1, ge=0, le=10, description="A signal ended the stage: a fault in native code, or a SIGKILL.")
    out_of_memory: int = Field(
        1, ge=0, le=10, description="Only if others hold memory, and give it back within wait_for_memory_minutes."
    )
    wait_for_memory_minutes: float = Field(5.0, ge=0, le=24 * 60)
    first_delay_s: float = Field(
        2.0, ge=0, le=600, description="Before the second attempt; twice as much before each later one, with jitter."
    )

    @property
    def total(self) -> int:
        """Attempts after the first, whatever ends them."""
        return self.transient + self.crash + self.out_of_memory

    def delays_s(self) -> list[float]:
        """Before each of these attempts, in seconds."""
        return [min(self.first_delay_s * 2**attempt, MAX_DELAY_S) for attempt in range(self.total)]


class Execution(BaseModel, frozen=True, extra="forbid"):
    """How stages are run; changes nothing about their results."""

    retries: Retries = Retries()
    training: Torchrun = Torchrun()
    max_minutes_per_stage: float | None = Field(
        None, gt=0, description="A stage that takes longer is ended, with all it started. null: as long as it takes."
    )


def kind_of(error: BaseException) -> Failure | None:
    """What ended a stage, if that is worth another attempt."""
    if isinstance(error, OutOfMemory):
        return "out_of_memory"
    if isinstance(error, NativeCrash):
        return "crash"
    return "transient" if is_transient(error) else None


class Attempts:
    """The failed attempts at one stage so far, and whether it is worth another."""

    def __init__(self, title: str, retries: Retries) -> None:
        self.title = title
        self.retries = retries
        self.failures: list[tuple[Failure, str]] = []

    def is_worth_another(self, error: object) -> bool:
        """Whether to try again after `error`; says so on the terminal, and waits for memory where that is scarce."""
        kind = kind_of(error) if isinstance(error, BaseException) else None
        if kind is None:
            return False
        allowed, before = getattr(self.retries, kind), [each for each, _ in self.failures].count(kind)
        if before >= allowed:
            return False
        if isinstance(error, OutOfMemory) and not self._memory_comes_back(error.left_mib):
            return False
        self.failures.append((kind, str(error)))
        console.print(
            f"  [yellow]again[/]  {self.title}: attempt {len(self.failures) + 1}, after: ", end="", soft_wrap=True
        )
        console.print(str(error), markup=False, soft_wrap=True)
        return True

    def _memory_comes_back(self, left_mib: float) -> bool:
        needed_mib = MORE_MEMORY * left_mib
        if (
            needed_mib * 2**20 > psutil.virtual_memory().total
        ):  # nearly all there is was the stage's: nobody to wait for
            return False
        deadline = time.monotonic() + 60 * self.retries.wait_for_memory_minutes
        console.print(
            f"  {self.title}: out of memory with {left_mib:,.0f} MiB; waiting up to "
            f"{self.retries.wait_for_memory_minutes:g} min until others leave {needed_mib:,.0f} MiB",
            soft_wrap=True,
        )
        while psutil.virtual_memory().available < needed_mib * 2**20:
            if time.monotonic() >= deadline:
                return False
            time.sleep(1)
        return True
