"""What a million output tokens cost, from what the machine costs per hour and how many it makes.

The machine is taken to do nothing else and to be paid for as long as it works: cost = price per hour / 3600 / tokens
per second · 10⁶. At a batch size that is the throughput of batches of this size without a pause; under load, that of
the level at which the engine made most tokens.
"""

from typing import Any

from pydantic import BaseModel, Field

from tasks.validation.measured import Figures, Measured, Metric, beside
from tasks.validation.statistics import Estimate

THROUGHPUT, CAPACITY = "throughput_tokens_per_s", "capacity_tokens_per_s"
_COST: dict[str, Any] = {"unit": "per 10⁶ tokens", "better": "lower", "aspect": "speed"}
METRICS = (
    Metric(
        name="cost_per_million_tokens",
        title="cost",
        option="validation.speed with validation.price_per_hour",
        **_COST,
    ),
    Metric(
        name="cost_per_million_tokens_under_load",
        title="cost under load",
        option="validation.load with validation.price_per_hour",
        compared=False,
        **_COST,
    ),
)
_FROM = dict(zip((THROUGHPUT, CAPACITY), METRICS, strict=True))


class Price(BaseModel, frozen=True, extra="forbid"):
    """What the machine costs."""

    amount: float = Field(gt=0, description="Per hour.")
    currency: str = Field(min_length=1, max_length=8, description="As it is written behind amounts: EUR.")

    def metrics(self, measured: dict[str, Metric]) -> tuple[Metric, ...]:
        """What follows from the throughput that is measured."""
        return tuple(
            _FROM[name].model_copy(
                update={"unit": f"{self.currency} {_COST['unit']}", "batch_sizes": metric.batch_sizes}
            )
            for name, metric in measured.items()
            if name in _FROM
        )


def measured(price: Price, figures: Figures) -> dict[str, Measured]:
    """The cost that follows from each measured throughput."""
    found = {}
    for figure, throughput in figures.items():
        name, _, rest = figure.partition(".")
        if name in _FROM:
            found[f"{_FROM[name].name}{'.' if rest else ''}{rest}"] = _cost_of(price, throughput)
    return found


def cost_per_million(price: Price, tokens_per_s: float) -> float:
    """In the price's currency."""
    return price.amount / 3600 / tokens_per_s * 1e6


def _cost_of(price: Price, throughput: Measured) -> Measured:
    value = _inverse(throughput.value, cost_per_million(price, 1.0))
    about: dict[str, Any] = {"confidence": throughput.confidence, "too_few": throughput.too_few}
    if throughput.original is None or throughput.degradation_percent is None:
        return Measured(value=value, **about)
    lost = throughput.degradation_percent  # percent of the original's tokens per second
    kept = Estimate(
        value=1 - lost.value / 100,
        low=None if lost.high is None else 1 - lost.high / 100,
        high=None if lost.low is None else 1 - lost.low / 100,
        num=lost.num,
    )
    original = cost_per_million(price, throughput.original)
    return beside(value, _inverse(kept, 1.0), original, better="lower", **about)


def _inverse(estimate: Estimate, numerator: float) -> Estimate:
    """`numerator` / what was estimated, which is positive; an end at or below 0 gives none."""
    low, high = (None if end is None or end <= 0 else numerator / end for end in (estimate.high, estimate.low))
    return Estimate(value=numerator / estimate.value, low=low, high=high, num=estimate.num)
