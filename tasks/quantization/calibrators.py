"""How much of a histogram a grid of 8 bits covers: what lies outside saturates, so that the rest is more exact.

* min-max: everything.
* moving-average: from the smallest to the largest value of a sequence, each averaged over sequences, as in Jacob et
  al., CVPR 2018, arXiv:1712.05877, section 3.1; all sequences weigh the same, so that histograms can be merged.
* percentile: p % of |x| where the grid is symmetric; otherwise all but (100 - p) / 2 % at either end.
* entropy: the threshold T on |x| whose clipped distribution, written with 128 levels, has the least Kullback-Leibler
  divergence from the unclipped (Migacz, 8-bit Inference with TensorRT, GTC 2017).
* mse: the part of [minimum, maximum] with the least sum of squared errors.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tasks.calibration.statistics import Histogram

Calibrator = Literal["min-max", "moving-average", "percentile", "entropy", "mse"]
PERCENTILE = 99.99
NUM_LEVELS = 128  # of magnitudes, in the entropy's histograms
SHRINK, NUM_SHRINKS = 0.95, 100  # of the range, per step and steps: outliers can be a hundred times the rest


def calibrated(
    histogram: "Histogram", calibrator: Calibrator, *, symmetric: bool, percentile: float = PERCENTILE
) -> tuple[float, float]:
    """[low, high] that the grid of a layer's inputs is to cover; within what was seen.

    Args:
        histogram: of the inputs; has seen something.
        calibrator: how to choose.
        symmetric: whether the grid is; only the larger of |low| and |high| then counts.
        percentile: for `percentile`, in (0, 100].

    Raises:
        ValueError: fewer values were seen than the percentile can tell apart.
    """
    if calibrator == "moving-average":
        return histogram.mean_range
    if calibrator == "percentile":
        return percentile_range(histogram, percentile, symmetric=symmetric)
    if calibrator == "entropy":
        threshold = entropy_threshold(magnitudes(histogram)) * histogram.width
        return max(histogram.minimum, -threshold), min(histogram.maximum, threshold)
    if calibrator == "mse":
        return least_squares_range(histogram, symmetric=symmetric)
    return histogram.minimum, histogram.maximum


def magnitudes(histogram: "Histogram") -> NDArray[np.int64]:
    """Counts of |x| in [i w, (i + 1) w), for every i up to the largest magnitude that occurs."""
    half = len(histogram.counts) // 2
    counts = histogram.counts.numpy()
    both = counts[half:] + counts[:half][::-1]
    used: NDArray[np.int64] = both[: int(np.flatnonzero(both)[-1]) + 1]
    return used


def percentile_range(histogram: "Histogram", percentile: float, *, symmetric: bool) -> tuple[float, float]:
    """Ends of the bins within which `percentile` % of the values lie."""
    outside = 1 - percentile / 100
    if histogram.num_values * outside < 1 and percentile < 100:
        raise ValueError(
            f"The {percentile:g}th percentile needs at least {int(np.ceil(1 / outside)):,} values of a layer's inputs; "
            f"calibration saw {histogram.num_values:,}. Raise data.num_calibration_sequences, or lower `percentile`."
        )
    if symmetric:
        covered = np.cumsum(magnitudes(histogram)) / histogram.num_values
        threshold = (int(np.searchsorted(covered, percentile / 100)) + 1) * histogram.width
        return max(histogram.minimum, -threshold), min(histogram.maximum, threshold)
    below = np.cumsum(histogram.counts.numpy()) / histogram.num_values
    half = len(below) // 2
    low = (int(np.searchsorted(below, outside / 2, side="right")) - half) * histogram.width
    high = (int(np.searchsorted(below, 1 - outside / 2)) + 1 - half) * histogram.width
    return max(histogram.minimum, low), min(histogram.maximum, high)


def entropy_threshold(counts: NDArray[np.int64]) -> float:
    """The best threshold on magnitudes, in bins: i + 1/2 for the i with the least KL(P || Q).

    P is the first i bins with all that lies beyond added to the last; Q is the same bins without it, merged into 128
    levels, each spread evenly over those of its bins that are not empty. A threshold whose Q is empty where P is not
    is passed over: its divergence is infinite.

    Args:
        counts: [bins] of magnitudes, the last not empty.
    """
    best, least = float(len(counts)), np.inf
    total = counts.sum()
    seen = np.cumsum(counts)
    for i in range(NUM_LEVELS, len(counts) + 1):
        bins = counts[:i].astype(np.float64)
        occupied = bins > 0
        beyond = total - seen[i - 1]
        if beyond and not occupied[-1]:
            continue
        starts = np.arange(NUM_LEVELS) * i // NUM_LEVELS
        per_bin = np.add.reduceat(bins, starts) / np.maximum(1, np.add.reduceat(occupied.astype(np.int64), starts))
        q = np.repeat(per_bin, np.diff(starts, append=i))[occupied] / seen[i - 1]
        bins[-1] += beyond
        p = bins[occupied] / total
        divergence = float((p * np.log(p / q)).sum())
        if divergence < least:
            best, least = i + 0.5, divergence
    return min(best, float(len(counts)))


def least_squares_range(histogram: "Histogram", *, symmetric: bool) -> tuple[float, float]:
    """Of the ranges that shrink from [minimum, maximum] towards zero, the one with the least squared error.

    Values count as the middles of their bins.
    """
    occupied = np.flatnonzero(histogram.counts.numpy())
    weights = histogram.counts.numpy()[occupied]
    values: NDArray[np.float64] = (occupied - len(histogram.counts) // 2 + 0.5).astype(np.float64) * histogram.width
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    best, least = 1.0, np.inf
    for step in range(NUM_SHRINKS):
        part = SHRINK**step
        error = float((weights * np.square(values - _rounded(values, part * low, part * high, symmetric))).sum())
        if error < least:
            best, least = part, error
    return max(histogram.minimum, best * low), min(histogram.maximum, best * high)


def _rounded(values: NDArray[np.float64], low: float, high: float, symmetric: bool) -> NDArray[np.float64]:
    """`values` on the grid of 8 bits from `low` to `high`."""
    if high == low:
        return values
    if symmetric:
        scale, zero_point, smallest, largest = high / 127, 0.0, -128, 127
    else:
        scale, smallest, largest = (high - low) / 255, 0, 255
        zero_point = float(np.round(-low / scale))
    rounded: NDArray[np.float64] = np.clip(np.round(values / scale) + zero_point, smallest, largest)
    return (rounded - zero_point) * scale
