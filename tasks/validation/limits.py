"""Limits a candidate has to keep, and the verdict: ACCEPT, REJECT or INCONCLUSIVE.

A limit is kept when the *whole* interval of the measured figure lies on its good side, broken when the whole interval
lies on the bad side, and otherwise not decided: measuring more narrows the interval. So "quality is not worse by more
than 1 %" is accepted only when a loss of 1 % is ruled out (non-inferiority), not when no loss was found.
"""

from typing import Literal

from pydantic import BaseModel, Field

from tasks.validation.latency import Speed, SpeedSummary, SubjectSpeed
from tasks.validation.quality import Quality, QualitySummary
from tasks.validation.statistics import MIN_FOR_P99, Estimate, Percentiles, exactly

Verdict = Literal["ACCEPT", "REJECT", "INCONCLUSIVE"]
QUALITY_METRICS = ("perplexity", "top1_agreement", "kl")
SPEED_METRICS = ("tpot_ms", "ttft_ms", "peak_memory_mib", "throughput_tokens_per_s", "never_slower_than")


class MaxIncrease(BaseModel, frozen=True, extra="forbid"):
    """A bound on how much worse than the original."""

    max_increase_percent: float = Field(ge=0, description="Over the original on the same windows.")


class AtMost(BaseModel, frozen=True, extra="forbid"):
    """An upper bound."""

    max: float = Field(gt=0)


class LatencyAtMost(BaseModel, frozen=True, extra="forbid"):
    """An upper bound of a percentile over requests, at batch size 1."""

    max: float = Field(gt=0, description="Milliseconds.")
    percentile: Literal["p50", "p90", "p99"] = Field(
        "p50", description=f"p99 needs speed.num_blocks of {MIN_FOR_P99} or more."
    )


class AgreementAtLeast(BaseModel, frozen=True, extra="forbid"):
    """A lower bound of a fraction."""

    min: float = Field(ge=0, le=1, description="Fraction of positions, 0 to 1.")


class ThroughputAtLeast(BaseModel, frozen=True, extra="forbid"):
    """A lower bound of throughput."""

    min: float = Field(gt=0, description="Completed output tokens per second, prompts included in the time.")
    batch_size: int = Field(1, ge=1, description="One of speed.batch_sizes.")


class Limits(BaseModel, frozen=True, extra="forbid"):
    """What every candidate has to keep; what is left out is measured but not judged."""

    perplexity: MaxIncrease | None = None
    top1_agreement: AgreementAtLeast | None = Field(None, description="Agreement with the original.")
    kl: AtMost | None = Field(None, description="Mean KL(original ‖ candidate) in nats.")
    tpot_ms: LatencyAtMost | None = Field(None, description="Time per output token after the first.")
    ttft_ms: LatencyAtMost | None = Field(None, description="Time to first token.")
    throughput_tokens_per_s: ThroughputAtLeast | None = None
    never_slower_than: Literal["original", "unquantized"] | None = Field(
        None,
        description="Throughput at every measured batch size, prompts included, must not be below that of the original "
        "in PyTorch, or of the unquantized original in the same engine.",
    )
    peak_memory_mib: AtMost | None = Field(None, description="Largest resident set of the serving process.")
    size_mib: AtMost | None = Field(None, description="Of the engine bundle on disk.")
    size_bytes: AtMost | None = None

    def metrics(self) -> tuple[str, ...]:
        """Names of the limits that are set; empty when nothing is judged."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)


class Check(BaseModel, frozen=True, extra="forbid"):
    """One limit held against one candidate."""

    metric: str
    bound: Literal["max", "min"]
    limit: float
    measured: float | None = Field(description="None: not measured.")
    low: float | None = Field(None, description="Of the interval that was judged.")
    high: float | None = None
    unit: str
    verdict: Verdict
    sentence: str


class Judgement(BaseModel, frozen=True, extra="forbid"):
    """A candidate's verdict and what it rests on."""

    verdict: Verdict
    checks: tuple[Check, ...]
    sentence: str


