"""What a measurement says about one metric of one candidate: its value, and how much worse than the original it is.

Quality, speed, load and task metrics all report in these terms, so that any of them can be limited, shown and compared
in the same way. Whoever measures gives three things:

* `METRICS`, all metrics it may ever report; tasks/validation/metrics.py joins them, and recipes may limit any of them;
* `Options.metrics()`, those that these options will measure, each with its batch sizes and percentiles;
* `measured(summary, ...)`, what was measured of a candidate, by `figure_name`.
"""

from collections.abc import Collection, Mapping
from typing import Literal, get_args

from pydantic import BaseModel, Field

from tasks.validation.statistics import CONFIDENCE, Estimate, scaled

Better = Literal["lower", "higher"]
Aspect = Literal["quality", "speed", "cost"]
Percentile = Literal["p50", "p90", "p95", "p99"]
PERCENTILES: tuple[Percentile, ...] = get_args(Percentile)


class Metric(BaseModel, frozen=True, extra="forbid"):
    """A kind of figure, whoever measures it."""

    name: str = Field(description="As recipes and MLflow write it, units included: tpot_ms.")
    title: str = Field(description="As people read it.")
    unit: str = Field(description='"" for a plain number or a fraction.')
    better: Better
    aspect: Aspect = Field(description="A machine's noise widens intervals of speed; a great gain in quality is odd.")
    option: str = Field("", description="The recipe's option that measures it: validation.speed. Empty: always is.")
    compared: bool = Field(True, description="Whether the original has it too; not so of agreement with the original.")
    percentiles: tuple[Percentile, ...] = Field(
        (), description="Measured percentiles over requests; empty: it has none."
    )
    refused: dict[Percentile, str] = Field(
        {}, description="Percentiles that these options cannot give, and why, as a sentence that says what to do."
    )
    batch_sizes: tuple[int, ...] = Field((), description="Measured batch sizes; empty: it does not depend on them.")
    largest: float | None = Field(None, description="No value is larger: 1 of a fraction.")


class Measured(BaseModel, frozen=True, extra="forbid"):
    """One metric of one candidate."""

    value: Estimate
    original: float | None = Field(
        None, description="The same figure of the original; None: it has none, as agreement."
    )
    degradation: Estimate | None = Field(
        None, description="How much worse than the original, in the metric's unit, paired; negative: better."
    )
    degradation_percent: Estimate | None = Field(None, description="The same in percent of the original's figure.")
    confidence: float = Field(CONFIDENCE, description="Of all its intervals.")
    too_few: str = Field("", description="Why the interval says nothing, as a sentence: a p99 of ten requests.")


Figures = Mapping[str, Measured]
"""What was measured of a candidate, by `figure_name`."""


def figure_name(metric: str, *, percentile: Percentile | None = None, batch_size: int | None = None) -> str:
    """Names one figure of a metric, in `Figures` and in MLflow: "tpot_ms.p90", "throughput_tokens_per_s.batch_8".

    Args:
        metric: its name.
        percentile: of metrics that have percentiles, each of them; None of others.
        batch_size: of metrics that depend on it; None of others.
    """
    parts = [metric, percentile, None if batch_size is None else f"batch_{batch_size}"]
    return ".".join(part for part in parts if part)


def metric_of(figure: str, metrics: Collection[str]) -> str:
    """The name of the metric that a figure is of, among `metrics`; names may have dots themselves."""
    found = [name for name in metrics if figure == name or figure.startswith(f"{name}.")]
    return max(found, key=len)


def worsening(better: Better, ratio: Estimate) -> Estimate:
    """The degradation in percent that a ratio (candidate / original) of a metric means."""
    shifted = Estimate(
        value=ratio.value - 1,
        low=None if ratio.low is None else ratio.low - 1,
        high=None if ratio.high is None else ratio.high - 1,
        num=ratio.num,
    )
    return scaled(shifted, 100 if better == "lower" else -100)


def beside(
    value: Estimate,
    ratio: Estimate,
    original: float,
    *,
    better: Better,
    too_few: str = "",
    confidence: float = CONFIDENCE,
) -> Measured:
    """A figure beside the original's; what it lost in its unit is the ratio's part of the original's figure."""
    loss = worsening(better, ratio)
    return Measured(
        value=value,
        original=original,
        degradation=scaled(loss, original / 100),
        degradation_percent=loss,
        confidence=confidence,
        too_few=too_few,
    )
