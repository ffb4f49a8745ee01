"""Intervals for measured figures: bootstrap over what was sampled independently (documents, blocks of time).

Tokens of a document resemble each other, and so do repetitions that follow each other on one machine. Resampling
single tokens or repetitions would treat them as independent and promise intervals that are several times too narrow;
so whole documents and whole blocks are resampled (Miller, Adding Error Bars to Evals, 2024, arXiv:2411.00640,
clustered standard errors). What is compared is compared in pairs: the same documents, the same blocks.

A bootstrap of few clusters is too sure of itself: of three blocks, two intervals that differ where nothing does in four
simulated comparisons. So below `MIN_FOR_BOOTSTRAP` blocks or `MIN_DOCUMENTS_FOR_BOOTSTRAP` documents Student's t takes
its place, on the clusters' own values.

Intervals are two-sided, so each one-sided decision made with a 95 % interval errs at most once in forty.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, Field
from scipy import special

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 4000
INTERPOLATION: Final = "linear"
"""How percentiles between two observations are taken: Hyndman & Fan's type 7, numpy's and R's default."""
MIN_FOR_BOOTSTRAP = 8
MIN_DOCUMENTS_FOR_BOOTSTRAP = 30
"""Documents differ in length, which costs the bootstrap more than blocks of equal size do."""
MIN_CLUSTERS = 2
MIN_FOR_P99 = 1000
MIN_OBSERVATIONS: Final = {"p50": 1, "p90": 36, "p95": 72, "p99": MIN_FOR_P99}
"""Of fewer, no interval of the percentile holds 95 %: the largest of n lies below the p-th percentile with probability
p^n, and that has to be below 2.5 %. For p99 it would be 368; of fewer than 1000, less than ten lie above it."""


class Estimate(BaseModel, frozen=True, extra="forbid"):
    """A measured figure and the interval that covers its true value with 95 % confidence, or another that is stated."""

    value: float
    low: float | None = Field(description="None: one document or block only, which says nothing about the next one.")
    high: float | None
    num: int | None = Field(None, description="Documents or blocks that it rests on; None: counted, or not known.")


class Percentiles(BaseModel, frozen=True, extra="forbid"):
    """Percentiles of a latency, interpolated linearly (type 7), each with its interval."""

    num: int = Field(description="Observations.")
    p50: Estimate
    p90: Estimate
    p95: Estimate
    p99: Estimate
    p99_supported: bool = Field(description=f"False below {MIN_FOR_P99} observations: p99 is close to the maximum.")

    def too_few(self, percentile: str) -> str:
        """Why the interval of a percentile ("p90") says nothing, as a sentence; "" where it does."""
        needed = MIN_OBSERVATIONS[percentile]
        return f"needs {needed} requests; {self.num} were timed." if self.num < needed else ""


class Paired(BaseModel, frozen=True, extra="forbid"):
    """Two models right or wrong on the same items, such as questions."""

    difference: Estimate = Field(description="Candidate's fraction right less the original's; negative: worse.")
    p_value: float = Field(description="McNemar's exact test of no difference, two-sided.")
    num: int = Field(description="Items.")
    num_lost: int = Field(description="Right by the original alone.")
    num_gained: int = Field(description="Right by the candidate alone.")


def exactly(value: float) -> Estimate:
    """An estimate of what was counted, not sampled."""
    return Estimate(value=value, low=value, high=value)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate in another unit; `factor` may be negative, which changes the ends' places."""
    ends = [None if end is None else factor * end for end in (estimate.low, estimate.high)]
    low, high = ends if factor >= 0 else ends[::-1]
    return estimate.model_copy(update={"value": factor * estimate.value, "low": low, "high": high})


# Quality: sums over documents