def unmeasurable(limits: Limits, speed: Speed | None, quality: Quality | None = Quality()) -> list[str]:  # noqa: B008
    """A sentence for every limit on something that these options do not measure; empty when all can be judged."""
    problems = []
    for metric in limits.metrics():
        for what, metrics, options in (("speed", SPEED_METRICS, speed), ("quality", QUALITY_METRICS, quality)):
            if metric in metrics and options is None:
                problems.append(
                    f"limits.{metric} needs measured {what}; validation.{what} is null. Set it, or drop the limit."
                )
    throughput = limits.throughput_tokens_per_s
    if speed and throughput and throughput.batch_size not in speed.batch_sizes:
        problems.append(
            f"limits.throughput_tokens_per_s needs a measured batch size; got {throughput.batch_size}, but "
            f"speed.batch_sizes are {', '.join(map(str, speed.batch_sizes))}. Add it there, or change the limit."
        )
    for metric in ("tpot_ms", "ttft_ms"):
        limit = getattr(limits, metric)
        if speed and limit and limit.percentile == "p99" and speed.num_blocks < MIN_FOR_P99:
            problems.append(
                f"limits.{metric} on p99 needs at least {MIN_FOR_P99} requests; speed.num_blocks is "
                f"{speed.num_blocks}. Raise it, or limit p90."
            )
    return problems


def judge(
    limits: Limits, name: str, *, quality: QualitySummary | None, speed: SpeedSummary | None, size_bytes: int | None
) -> Judgement:
    """The verdict on a candidate.

    Args:
        limits: of the recipe.
        name: of the candidate among the subjects of `speed`.
        quality: None: not measured (an engine that cannot run here).
        speed: None, or without this subject: not measured.
        size_bytes: of the engine bundle.
    """
    checks = _quality_checks(limits, quality)
    checks += _speed_checks(limits, speed, None if speed is None else speed.subjects.get(name))
    size = None if size_bytes is None else exactly(size_bytes / 2**20)
    if limits.size_mib:
        checks.append(_check("size", "max", limits.size_mib.max, size, "MiB"))
    if limits.size_bytes:
        size = None if size_bytes is None else exactly(size_bytes)
        checks.append(_check("size", "max", limits.size_bytes.max, size, "bytes"))
    return conclude(checks)


def conclude(checks: list[Check]) -> Judgement:
    """REJECT if any check rejects, else INCONCLUSIVE if any does not decide or none was made, else ACCEPT."""
    if not checks:
        sentence = "No limits were set, so nothing was judged."
        return Judgement(verdict="INCONCLUSIVE", checks=(), sentence=sentence)
    for verdict, says in (("REJECT", "broken"), ("INCONCLUSIVE", "not decided")):
        found = [check for check in checks if check.verdict == verdict]
        if found:
            count = f"{len(found)} of {len(checks)} limits {'is' if len(found) == 1 else 'are'} {says}."
            sentence = " ".join([count, *(check.sentence for check in found)])
            return Judgement(verdict=found[0].verdict, checks=tuple(checks), sentence=sentence)
    count = "the one limit" if len(checks) == 1 else f"all {len(checks)} limits"
    return Judgement(verdict="ACCEPT", checks=tuple(checks), sentence=f"It keeps {count}, whole intervals included.")


def _quality_checks(limits: Limits, quality: QualitySummary | None) -> list[Check]:
    checks = []
    if limits.perplexity:
        increase = None if quality is None else quality.perplexity_increase_percent
        checks.append(_check("perplexity increase", "max", limits.perplexity.max_increase_percent, increase, "%"))
    if limits.top1_agreement:
        agreement = None if quality is None else quality.top1_agreement
        checks.append(_check("top-1 agreement", "min", limits.top1_agreement.min, agreement, ""))
    if limits.kl:
        kl = None if quality is None else quality.kl_nats
        checks.append(_check("KL from the original", "max", limits.kl.max, kl, "nats"))
    return checks


def _speed_checks(limits: Limits, summary: SpeedSummary | None, subject: SubjectSpeed | None) -> list[Check]:
    checks = []
    noise = _noise(summary)
    for metric in ("ttft_ms", "tpot_ms"):
        limit: LatencyAtMost | None = getattr(limits, metric)
        if limit:
            measured: Percentiles | None = None if subject is None else getattr(subject, metric)
            checks.append(_latency_check(metric, limit, measured, noise))
    if limits.throughput_tokens_per_s:
        batch_size = limits.throughput_tokens_per_s.batch_size
        at = None if subject is None else subject.throughput.get(batch_size)
        metric = f"throughput at batch size {batch_size}"
        rate = None if at is None else at.tokens_per_s
        checks.append(_check(metric, "min", limits.throughput_tokens_per_s.min, rate, "tokens/s", noise))
    if limits.never_slower_than:
        checks += _never_slower_checks(limits.never_slower_than, subject, noise)
    if limits.peak_memory_mib:
        memory = None if subject is None else exactly(subject.peak_memory_mib)
        checks.append(_check("peak memory", "max", limits.peak_memory_mib.max, memory, "MiB"))
    return checks


