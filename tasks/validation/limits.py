"""Limits a candidate has to keep: goals on any metric, checked against what a recipe measures before anything runs.

How they are judged is in verdicts.py.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from tasks.validation.measured import Metric, Percentile
from tasks.validation.metrics import KNOWN

Than = Literal["original", "unquantized"]
SPEEDUP: dict[Than, str] = {"original": "speedup_over_original", "unquantized": "speedup_over_unquantized"}
"""The metric that `never_slower_than` limits."""
RELATIVE = ("max_degradation", "max_degradation_percent", "min_improvement", "min_improvement_percent")
BOUNDS = ("max", "min", *RELATIVE)


class Goal(BaseModel, frozen=True, extra="forbid"):
    """What one metric has to keep; of several bounds, all."""

    max: float | None = Field(None, description="Upper bound of the figure, in the metric's unit.")
    min: float | None = Field(None, description="Lower bound of the figure, in the metric's unit.")
    max_degradation: float | None = Field(
        None, ge=0, description="How much worse than the original it may be, in the metric's unit."
    )
    max_degradation_percent: float | None = Field(
        None, ge=0, description="How much worse than the original it may be, in percent of the original's figure."
    )
    min_improvement: float | None = Field(
        None, gt=0, description="How much better than the original it has to be, in the metric's unit."
    )
    min_improvement_percent: float | None = Field(
        None, gt=0, description="How much better than the original it has to be, in percent of the original's figure."
    )
    max_gain_percent: float | None = Field(
        None,
        gt=0,
        description="Of quality: a gain beyond this is ANOMALOUS, not good; if not given, one beyond the allowed loss.",
    )
    percentile: Percentile | None = Field(None, description="Over requests, of latencies; p50 if not given.")
    batch_size: int | None = Field(None, ge=1, description="A measured one, of what depends on it; 1 if not given.")

    @model_validator(mode="after")
    def _bounds_something(self) -> "Goal":
        if not self.bounds():
            raise ValueError(f"a limit needs a bound: {', '.join(BOUNDS)}.")
        return self

    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        return {name: bound for name in BOUNDS if (bound := getattr(self, name)) is not None}


def _is_list(value: Any) -> str:
    return "goals" if isinstance(value, list | tuple) else "goal"


Goals = Annotated[
    Annotated[Goal, Tag("goal")] | Annotated[tuple[Goal, ...], Tag("goals")],
    Discriminator(_is_list),
]
"""One goal, or several of the same metric: at two batch sizes."""


class Limits(BaseModel):
    """Goals by metric: what every candidate has to keep. What is left out is measured and not judged."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Goals] = Field(init=False)

    never_slower_than: tuple[Than, ...] = Field(
        (),
        description="Throughput at every measured batch size, prompts included, must not be below that of the original "
        "in PyTorch, or of the unquantized original in the same engine.",
    )

    def by_metric(self) -> dict[str, tuple[Goal, ...]]:
        """The goals of each metric, but for `never_slower_than`."""
        extra = self.__pydantic_extra__ or {}
        return {metric: goals if isinstance(goals, tuple) else (goals,) for metric, goals in extra.items()}

    def goals(self) -> Iterator[tuple[str, Goal]]:
        """Every goal with its metric, but for `never_slower_than`."""
        for metric, goals in self.by_metric().items():
            yield from ((metric, goal) for goal in goals)

    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that are limited, each once; empty when nothing is judged."""
        return tuple(
            dict.fromkeys([*(m for m, _ in self.goals()), *(SPEEDUP[than] for than in self.never_slower_than)])
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Metrics by name, so that editors know them."""
        found = handler(schema)
        target = handler.resolve_ref_schema(found)
        goals = target.pop("additionalProperties")
        fixed = {metric.name: _described(goals, metric) for metric in KNOWN.values() if "*" not in metric.name}
        patterns = {
            name_pattern(metric.name): _described(goals, metric) for metric in KNOWN.values() if "*" in metric.name
        }
        target["properties"] = fixed | target["properties"]
        if patterns:
            target["patternProperties"] = patterns
        target["additionalProperties"] = False
        return found


