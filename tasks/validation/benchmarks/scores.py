"""Figures of answers, and a candidate's beside the original's on the same items.

Every figure here is a function of sums over items: of right answers and items, of matching n-grams and all n-grams, of
a confusion matrix. So it can be computed for any resampled set of items, of candidate and original alike, which gives
the interval of their difference (Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004,
section 3; here paired as in section 4). Items of one document are resampled together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from tasks.validation.measured import Better, Measured
from tasks.validation.statistics import (
    CONFIDENCE,
    MIN_CLUSTERS,
    MIN_FOR_BOOTSTRAP,
    NUM_RESAMPLES,
    Estimate,
    expanded_tail,
    paired_proportions,
    scaled,
    wilson,
)

Floats = NDArray[np.float64]


def ratio(sums: Floats) -> Floats:
    """First column over second: a mean, where the second counts items."""
    return np.asarray(sums[..., 0] / sums[..., 1], np.float64)


@dataclass(frozen=True)
class Score:
    """One metric over a list of answers."""

    parts: Floats  # [num_items, k], summed over items before `figure`
    figure: Callable[[Floats], Floats] = ratio  # [..., k] -> [...]

    @property
    def value(self) -> float:
        """The figure of all items."""
        return float(self.figure(self.parts.sum(axis=0)))

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether it is the fraction of items that are right, each of which is or is not."""
        return self.figure is ratio and bool(np.isin(self.parts[:, 0], (0, 1)).all() and (self.parts[:, 1] == 1).all())

    def by_item(self) -> Floats:
        """[num_items]: the figure of each item by itself."""
        return np.asarray(self.figure(self.parts), np.float64)


def mean_of(values: ArrayLike) -> Score:
    """The mean of a number per item."""
    values = np.asarray(values, np.float64)
    return Score(np.stack([values, np.ones_like(values)], axis=1))


def compare(
    name: str,
    candidate: Score,
    original: Score | None,
    documents: Sequence[int],
    *,
    better: Better,
    largest: float | None,
    seed: int,
) -> Measured:
    """A candidate's figure, and how much worse than the original's it is, with their intervals.

    Fractions of independent items that are right are compared by `paired_proportions`, all else by the bootstrap.

    Args:
        name: of the metric, for errors.
        original: on the same items; None: it has no such figure.
        documents: [num_items], which document each item belongs to.
        largest: no figure, and no difference of two, is larger; None: it has no bound.
        seed: of the bootstrap.

    Raises:
        ValueError: a figure is not a number.
    """
    if not np.isfinite(candidate.value) or (original and not np.isfinite(original.value)):
        raise ValueError(
            f"{name} must be a number; got {candidate.value} (the original: {original.value if original else 'none'}). "
            "Look at the answers in items.parquet."
        )
    sums = _Resampled(documents, seed)
    independent = sums.num_documents == len(documents)
    if candidate.is_right_or_wrong and independent:
        low, high = wilson(int(candidate.parts[:, 0].sum()), len(documents))
        value = Estimate(value=candidate.value, low=low, high=high, num=len(documents))
    else:
        value = sums.estimate(candidate.figure, candidate.parts)
    if original is None:
        return Measured(value=value)
    sign = 1.0 if better == "lower" else -1.0
    # Where no item differs, the interval may be empty. How many may differ among those not asked is bounded anyhow.
    same = bool((candidate.parts == original.parts).all())
    floor = largest * most_unseen(sums.num_documents) if same and largest else 0.0
    if candidate.is_right_or_wrong and original.is_right_or_wrong and independent:
        paired = paired_proportions(candidate.parts[:, 0] == 1, original.parts[:, 0] == 1)
        loss = _at_least(scaled(paired.difference, sign), floor)
        percent = scaled(loss, 100 / original.value) if original.value else None
        return Measured(value=value, original=original.value, degradation=loss, degradation_percent=percent)

    columns = candidate.parts.shape[1]

    def difference(both: Floats) -> Floats:
        return sign * (candidate.figure(both[..., :columns]) - original.figure(both[..., columns:]))

    def relative(both: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return 100 * difference(both) / original.figure(both[..., columns:])

    both = np.concatenate([candidate.parts, original.parts], axis=1)
    return Measured(
        value=value,
        original=original.value,
        degradation=sums.estimate(difference, both, floor=floor),
        degradation_percent=sums.estimate(relative, both, floor=100 * floor / original.value)
        if original.value
        else None,
    )


def most_unseen(num_documents: int, confidence: float = CONFIDENCE) -> float:
    """The largest fraction that may differ when none of `num_documents` does: Clopper and Pearson's bound of 0 hits."""
    return float(1 - ((1 - confidence) / 2) ** (1 / num_documents))


class _Resampled:
    """Estimates from resampled documents; two with the same documents and seed are resampled alike."""

    def __init__(self, documents: Sequence[int], seed: int) -> None:
        _, self._index = np.unique(np.asarray(documents), return_inverse=True)
        self.num_documents = int(self._index.max()) + 1
        self._seed = seed

    def estimate(self, figure: Callable[[Floats], Floats], parts: Floats, *, floor: float = 0.0) -> Estimate:
        """The figure of the sums of `parts` [num_items, k], and its interval, which reaches `floor` to both sides."""
        by_document = np.zeros((self.num_documents, parts.shape[1]))
        np.add.at(by_document, self._index, parts)
        total = by_document.sum(axis=0)
        value, num = float(figure(total)), self.num_documents
        if num < MIN_CLUSTERS:
            return Estimate(value=value, low=None, high=None, num=num)
        if num < MIN_FOR_BOOTSTRAP:
            low, high = self._jackknife(value, figure(total - by_document))
        else:
            counts = np.random.default_rng(self._seed).multinomial(num, [1 / num] * num, NUM_RESAMPLES)
            samples = figure(counts @ by_document)
            tail = expanded_tail(num)
            samples = samples[np.isfinite(samples)]  # a resample may hold nothing to divide by
            low, high = np.quantile(samples, [tail, 1 - tail]) if len(samples) else (value, value)
        found = Estimate(value=value, low=float(min(low, value)), high=float(max(high, value)), num=num)
        return _at_least(found, floor)

    def _jackknife(self, value: float, without: Floats) -> tuple[float, float]:
        """Of few documents: Student's t with the error from leaving out one at a time (Tukey, 1958)."""
        n = self.num_documents
        error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
        half = float(special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2) * error)
        return value - half, value + half


def _at_least(estimate: Estimate, floor: float) -> Estimate:
    """The estimate, its interval reaching `floor` to both sides of the value."""
    if estimate.low is None or estimate.high is None:
        return estimate
    low, high = min(estimate.low, estimate.value - floor), max(estimate.high, estimate.value + floor)
    return estimate.model_copy(update={"low": low, "high": high})
