"""Intervals for measured figures: bootstrap over what was sampled independently (documents, blocks of time).

Tokens of a document resemble each other, and so do repetitions that follow each other on one machine. Resampling
single tokens or repetitions would treat them as independent and promise intervals that are several times too narrow;
so whole documents and whole blocks are resampled (Miller, Adding Error Bars to Evals, 2024, arXiv:2411.00640,
clustered standard errors). What is compared is compared in pairs: the same documents, the same blocks.

Intervals are two-sided, so each one-sided decision made with a 95 % interval errs at most once in forty.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, Field

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 4000
INTERPOLATION: Final = "linear"
"""How percentiles between two observations are taken: Hyndman & Fan's type 7, numpy's and R's default."""
MIN_FOR_P99 = 1000
"""Fewer observations leave less than ten above the 99th percentile, and no usable interval for it."""


class Estimate(BaseModel, frozen=True, extra="forbid"):
    """A measured figure and the interval that covers its true value with 95 % confidence."""

    value: float
    low: float | None = Field(description="None: one document or block only, which says nothing about the next one.")
    high: float | None


class Percentiles(BaseModel, frozen=True, extra="forbid"):
    """Percentiles of a latency, interpolated linearly (type 7), each with its interval."""

    num: int = Field(description="Observations.")
    p50: Estimate
    p90: Estimate
    p99: Estimate
    p99_supported: bool = Field(description=f"False below {MIN_FOR_P99} observations: p99 is close to the maximum.")


def exactly(value: float) -> Estimate:
    """An estimate of what was counted, not sampled."""
    return Estimate(value=value, low=value, high=value)