def _described(goals: JsonSchemaValue, metric: Metric) -> JsonSchemaValue:
    unit = f", in {metric.unit}" if metric.unit else ""
    return goals | {"description": f"{metric.title[:1].upper()}{metric.title[1:]}{unit}; {metric.better} is better."}


def name_pattern(name: str) -> str:
    """The regular expression of a metric's name, in which * stands for what is known only later, as a task's name."""
    return "^" + re.escape(name).replace(r"\*", r"[A-Za-z0-9_.-]+") + "$"


def unmeasurable(limits: Limits, measured: Mapping[str, Metric]) -> list[str]:
    """A sentence for every limit that cannot be judged with what a recipe measures; empty when all can be.

    Args:
        limits: of the recipe.
        measured: the metrics that its options measure, by name.
    """
    problems = [
        f"limits.{name} lists no limit; give one, or drop it."
        for name, goals in limits.by_metric().items()
        if not goals
    ]
    for name, goal in limits.goals():
        metric = measured.get(name)
        problems += [_unmeasured(name, measured)] if metric is None else _misfits(metric, goal)
    for than in limits.never_slower_than:
        if SPEEDUP[than] not in measured:
            problems.append(
                "limits.never_slower_than needs measured speed; validation.speed is null. Set it, or drop the limit."
            )
    return list(dict.fromkeys(problems))


def _unmeasured(name: str, measured: Mapping[str, Metric]) -> str:
    known = next((m for m in KNOWN.values() if re.match(name_pattern(m.name), name)), None)
    if known and known.option:
        return f"limits.{name} needs {known.option}, which does not measure it here. Set it, or drop the limit."
    nearest = difflib.get_close_matches(name, measured, n=1, cutoff=0.5) or difflib.get_close_matches(name, KNOWN, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"limits.{name}: there is no such metric.{hint} This recipe measures: {', '.join(sorted(measured))}."


def _misfits(metric: Metric, goal: Goal) -> list[str]:
    """What in `goal` means nothing for `metric`, or is not measured of it."""
    where = f"limits.{metric.name}"
    problems = []
    wrong, right = ("min", "max") if metric.better == "lower" else ("max", "min")
    if getattr(goal, wrong) is not None:
        problems.append(f"{where}: {metric.better} is better, so bound it by `{right}`, not by `{wrong}`.")
    for bound, value in goal.bounds().items():
        if bound in RELATIVE and not metric.compared:
            problems.append(
                f"{where}: the original has no {metric.title} to compare with; use `{right}`, not `{bound}`."
            )
        if bound in ("max", "min") and metric.largest is not None and not 0 <= value <= metric.largest:
            problems.append(f"{where}.{bound} must lie in 0..{metric.largest:g}; got {value:g}.")
    if goal.max_gain_percent is not None and not (metric.compared and metric.aspect == "quality"):
        problems.append(f"{where}: `max_gain_percent` is of quality beside the original's; drop it.")
    if goal.percentile and not (metric.percentiles or metric.refused):
        problems.append(f"{where} has no percentiles; drop `percentile: {goal.percentile}`.")
    elif goal.percentile and goal.percentile not in metric.percentiles:
        why = metric.refused.get(goal.percentile)
        problems.append(f"{where} on {goal.percentile}: " + (why or f"measured are {', '.join(metric.percentiles)}."))
    return problems + _batch_misfits(where, goal.batch_size, metric.batch_sizes, metric.option)


def _batch_misfits(where: str, batch_size: int | None, measured: Sequence[int], option: str) -> list[str]:
    if batch_size is None:
        return []
    if not measured:
        return [f"{where} does not depend on a batch size; drop `batch_size: {batch_size}`."]
    if batch_size in measured:
        return []
    sizes = ", ".join(map(str, measured))
    problem = f"{where} needs a measured batch size; got {batch_size}, and those of {option} are {sizes}. "
    return [problem + "Add it there, or change the limit."]
