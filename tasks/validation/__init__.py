"""Measuring candidates and judging them: quality, speed, limits, verdicts, Pareto front, report."""

from tasks.validation.cost import Price
from tasks.validation.latency import Speed
from tasks.validation.limits import Limits, unmeasurable
from tasks.validation.load import Load
from tasks.validation.quality import Quality

__all__ = ["Limits", "Load", "Price", "Quality", "Speed", "unmeasurable"]
