"""The verdict on a candidate: ACCEPT, REJECT, ANOMALOUS or INCONCLUSIVE.

A limit is kept when the *whole* interval of the measured figure lies on its good side, broken when the whole interval
lies on the bad side, and otherwise not decided: measuring more narrows the interval. So "quality is not worse by more
than 1 %" is accepted only when a loss of 1 % is ruled out (non-inferiority), not when no loss was found.

A gain that is too good to be true is no reason to accept: the measurement is at fault, or the test text was learnt.
Such a candidate is ANOMALOUS, even if it keeps every limit (a broken one rejects it); measuring more settles nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from tasks.validation.limits import SPEEDUP, Goal, Limits
from tasks.validation.measured import Figures, Measured, Metric, figure_name
from tasks.validation.statistics import CONFIDENCE, MIN_CLUSTERS, Estimate, num_needed, scaled

Verdict = Literal["ACCEPT", "REJECT", "ANOMALOUS", "INCONCLUSIVE"]
Bound = Literal["max", "min"]
Noise = tuple[float, float]
"""Factors by which the original's ratio to itself strayed below and above 1 on a noisy machine."""

QUIET: Noise = (1.0, 1.0)
MARGIN_PERCENT = 5.0
"""A gain in quality beyond this is implausible where no limit states what may be lost."""


class Check(BaseModel, frozen=True, extra="forbid"):
    """One limit held against one candidate."""

    metric: str = Field(description="As people read it, with batch size and percentile.")
    figure: str = Field(description="As `figure_name` names it.")
    bound: Bound
    limit: float
    measured: float | None = Field(description="None: not measured.")
    low: float | None = Field(None, description="Of the interval that was judged.")
    high: float | None = None
    confidence: float = Field(CONFIDENCE, description="Of the interval; above 95 % where data may be looked at again.")
    unit: str
    verdict: Literal["ACCEPT", "REJECT", "INCONCLUSIVE"]
    can_be_settled: bool = Field(False, description="Not decided, and more data of the same kind may decide it.")
    sentence: str


class Judgement(BaseModel, frozen=True, extra="forbid"):
    """A candidate's verdict and what it rests on."""

    verdict: Verdict
    checks: tuple[Check, ...]
    anomalies: tuple[str, ...] = Field((), description="What is too good to be true, a sentence each.")
    failure: str | None = Field(None, description="Why it could not be made or measured: it is rejected for that.")
    sentence: str


def judge(
    limits: Limits,
    figures: Figures,
    metrics: Mapping[str, Metric],
    *,
    noise: Noise = QUIET,
    anomalies: Sequence[str] = (),
) -> Judgement:
    """The verdict on a candidate.

    Args:
        limits: of the recipe.
        figures: what was measured of it; what is missing is not decided.
        metrics: what the recipe measures, by name; every limited metric is among them.
        noise: of the machine; widens the intervals of speed.
        anomalies: implausible gains that were found elsewhere, a sentence each.
    """
    checks, odd = [], list(anomalies)
    for name, goal in limits.goals():
        metric = metrics[name]
        figure = _figure_of(metric, goal)
        checks += _goal_checks(metric, goal, figure, figures.get(figure), noise)
    for than in limits.never_slower_than:
        checks += _never_slower_checks(metrics[SPEEDUP[than]], figures, noise)
    odd += implausible_gains(limits, figures, metrics)
    return conclude(checks, odd)


def failed(reason: str) -> Judgement:
    """The verdict on a candidate that could not be made or measured."""
    return Judgement(verdict="REJECT", checks=(), failure=reason, sentence=f"It failed: {reason}")


def conclude(checks: Sequence[Check], anomalies: Sequence[str] = ()) -> Judgement:
    """REJECT if any check rejects, else ANOMALOUS if a gain is, else INCONCLUSIVE if any check is or none was made."""
    told: dict[str, Any] = {"checks": tuple(checks), "anomalies": tuple(anomalies)}
    if broken := [check for check in checks if check.verdict == "REJECT"]:
        return Judgement(verdict="REJECT", sentence=_counted(broken, checks, "broken"), **told)
    if anomalies:
        sentence = " ".join(["Too good to be true, so it is not accepted before somebody looked.", *anomalies])
        return Judgement(verdict="ANOMALOUS", sentence=sentence, **told)
    if not checks:
        return Judgement(verdict="INCONCLUSIVE", sentence="No limits were set, so nothing was judged.", **told)
    if undecided := [check for check in checks if check.verdict == "INCONCLUSIVE"]:
        return Judgement(verdict="INCONCLUSIVE", sentence=_counted(undecided, checks, "not decided"), **told)
    count = "the one limit" if len(checks) == 1 else f"all {len(checks)} limits"
    return Judgement(verdict="ACCEPT", sentence=f"It keeps {count}, whole intervals included.", **told)


