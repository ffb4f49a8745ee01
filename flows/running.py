"""Run the stages of a pipeline for real, one after the other, and remember what each cost."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from prefect import Task
from pydantic import BaseModel
from rich.markup import escape

from flows.recipe import Recipe
from flows.resources import needs
from flows.retrying import Attempts, Retries
from infra.artifacts import exists
from infra.caching import cache_key, earlier_result, kept_result, shared_results
from infra.console import console
from infra.failures import InfrastructureError, explain
from infra.isolation import StageError
from infra.locks import held_everywhere
from infra.settings import settings
from infra.slots import slots
from infra.stage import forget
from infra.tracking import Parent, StageResult


class StageRecord(BaseModel, frozen=True):
    """One stage of a flow run, as the report tells it."""

    title: str
    cached: bool
    elapsed_s: float
    peak_memory_mib: float | None
    result: StageResult
    failures: tuple[str, ...] = ()
    """Of earlier attempts in this run, each what ended it."""


@dataclass
class Runner:
    """Calls Prefect tasks; a stage whose result is known and whose files are still there is not run again."""

    parent: Parent
    retries: Retries = field(default_factory=Retries)
    records: list[StageRecord] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, parent: Parent) -> "Runner":
        """As the recipe's `execution` says."""
        minutes = recipe.execution.max_minutes_per_stage
        update = {"stage_timeout_s": 60 * minutes if minutes else None, "training": recipe.execution.training}
        return cls(parent.model_copy(update=update), recipe.execution.retries)

    def __call__(self, task: "Task[..., StageResult]", label: str = "", /, **arguments: Any) -> StageResult:
        """The result of the stage, from the cache if it is there.

        Of several processes that want the same stage at once, one runs it; the others wait and find its result.

        Raises:
            StageError: it failed or crashed; said on the terminal already.
            InfrastructureError: the disk or a server failed, so that going on makes no sense.
        """
        title = f"{label} {task.name}".strip()
        started_at = time.monotonic()
        attempts = Attempts(title, self.retries)

        def say_who_runs_it(holder: str) -> None:
            console.print(f"  {title}: {holder} is running the same stage; waiting for it", soft_wrap=True)

        try:
            key = cache_key(task, arguments)
            # Around the call: Prefect looks into its cache within, so whoever waited finds what the other made.
            with held_everywhere(key, say_who_runs_it) if key else nullcontext():
                result, cached = self._call(task, attempts, {**arguments, "parent": self.parent, "label": label})
                if key and (cached or kept_result(task, arguments) is not None):  # Prefect may fail to keep it
                    forget(key)
        except StageError as error:
            console.print(f"  [red]failed[/] {title}: {escape(str(error))}", soft_wrap=True)
            raise
        except Exception as error:
            if said := explain(error, settings().home):
                raise InfrastructureError(f"{title} could not be finished. {said}") from error
            raise
        record = StageRecord(
            title=title,
            cached=cached,
            elapsed_s=result.elapsed_s,
            peak_memory_mib=result.peak_memory_mib,
            result=result,
            failures=tuple(said for _, said in attempts.failures),
        )
        self.records.append(record)
        took = "cached" if cached else f"{time.monotonic() - started_at:.1f} s"
        console.print(f"  [green]done[/]  {title:<44} {took}")
        return result

    def _call(
        self, task: "Task[..., StageResult]", attempts: Attempts, arguments: dict[str, Any]
    ) -> tuple[StageResult, bool]:
        """The result, and whether it came from the cache."""
        if attempts.retries.total:

            def is_worth_another(task: Any, run: Any, state: Any) -> bool:
                return attempts.is_worth_another(state.data)

            task = task.with_options(
                retries=attempts.retries.total,
                retry_delay_seconds=attempts.retries.delays_s(),
                retry_jitter_factor=0.5,
                retry_condition_fn=is_worth_another,
            )
        known = earlier_result(task, arguments)
        if known is not None and not exists(known.artifact):
            console.print(f"  {attempts.title}: the files of the earlier result are gone; running the stage again")
            known, task = None, task.with_options(refresh_cache=True)

        def say_what_it_waits_for(what: str) -> None:
            console.print(f"  {attempts.title}: waiting for {what}", soft_wrap=True)

        asked = needs(task.name, attempts.title, arguments)
        with slots(asked, say_what_it_waits_for) if known is None else nullcontext(), shared_results():
            result: StageResult = task(**arguments, return_state=True).result()
        return result, known is not None
