"""What one check found."""

from typing import Literal

from pydantic import BaseModel, model_validator

State = Literal["ok", "warning", "problem", "skipped"]


class Finding(BaseModel, frozen=True, extra="forbid"):
    """One line of the examination.

    Attributes:
        name: what was looked at.
        state: `problem`: runs will fail, or their results cannot be trusted; `warning`: they may; `skipped`: it does
            not apply here, and `says` tells why.
        says: what was found, or why it does not apply.
        remedy: what to do; of problems and warnings only, and of all of them.
        elapsed_s: how long the check took that found it.
    """

    name: str
    state: State
    says: str
    remedy: str = ""
    elapsed_s: float = 0.0

    @model_validator(mode="after")
    def _has_a_remedy_where_one_is_needed(self) -> "Finding":
        if (self.state in ("problem", "warning")) != bool(self.remedy):
            raise ValueError(f"problems and warnings have a remedy, others none; {self.name!r} is {self.state}")
        return self


def ok(name: str, says: str) -> Finding:
    """It works."""
    return Finding(name=name, state="ok", says=says)


def skipped(name: str, why: str) -> Finding:
    """It does not apply."""
    return Finding(name=name, state="skipped", says=why)


def warning(name: str, says: str, remedy: str) -> Finding:
    """It works and should be changed."""
    return Finding(name=name, state="warning", says=says, remedy=remedy)


def problem(name: str, says: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(name=name, state="problem", says=says, remedy=remedy)