def _counted(found: Sequence[Check], checks: Sequence[Check], says: str) -> str:
    count = f"{len(found)} of {len(checks)} limits {'is' if len(found) == 1 else 'are'} {says}."
    return " ".join([count, *(check.sentence for check in found)])


def implausible_gains(limits: Limits, figures: Figures, metrics: Mapping[str, Metric]) -> list[str]:
    """Metrics of quality that are better than the original's by more than a limit lets them be worse, a sentence each.

    The whole interval has to lie beyond the margin: the limit's `max_gain_percent`, else its `max_degradation_percent`,
    else `MARGIN_PERCENT`. A limit of zero says nothing about gains, so the latter holds there too. Of several limits on
    the same figure, some may state none.
    """
    stated: dict[str, float] = {}
    for bound in ("max_degradation_percent", "max_gain_percent"):  # the latter has the last word
        for name, goal in limits.goals():
            if margin := getattr(goal, bound):
                stated[_figure_of(metrics[name], goal)] = margin
    found = []
    for metric in metrics.values():
        if metric.aspect != "quality" or not metric.compared:
            continue
        for figure in _figures_of(metric):
            loss = figures[figure].degradation_percent if figure in figures else None
            margin = stated.get(figure, MARGIN_PERCENT)
            if loss is not None and loss.high is not None and loss.high < -margin:
                found.append(
                    f"{_capital(metric.title)} is better than the original's by {-loss.value:.4g} % "
                    f"({_interval(scaled(loss, -1), figures[figure].confidence)}), and more than {margin:g} % is "
                    "implausible: was the evaluation text trained on, or is the reference wrong? Where such a gain is "
                    f"meant, set limits.{metric.name}.max_gain_percent."
                )
    return found


def _figure_of(metric: Metric, goal: Goal) -> str:
    batch_size = goal.batch_size
    if batch_size is None and metric.batch_sizes:
        batch_size = 1 if 1 in metric.batch_sizes else metric.batch_sizes[0]
    percentile = goal.percentile or (metric.percentiles[0] if metric.percentiles else None)
    return figure_name(metric.name, percentile=percentile, batch_size=batch_size)


def _figures_of(metric: Metric) -> list[str]:
    return [
        figure_name(metric.name, percentile=percentile, batch_size=batch_size)
        for percentile in metric.percentiles or (None,)
        for batch_size in metric.batch_sizes or (None,)
    ]


def _title(metric: Metric, figure: str) -> str:
    """The metric with what its figure adds: "TPOT p90", "throughput at batch size 8"."""
    title = metric.title
    for part in figure.removeprefix(metric.name).split("."):
        if part.startswith("batch_"):
            title += f" at batch size {part.removeprefix('batch_')}"
        elif part:
            title += f" {part}"
    return title


def _goal_checks(metric: Metric, goal: Goal, figure: str, measured: Measured | None, noise: Noise) -> list[Check]:
    noise = noise if metric.aspect == "speed" else QUIET
    title = _title(metric, figure)
    rise, fall = f"{title} increase", f"{title} decrease"
    worse, better = (rise, fall) if metric.better == "lower" else (fall, rise)
    checks = []
    for name, limit in goal.bounds().items():
        in_percent = name.endswith("_percent")
        unit = "%" if in_percent else metric.unit
        bound: Bound = "max" if name.startswith("max") else "min"
        if name in ("max", "min"):
            what = title
            widened = _scaled(measured.value if measured else None, noise)
        else:
            loss = (measured.degradation_percent if in_percent else measured.degradation) if measured else None
            base = 100.0 if in_percent else (measured.original if measured else None)
            loss = _widened_loss(loss, base, metric, noise)
            improves = name.startswith("min_improvement")
            what = better if improves else worse
            widened = scaled(loss, -1) if improves and loss else loss
        checks.append(
            _check(
                what,
                figure,
                bound,
                limit,
                widened,
                unit,
                noisy=noise != QUIET,
                too_few=measured.too_few if measured else "",
                confidence=measured.confidence if measured else CONFIDENCE,
            )
        )
    return checks


def _never_slower_checks(metric: Metric, figures: Figures, noise: Noise) -> list[Check]:
    checks = []
    for batch_size in metric.batch_sizes:
        figure = figure_name(metric.name, batch_size=batch_size)
        measured = figures.get(figure)
        ratio = measured.value if measured else None
        confidence = measured.confidence if measured else CONFIDENCE
        title = f"{metric.title}, batch size {batch_size}"
        ratio = _scaled(ratio, noise)
        checks.append(_check(title, figure, "min", 1.0, ratio, "×", noisy=noise != QUIET, confidence=confidence))
    return checks