def bootstrap_ratio_of_sums(
    numerators: ArrayLike,
    denominators: ArrayLike,
    clusters: ArrayLike,
    *,
    seed: int,
    transform: Callable[[Any], Any] = lambda x: x,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """`transform(sum of numerators / sum of denominators)`, with its interval from resampled clusters.

    With per-window losses and token counts and `transform=np.exp` this is perplexity; with the *differences* of two
    models' losses on the same windows it is their paired comparison.

    Args:
        numerators: [N].
        denominators: [N], positive.
        clusters: [N] int, which cluster (document) each belongs to; clusters are resampled whole.
        transform: monotonically increasing and element-wise.
    """
    above, below = _sums(numerators, clusters), _sums(denominators, clusters)
    num_clusters = len(above)
    ratio = np.float64(above.sum() / below.sum())
    if num_clusters < MIN_DOCUMENTS_FOR_BOOTSTRAP:
        low, high = _t_interval_of_ratio(above, below, confidence)
        return _ordered(float(transform(ratio)), transform(low), transform(high), num_clusters)
    counts = _counts(num_clusters, num_resamples, seed)
    samples = transform((counts @ above) / (counts @ below))
    return _from_samples(float(transform(ratio)), samples, num_clusters, confidence)


def bootstrap_difference_of_ratios(
    numerators: ArrayLike,
    other_numerators: ArrayLike,
    denominators: ArrayLike,
    clusters: ArrayLike,
    *,
    seed: int,
    transform: Callable[[Any], Any] = lambda x: x,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """`transform(numerators / denominators) - transform(other_numerators / denominators)` of sums, in pairs.

    With the losses of two models and `transform=np.exp` it is by how much the first one's perplexity is higher.

    Args:
        numerators: [N].
        other_numerators: [N], of the same items.
        denominators: [N], positive.
        clusters: [N] int, which cluster (document) each belongs to; clusters are resampled whole.
        transform: element-wise; near linear over the spread of the clusters, where there are few.
    """
    above, other = _sums(numerators, clusters), _sums(other_numerators, clusters)
    below = _sums(denominators, clusters)
    num_clusters = len(above)
    first, second = above.sum() / below.sum(), other.sum() / below.sum()
    value = float(transform(first) - transform(second))
    if num_clusters < MIN_DOCUMENTS_FOR_BOOTSTRAP:
        low, high = _t_interval_of_ratio(above - other, below, confidence)
        slope = value / (first - second) if first != second else 0.0
        return _ordered(value, slope * low, slope * high, num_clusters)
    counts = _counts(num_clusters, NUM_RESAMPLES, seed)
    weights = counts @ below
    samples = transform((counts @ above) / weights) - transform((counts @ other) / weights)
    return _from_samples(value, samples, num_clusters, confidence)


def paired_increase_percent(
    candidate_nll: ArrayLike,
    original_nll: ArrayLike,
    num_tokens: ArrayLike,
    documents: ArrayLike,
    *,
    seed: int,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """By how many percent the candidate's perplexity exceeds the original's on the same windows; negative: is lower.

    Args:
        candidate_nll: [num_windows], total negative log-likelihood of each window in nats.
        original_nll: [num_windows], the same of the original.
        num_tokens: [num_windows], predicted tokens.
        documents: [num_windows] int, which document each window comes from.
    """
    difference = np.asarray(candidate_nll, np.float64) - np.asarray(original_nll, np.float64)
    return bootstrap_ratio_of_sums(
        difference, num_tokens, documents, seed=seed, transform=lambda x: 100 * np.expm1(x), confidence=confidence
    )


def paired_proportions(candidate: ArrayLike, original: ArrayLike, *, confidence: float = CONFIDENCE) -> Paired:
    """Two models on the same independent items, each right or wrong: McNemar's exact test, and the difference.

    The test: of the items where just one is right, as many should be the one's as the other's (McNemar, Psychometrika
    1947; the exact form is the binomial test). The interval: Newcombe, Statistics in Medicine 17 (1998), method 10,
    Wilson's score intervals joined with their correlation, corrected for continuity; it keeps its width when no item
    differs, where the bootstrap's is zero.

    Args:
        candidate: [num_items] bool.
        original: [num_items] bool.

    Raises:
        ValueError: there are no items.
    """
    from scipy.stats import binomtest

    right, right_before = np.asarray(candidate, bool), np.asarray(original, bool)
    num = len(right)
    if not num:
        raise ValueError("A comparison needs at least one item; got none. Give an evaluation set that is not empty.")
    gained, lost = int((right & ~right_before).sum()), int((~right & right_before).sum())
    both, neither = int((right & right_before).sum()), int((~right & ~right_before).sum())
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    p, q = right.mean(), right_before.mean()
    (p_low, p_high), (q_low, q_high) = (wilson(int(x.sum()), num, confidence) for x in (right, right_before))
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    agreement: float = both * neither - gained * lost
    if agreement > 0:
        agreement = max(agreement - num / 2, 0)
    phi = agreement / math.sqrt(margins) if margins else 0.0
    below = (p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    above = (q - q_low) ** 2 - 2 * phi * (q - q_low) * (p_high - p) + (p_high - p) ** 2
    value = float(p - q)
    difference = Estimate(
        value=value, low=value - math.sqrt(max(0.0, below)), high=value + math.sqrt(max(0.0, above)), num=num
    )
    return Paired(difference=difference, p_value=p_value, num=num, num_lost=lost, num_gained=gained)


def wilson(num_right: int, num: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, JASA 22, 1927)."""
    z = float(special.ndtri(0.5 + confidence / 2))
    centre = (num_right + z * z / 2) / (num + z * z)
    half = z / (num + z * z) * math.sqrt(num_right * (num - num_right) / num + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


# Speed: blocks of time


def percentiles(blocks: Floats, *, seed: int, confidence: float = CONFIDENCE) -> Percentiles:
    """p50, p90, p95 and p99 of all observations, with intervals from resampled blocks.

    Args:
        blocks: [num_blocks, observations per block].
    """
    resampled = blocks[_resampled_blocks(len(blocks), seed)].reshape(NUM_RESAMPLES, -1)
    points = (90, 95, 99)
    values = np.percentile(blocks, points, method=INTERPOLATION)
    samples = np.percentile(resampled, points, axis=1, method=INTERPOLATION)
    p90, p95, p99 = (_from_samples(float(v), s, len(blocks), confidence) for v, s in zip(values, samples, strict=True))
    p50 = median(blocks, seed=seed, confidence=confidence)
    return Percentiles(num=blocks.size, p50=p50, p90=p90, p95=p95, p99=p99, p99_supported=blocks.size >= MIN_FOR_P99)


def median(blocks: Floats, *, seed: int, confidence: float = CONFIDENCE) -> Estimate:
    """The median of all observations [num_blocks, observations per block], positive; interval from resampled blocks."""
    value = float(np.median(blocks))
    if len(blocks) < MIN_FOR_BOOTSTRAP:
        return _geometric(value, [_log_medians(blocks)], [], confidence)
    return _from_samples(value, _percentile_samples(blocks, 50, seed), len(blocks), confidence)


def ratio_of_medians(
    numerator: Floats, denominator: Floats, *, seed: int, paired: bool = True, confidence: float = CONFIDENCE
) -> Estimate:
    """median(numerator) / median(denominator), interval from resampled blocks.

    Args:
        numerator: [num_blocks, observations per block], positive.
        denominator: [num_blocks, observations per block], positive.
        paired: row i of both was measured in the same block, so that rows are resampled together and what slowed the
            machine down in a block cancels; False resamples them independently.
    """
    num_blocks = min(len(numerator), len(denominator))
    if num_blocks < MIN_FOR_BOOTSTRAP:
        value = float(np.median(numerator) / np.median(denominator))
        above, below = _log_medians(numerator), _log_medians(denominator)
        if paired:
            return _geometric(value, [above - below], [], confidence)
        return _geometric(value, [above], [below], confidence)
    return ratio_of_percentiles(numerator, denominator, 50, seed=seed, paired=paired, confidence=confidence)


def ratio_of_percentiles(
    numerator: Floats,
    denominator: Floats,
    point: float,
    *,
    seed: int,
    paired: bool = True,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """percentile(numerator) / percentile(denominator), interval from resampled blocks; `point` is 99 for p99.

    Args as of `ratio_of_medians`. The interval is None below eight blocks, where a bootstrap is too sure of itself.
    """
    values = [float(np.percentile(blocks, point, method=INTERPOLATION)) for blocks in (numerator, denominator)]
    num_blocks = min(len(numerator), len(denominator))
    if num_blocks < MIN_FOR_BOOTSTRAP:
        return Estimate(value=values[0] / values[1], low=None, high=None, num=num_blocks)
    above = _percentile_samples(numerator, point, seed)
    below = _percentile_samples(denominator, point, seed if paired else seed + 1)
    return _from_samples(values[0] / values[1], above / below, num_blocks, confidence)


def ratio_through_control(
    numerator: Floats,
    its_control: Floats,
    denominator: Floats,
    other_control: Floats,
    *,
    seed: int,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Ratio of two subjects that ran at different times, each divided by the control that ran beside it.

    Args:
        numerator: [num_blocks, observations], measured in the same blocks as `its_control`.
        its_control: [num_blocks, observations].
        denominator: [other num_blocks, observations], measured in the same blocks as `other_control`.
        other_control: [other num_blocks, observations].
    """
    value = float(np.median(numerator) / np.median(its_control) / (np.median(denominator) / np.median(other_control)))
    num_blocks = min(len(numerator), len(denominator))
    if num_blocks < MIN_FOR_BOOTSTRAP:
        logs = [_log_medians(blocks) for blocks in (numerator, its_control, denominator, other_control)]
        return _geometric(value, [logs[0] - logs[1]], [logs[2] - logs[3]], confidence)
    above = _percentile_samples(numerator, 50, seed) / _percentile_samples(its_control, 50, seed)
    below = _percentile_samples(denominator, 50, seed + 1) / _percentile_samples(other_control, 50, seed + 1)
    return _from_samples(value, above / below, num_blocks, confidence)


# Several looks at growing data


def confidence_of_look(num_looks: int, confidence: float = CONFIDENCE) -> float:
    """The confidence of each interval where data may be looked at `num_looks` times before they decide.

    Bonferroni: the error of all looks together is at most the sum of theirs. Boundaries that know how looks depend on
    each other (Pocock, Biometrika 64, 1977) need 2.18 standard errors at two looks where this needs 2.24; this one
    holds for any figures and any sizes of the rounds.
    """
    return 1 - (1 - confidence) / num_looks


def num_needed(estimate: Estimate, limit: float) -> int | None:
    """How many documents or blocks would decide if figure and spread stayed: half the width falls as their root.

    None where nothing can be said: the figure is the limit, or there is no interval.
    """
    if estimate.num is None or estimate.low is None or estimate.high is None or estimate.value == limit:
        return None
    half = estimate.high - estimate.value if limit > estimate.value else estimate.value - estimate.low
    return math.ceil(estimate.num * (half / abs(limit - estimate.value)) ** 2)


# Below: resampling, and its place where clusters are few


def _sums(values: ArrayLike, clusters: ArrayLike) -> Floats:
    """[num_clusters], the sum of `values` [N] in each cluster [N]."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.asarray(np.bincount(index, weights=np.asarray(values, np.float64)), np.float64)


def _counts(num_clusters: int, num_resamples: int, seed: int) -> NDArray[np.int64]:
    """[num_resamples, num_clusters], how often each cluster was drawn; equal for equal arguments."""
    return np.random.default_rng(seed).multinomial(num_clusters, [1 / num_clusters] * num_clusters, num_resamples)


def _resampled_blocks(num_blocks: int, seed: int) -> NDArray[np.int64]:
    """[NUM_RESAMPLES, num_blocks], equal for equal arguments: that is what pairs two subjects."""
    return np.random.default_rng(seed).integers(0, num_blocks, (NUM_RESAMPLES, num_blocks))


def _percentile_samples(blocks: Floats, point: float, seed: int) -> Floats:
    resampled = blocks[_resampled_blocks(len(blocks), seed)].reshape(NUM_RESAMPLES, -1)
    if point == 50:
        return np.asarray(np.median(resampled, axis=1), np.float64)
    return np.asarray(np.percentile(resampled, point, axis=1, method=INTERPOLATION), np.float64)


def _log_medians(blocks: Floats) -> Floats:
    """[num_blocks], the logarithm of each block's median."""
    return np.asarray(np.log(np.median(blocks, axis=1)), np.float64)


def _from_samples(value: float, samples: Floats, num_clusters: int, confidence: float) -> Estimate:
    if num_clusters < MIN_CLUSTERS:
        return Estimate(value=value, low=None, high=None, num=num_clusters)
    tail = expanded_tail(num_clusters, confidence)
    low, high = np.quantile(samples, [tail, 1 - tail])
    return _ordered(value, low, high, num_clusters)


def _t_interval_of_ratio(above: Floats, below: Floats, confidence: float) -> tuple[float, float]:
    """The interval of a ratio of sums over few clusters, by Student's t with the jackknife's standard error.

    The jackknife leaves out one cluster at a time (Miller, The Jackknife: A Review, Biometrika 61, 1974), so that a
    large one is known to matter; the usual linearization is too sure of itself there.
    """
    n = len(above)
    if n < MIN_CLUSTERS:
        return math.nan, math.nan
    ratio = above.sum() / below.sum()
    without = (above.sum() - above) / (below.sum() - below)
    error = math.sqrt((n - 1) / n * float(((without - ratio) ** 2).sum()))
    half = float(special.stdtrit(n - 1, 0.5 + confidence / 2)) * error
    return ratio - half, ratio + half


def _geometric(value: float, plus: list[Floats], minus: list[Floats], confidence: float) -> Estimate:
    """`value` with the interval of exp(sum of means of `plus` - of `minus`), by Student's t with Welch's degrees.

    Each array holds logarithms of independent blocks. Blocks vary by factors, so their logarithms are the nearer to
    normal.
    """
    arrays = [*plus, *minus]
    num_blocks = min(len(array) for array in arrays)
    if num_blocks < MIN_CLUSTERS:
        return Estimate(value=value, low=None, high=None, num=num_blocks)
    mean = sum(float(a.mean()) for a in plus) - sum(float(a.mean()) for a in minus)
    variances = [float(a.var(ddof=1)) / len(a) for a in arrays]
    total = sum(variances)
    spread = sum(v**2 / (len(a) - 1) for v, a in zip(variances, arrays, strict=True))
    degrees = total**2 / spread if spread else num_blocks - 1
    half = float(special.stdtrit(degrees, 0.5 + confidence / 2)) * math.sqrt(total)
    return _ordered(value, math.exp(mean - half), math.exp(mean + half), num_blocks)


def _ordered(value: float, low: Any, high: Any, num_clusters: int) -> Estimate:
    """An estimate whose interval holds its value; none of a single cluster."""
    if num_clusters < MIN_CLUSTERS:
        return Estimate(value=value, low=None, high=None, num=num_clusters)
    low, high = sorted((float(low), float(high)))
    return Estimate(value=value, low=min(low, value), high=max(high, value), num=num_clusters)


def expanded_tail(num_clusters: int, confidence: float = CONFIDENCE) -> float:
    """Which tail probability of the bootstrap distribution bounds the interval.

    Plain percentile intervals of few clusters are too narrow: the bootstrap's variance lacks the factor n / (n - 1),
    and its shape is the normal's where Student's is due. The expanded percentile interval mends both: Hesterberg, What
    Teachers Should Know About the Bootstrap, The American Statistician 69 (2015).
    """
    n = num_clusters
    t = float(special.stdtrit(n - 1, 0.5 + confidence / 2))
    return float(special.ndtr(-math.sqrt(n / (n - 1)) * t))
