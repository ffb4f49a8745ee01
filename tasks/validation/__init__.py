"""Measuring candidates and judging them: quality, speed, limits, verdicts, Pareto front, report."""

from tasks.validation.latency import Speed
from tasks.validation.limits import Limits, unmeasurable
from tasks.validation.quality import Quality

__all__ = ["Limits", "Quality", "Speed", "unmeasurable"]