def bootstrap_ratio_of_sums(
    numerators: ArrayLike,
    denominators: ArrayLike,
    clusters: ArrayLike,
    *,
    seed: int,
    transform: Callable[[Floats], Floats] = lambda x: x,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """`transform(sum of numerators / sum of denominators)`, with its interval from resampled clusters.

    With per-window losses and token counts and `transform=np.exp` this is perplexity; with the *differences* of two
    models' losses on the same windows it is their paired comparison.

    Args:
        numerators: [N].
        denominators: [N], positive.
        clusters: [N] int, which cluster (document) each belongs to; clusters are resampled whole.
        transform: monotone and element-wise.
    """
    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    numerators = np.bincount(index, weights=numerators)
    denominators = np.bincount(index, weights=denominators)
    num_clusters = len(numerators)
    counts = np.random.default_rng(seed).multinomial(num_clusters, [1 / num_clusters] * num_clusters, num_resamples)
    value = float(transform(numerators.sum() / denominators.sum()))
    return _estimate(value, transform((counts @ numerators) / (counts @ denominators)), num_clusters)


def paired_increase_percent(
    candidate_nll: ArrayLike, original_nll: ArrayLike, num_tokens: ArrayLike, documents: ArrayLike, *, seed: int
) -> Estimate:
    """By how many percent the candidate's perplexity exceeds the original's on the same windows; negative: is lower.

    Args:
        candidate_nll: [num_windows], total negative log-likelihood of each window in nats.
        original_nll: [num_windows], the same of the original.
        num_tokens: [num_windows], predicted tokens.
        documents: [num_windows] int, which document each window comes from.
    """
    difference = np.asarray(candidate_nll, np.float64) - np.asarray(original_nll, np.float64)
    return bootstrap_ratio_of_sums(difference, num_tokens, documents, seed=seed, transform=lambda x: 100 * np.expm1(x))


def percentiles(blocks: Floats, *, seed: int) -> Percentiles:
    """p50, p90 and p99 of all observations, with intervals from resampled blocks.

    Args:
        blocks: [num_blocks, observations per block].
    """
    resampled = blocks[_resampled_blocks(len(blocks), seed)].reshape(NUM_RESAMPLES, -1)
    points = (50, 90, 99)
    values = np.percentile(blocks, points, method=INTERPOLATION)
    samples = np.percentile(resampled, points, axis=1, method=INTERPOLATION)
    p50, p90, p99 = (_estimate(float(v), s, len(blocks)) for v, s in zip(values, samples, strict=True))
    return Percentiles(num=blocks.size, p50=p50, p90=p90, p99=p99, p99_supported=blocks.size >= MIN_FOR_P99)


def median(blocks: Floats, *, seed: int) -> Estimate:
    """The median of all observations [num_blocks, observations per block], interval from resampled blocks."""
    return _estimate(float(np.median(blocks)), _median_samples(blocks, seed), len(blocks))


def ratio_of_medians(numerator: Floats, denominator: Floats, *, seed: int, paired: bool = True) -> Estimate:
    """median(numerator) / median(denominator), interval from resampled blocks.

    Args:
        numerator: [num_blocks, observations per block].
        denominator: [num_blocks, observations per block].
        paired: row i of both was measured in the same block, so that rows are resampled together and what slowed the
            machine down in a block cancels; False resamples them independently.
    """
    samples = _median_samples(numerator, seed) / _median_samples(denominator, seed if paired else seed + 1)
    value = float(np.median(numerator) / np.median(denominator))
    return _estimate(value, samples, min(len(numerator), len(denominator)))


def ratio_through_control(
    numerator: Floats, its_control: Floats, denominator: Floats, other_control: Floats, *, seed: int
) -> Estimate:
    """Ratio of two subjects that ran at different times, each divided by the control that ran beside it.

    Args:
        numerator: [num_blocks, observations], measured in the same blocks as `its_control`.
        its_control: [num_blocks, observations].
        denominator: [other num_blocks, observations], measured in the same blocks as `other_control`.
        other_control: [other num_blocks, observations].
    """
    above = _median_samples(numerator, seed) / _median_samples(its_control, seed)
    below = _median_samples(denominator, seed + 1) / _median_samples(other_control, seed + 1)
    value = np.median(numerator) / np.median(its_control) / (np.median(denominator) / np.median(other_control))
    return _estimate(float(value), above / below, min(len(numerator), len(denominator)))


def _resampled_blocks(num_blocks: int, seed: int) -> NDArray[np.int64]:
    """[NUM_RESAMPLES, num_blocks], equal for equal arguments: that is what pairs two subjects."""
    return np.random.default_rng(seed).integers(0, num_blocks, (NUM_RESAMPLES, num_blocks))


def _median_samples(blocks: Floats, seed: int) -> Floats:
    resampled = blocks[_resampled_blocks(len(blocks), seed)].reshape(NUM_RESAMPLES, -1)
    return np.asarray(np.median(resampled, axis=1), np.float64)


def _estimate(value: float, samples: Floats, num_clusters: int) -> Estimate:
    if num_clusters < 2:
        return Estimate(value=value, low=None, high=None)
    tail = expanded_tail(num_clusters)
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Estimate(value=value, low=float(min(low, value)), high=float(max(high, value)))


def expanded_tail(num_clusters: int, confidence: float = CONFIDENCE) -> float:
    """Which tail probability of the bootstrap distribution bounds the interval.

    Plain percentile intervals of few clusters are too narrow: the bootstrap's variance lacks the factor n / (n - 1),
    and its shape is the normal's where Student's is due. The expanded percentile interval mends both: Hesterberg, What
    Teachers Should Know About the Bootstrap, The American Statistician 69 (2015).
    With two or three clusters it is the whole range of resampled values, and still falls short.
    """
    n = num_clusters
    t = student_t_quantile(0.5 + confidence / 2, n - 1)
    return NormalDist().cdf(-math.sqrt(n / (n - 1)) * t)


def student_t_quantile(probability: float, degrees: int) -> float:
    """The value below which Student's t with `degrees` degrees of freedom lies with `probability` in [0.5, 1).

    By Simpson's rule on the density after t = sqrt(degrees) tan(u), which is cos(u)^(degrees - 1) up to its integral.
    """
    u = np.linspace(0, min(math.pi / 2, 40 / math.sqrt(degrees)), 20001)  # beyond, the density is below 1e-300
    density = np.cos(u) ** (degrees - 1)
    step = u[1] - u[0]
    pairs = (density[:-2:2] + 4 * density[1:-1:2] + density[2::2]) * step / 3
    cumulative = np.concatenate([[0.0], np.cumsum(pairs)])
    angle = np.interp((2 * probability - 1) * cumulative[-1], cumulative, u[::2])
    return float(math.sqrt(degrees) * math.tan(angle))