def _latency_check(
    metric: str, limit: LatencyAtMost, measured: Percentiles | None, noise: tuple[float, float]
) -> Check:
    name = f"{metric.removesuffix('_ms').upper()} {limit.percentile}"
    estimate: Estimate | None = None if measured is None else getattr(measured, limit.percentile)
    if measured and limit.percentile == "p99" and not measured.p99_supported and estimate:
        sentence = f"{name} needs {MIN_FOR_P99} requests; {measured.num} were timed."
        return Check(
            metric=name,
            bound="max",
            limit=limit.max,
            measured=estimate.value,
            unit="ms",
            verdict="INCONCLUSIVE",
            sentence=sentence,
        )
    return _check(name, "max", limit.max, estimate, "ms", noise)


def _never_slower_checks(
    than: Literal["original", "unquantized"], subject: SubjectSpeed | None, noise: tuple[float, float]
) -> list[Check]:
    label = "the original" if than == "original" else "the unquantized original in the same engine"
    if subject is None:
        return [_check(f"throughput relative to {label}", "min", 1.0, None, "×")]
    checks = []
    for batch_size, at in subject.throughput.items():
        ratio = at.ratio_to_original if than == "original" else at.ratio_to_baseline
        metric = f"throughput relative to {label}, batch size {batch_size}"
        checks.append(_check(metric, "min", 1.0, ratio, "×", noise))
    return checks


def _noise(summary: SpeedSummary | None) -> tuple[float, float]:
    """Factors by which the original's ratio to itself strayed from 1 on a noisy machine; (1, 1) on a quiet one."""
    if summary is None or not summary.noisy:
        return 1.0, 1.0
    ratios = (summary.control.ttft_ratio, summary.control.tpot_ratio, summary.control.throughput_ratio)
    lows = [ratio.low for ratio in ratios if ratio.low is not None]
    highs = [ratio.high for ratio in ratios if ratio.high is not None]
    return min([1.0, *lows]), max([1.0, *highs])


def _check(
    metric: str,
    bound: Literal["max", "min"],
    limit: float,
    estimate: Estimate | None,
    unit: str,
    noise: tuple[float, float] = (1.0, 1.0),
) -> Check:
    """A limit held against an estimate, whose interval is widened by what the machine's noise does to a ratio."""
    if estimate is None:
        return Check(
            metric=metric,
            bound=bound,
            limit=limit,
            measured=None,
            unit=unit,
            verdict="INCONCLUSIVE",
            sentence=f"{_capital(metric)} was not measured.",
        )
    low = None if estimate.low is None else estimate.low * noise[0]
    high = None if estimate.high is None else estimate.high * noise[1]
    verdict: Verdict = "INCONCLUSIVE"
    if low is not None and high is not None:
        good, bad = (high <= limit, low > limit) if bound == "max" else (low >= limit, high < limit)
        verdict = "ACCEPT" if good else "REJECT" if bad else "INCONCLUSIVE"
    widened = ", widened because the machine was noisy" if noise != (1.0, 1.0) else ""
    interval = "interval unknown" if low is None or high is None else f"95 % [{low:.4g}, {high:.4g}]{widened}"
    if low == high:
        interval = ""
    what = {"ACCEPT": "keeps", "REJECT": "breaks", "INCONCLUSIVE": "may or may not keep"}[verdict]
    side = "at most" if bound == "max" else "at least"
    shown = f"{estimate.value:.4g}{_suffix(unit)}" + (f" ({interval})" if interval else "")
    return Check(
        metric=metric,
        bound=bound,
        limit=limit,
        measured=estimate.value,
        low=low,
        high=high,
        unit=unit,
        verdict=verdict,
        sentence=f"{_capital(metric)} of {shown} {what} the limit of {side} {limit:.4g}{_suffix(unit)}.",
    )


def _suffix(unit: str) -> str:
    return unit if unit == "×" or not unit else f" {unit}"


def _capital(text: str) -> str:
    return text if text[:2].isupper() else text[:1].upper() + text[1:]
