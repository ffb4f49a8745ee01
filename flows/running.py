"""Run the stages of a pipeline for real, one after the other, and remember what each cost."""

import time
from dataclasses import dataclass, field
from typing import Any

from prefect import Task
from pydantic import BaseModel
from rich.markup import escape

from infra.artifacts import exists
from infra.caching import shared_results
from infra.console import console
from infra.failures import InfrastructureError, explain
from infra.isolation import StageError
from infra.settings import settings
from infra.tracking import Parent, StageResult


class StageRecord(BaseModel, frozen=True):
    """One stage of a flow run, as the report tells it."""

    title: str
    cached: bool
    elapsed_s: float
    peak_memory_mib: float | None
    result: StageResult


@dataclass
class Runner:
    """Calls Prefect tasks; a stage whose result is known and whose files are still there is not run again."""

    parent: Parent
    records: list[StageRecord] = field(default_factory=list)

    def __call__(self, task: "Task[..., StageResult]", label: str = "", /, **arguments: Any) -> StageResult:
        """The result of the stage, from the cache if it is there.

        Raises:
            StageError: it failed or crashed; said on the terminal already.
            InfrastructureError: the disk or a server failed, so that going on makes no sense.
        """
        title = f"{label} {task.name}".strip()
        started_at = time.monotonic()
        try:
            with shared_results():
                state = task(**arguments, parent=self.parent, label=label, return_state=True)
            cached = state.name == "Cached"
            result: StageResult = state.result()
        except StageError as error:
            console.print(f"  [red]failed[/] {title}: {escape(str(error))}", soft_wrap=True)
            raise
        except Exception as error:
            if said := explain(error, settings().home):
                raise InfrastructureError(f"{title} could not be finished. {said}") from error
            raise
        if not exists(result.artifact):
            console.print(f"  {title}: the files of the earlier result are gone; running the stage again")
            with shared_results():
                result = task.with_options(refresh_cache=True)(**arguments, parent=self.parent, label=label)
            cached = False
        record = StageRecord(
            title=title,
            cached=cached,
            elapsed_s=result.elapsed_s,
            peak_memory_mib=result.peak_memory_mib,
            result=result,
        )
        self.records.append(record)
        took = "cached" if cached else f"{time.monotonic() - started_at:.1f} s"
        console.print(f"  [green]done[/]  {title:<44} {took}")
        return result