def _scaled(estimate: Estimate | None, noise: Noise) -> Estimate | None:
    if estimate is None or noise == QUIET:
        return estimate
    low = None if estimate.low is None else estimate.low * noise[0]
    high = None if estimate.high is None else estimate.high * noise[1]
    return estimate.model_copy(update={"low": low, "high": high})


def _widened_loss(loss: Estimate | None, base: float | None, metric: Metric, noise: Noise) -> Estimate | None:
    """A degradation whose interval is widened as that of the ratio (candidate / original) it stands for."""
    if loss is None or noise == QUIET or base is None or loss.low is None or loss.high is None:
        return loss
    sign = 1.0 if metric.better == "lower" else -1.0
    ends = [1 + sign * end / base for end in (loss.low, loss.high)]
    ratios = (min(ends) * noise[0], max(ends) * noise[1])
    losses = [sign * (ratio - 1) * base for ratio in ratios]
    return loss.model_copy(update={"low": min(losses), "high": max(losses)})


def _check(
    metric: str,
    figure: str,
    bound: Bound,
    limit: float,
    estimate: Estimate | None,
    unit: str,
    *,
    noisy: bool = False,
    too_few: str = "",
    confidence: float = CONFIDENCE,
) -> Check:
    """A limit held against an estimate."""
    told: dict[str, Any] = {
        "metric": metric,
        "figure": figure,
        "bound": bound,
        "limit": limit,
        "unit": unit,
        "confidence": confidence,
    }
    if estimate is None:
        sentence = f"{_capital(metric)} was not measured."
        return Check(measured=None, verdict="INCONCLUSIVE", sentence=sentence, **told)
    value, low, high = estimate.value, estimate.low, estimate.high
    if not math.isfinite(value):
        sentence = f"{_capital(metric)} is {value}, no number to judge: its engine or its weights are broken."
        return Check(measured=value, verdict="REJECT", sentence=sentence, **told)
    if too_few:
        sentence = f"{_capital(metric)}: {too_few}"
        return Check(measured=value, low=low, high=high, verdict="INCONCLUSIVE", sentence=sentence, **told)
    verdict: Literal["ACCEPT", "REJECT", "INCONCLUSIVE"] = "INCONCLUSIVE"
    above = low is not None and (low > limit if bound == "max" else low >= limit)
    below = high is not None and (high <= limit if bound == "max" else high < limit)
    if above or below:  # an interval that is open at its other end says as much
        verdict = "ACCEPT" if above == (bound == "min") else "REJECT"
    interval = "" if low == high and low is not None else _interval(estimate, confidence)
    interval += ", widened because the machine was noisy" if noisy and interval else ""
    needed = num_needed(estimate, limit) if verdict == "INCONCLUSIVE" else None
    what = {"ACCEPT": "keeps", "REJECT": "breaks", "INCONCLUSIVE": "may or may not keep"}[verdict]
    side = "at most" if bound == "max" else "at least"
    shown = f"{value:.4g}{_suffix(unit)}" + (f" ({interval})" if interval else "")
    return Check(
        measured=value,
        low=low,
        high=high,
        verdict=verdict,
        can_be_settled=verdict == "INCONCLUSIVE",
        sentence=f"{_capital(metric)} of {shown} {what} the limit of {side} {limit:.4g}{_suffix(unit)}."
        + _more(estimate, needed),
        **told,
    )


def _more(estimate: Estimate, needed: int | None) -> str:
    """How much more would decide, in a sentence after a space; nothing where that cannot be said."""
    if estimate.num is not None and estimate.num < MIN_CLUSTERS:
        return f" An interval needs at least {MIN_CLUSTERS} documents or blocks; it rests on {estimate.num}."
    if needed is None or estimate.num is None or needed <= estimate.num:
        return ""
    return f" It rests on {estimate.num} documents or blocks; about {needed} would decide if the figures stayed."


def _interval(estimate: Estimate, confidence: float = CONFIDENCE) -> str:
    if estimate.low is None and estimate.high is None:
        return "interval unknown"
    low = "(-∞" if estimate.low is None else f"[{estimate.low:.4g}"
    high = "∞)" if estimate.high is None else f"{estimate.high:.4g}]"
    return f"{100 * confidence:.3g} % {low}, {high}"


def _suffix(unit: str) -> str:
    return unit if unit == "×" or not unit else f" {unit}"


def _capital(text: str) -> str:
    return text if text[:2].isupper() else text[:1].upper() + text[1:]
