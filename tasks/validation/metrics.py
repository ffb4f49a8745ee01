"""The registry of metrics: every figure that a recipe may limit, whoever measures it.

A module that measures adds its `METRICS` to `KNOWN`. Names are unique, and recipes write them, so they stay.
"""

from collections.abc import Sequence
from typing import Final

from tasks.validation import benchmarks, cost, latency, load, quality
from tasks.validation.measured import Measured, Metric
from tasks.validation.statistics import exactly

SIZE_METRICS: Final = (
    Metric(name="size_mib", title="size on disk", unit="MiB", better="lower", aspect="cost"),
    Metric(name="size_bytes", title="size on disk", unit="bytes", better="lower", aspect="cost"),
)

KNOWN: Final[dict[str, Metric]] = {
    metric.name: metric
    for metric in (*quality.METRICS, *benchmarks.METRICS, *latency.METRICS, *load.METRICS, *cost.METRICS, *SIZE_METRICS)
}
"""Every metric there is, by name."""


def measured_size(size_bytes: int, original_size_bytes: int) -> dict[str, Measured]:
    """The size of an engine bundle beside that of the original's float32 checkpoint."""
    found = {}
    for metric, unit_bytes in zip(SIZE_METRICS, (2**20, 1), strict=True):
        value, original = size_bytes / unit_bytes, original_size_bytes / unit_bytes
        found[metric.name] = Measured(
            value=exactly(value),
            original=original,
            degradation=exactly(value - original),
            degradation_percent=exactly(100 * (value / original - 1)),
        )
    return found


def by_name(metrics: Sequence[Metric]) -> dict[str, Metric]:
    """The metrics that a recipe measures, by name.

    Raises:
        ValueError: two of them have the same name.
    """
    found: dict[str, Metric] = {}
    for metric in metrics:
        if metric.name in found:
            raise ValueError(f"Two measurements give {metric.name}; each metric is measured by one. Leave one out.")
        found[metric.name] = metric
    return found
