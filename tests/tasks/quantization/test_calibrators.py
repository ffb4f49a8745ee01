import math

import numpy as np
import pytest
import torch

from tasks.calibration.statistics import Histogram
from tasks.quantization.calibrators import (
    NUM_SHRINKS,
    SHRINK,
    calibrated,
    entropy_threshold,
    least_squares_range,
    magnitudes,
)


def counted(values):
    histogram = Histogram()
    histogram.update(values)
    return histogram


def outliers(seed=0, sequences=8):
    """A bell with one value in a thousand twenty times as large, leaning to the right."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, 64, 32, generator=generator)
    return torch.where(torch.rand(x.shape, generator=generator) < 1e-3, 20 * x, x) + 0.3


def test_min_max_covers_everything_and_the_average_less():
    x = torch.tensor([[[-1.0, 2.0]], [[-3.0, 8.0]]])
    assert calibrated(counted(x), "min-max", symmetric=True) == (-3.0, 8.0)
    assert calibrated(counted(x), "moving-average", symmetric=True) == (-2.0, 5.0)


@pytest.mark.parametrize("percentile", [90, 99, 99.9])
def test_symmetric_percentile_is_that_of_the_sorted_magnitudes(percentile):
    x = outliers()
    histogram = counted(x)
    low, high = calibrated(histogram, "percentile", symmetric=True, percentile=percentile)
    exact = np.quantile(x.abs().numpy().ravel(), percentile / 100, method="inverted_cdf")
    assert exact <= high <= exact + histogram.width  # the end of the bin that holds it
    assert low == -high


@pytest.mark.parametrize("percentile", [90, 99, 99.9])
def test_asymmetric_percentile_leaves_out_half_of_the_rest_at_either_end(percentile):
    x = outliers()
    histogram = counted(x)
    low, high = calibrated(histogram, "percentile", symmetric=False, percentile=percentile)
    values, outside = np.sort(x.numpy().ravel()), (1 - percentile / 100) / 2
    assert (values < low).mean() <= outside
    assert (values > high).mean() <= outside
    assert (values < low + histogram.width).mean() > outside
    assert (values > high - histogram.width).mean() > outside


def test_whole_percentile_is_min_max():
    histogram = counted(outliers())
    for symmetric in (True, False):
        assert calibrated(histogram, "percentile", symmetric=symmetric, percentile=100) == (
            histogram.minimum,
            histogram.maximum,
        )


def test_percentile_of_too_few_values_is_refused():
    with pytest.raises(ValueError, match=r"99\.99th percentile needs at least 10,000 values.*saw 2,048"):
        calibrated(counted(torch.randn(1, 64, 32)), "percentile", symmetric=True)


def slow_entropy_threshold(counts):
    """The definition, bin by bin."""
    divergences = {}
    for i in range(128, len(counts) + 1):
        p = [float(count) for count in counts[:i]]
        q = [0.0] * i
        for level in range(128):
            bins = range(level * i // 128, (level + 1) * i // 128)
            occupied = [b for b in bins if counts[b]]
            for b in occupied:
                q[b] = sum(counts[b] for b in occupied) / len(occupied)
        p[-1] += sum(counts[i:])
        if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
            continue
        total_p, total_q = sum(p), sum(q)
        divergences[i] = sum(
            a / total_p * math.log(a / total_p * total_q / b) for a, b in zip(p, q, strict=True) if a > 0
        )
    best = min(divergences, key=divergences.get)
    return min(best + 0.5, len(counts))


@pytest.mark.parametrize("seed", [0, 1])
def test_entropy_threshold_is_that_of_the_definition(seed):
    generator = np.random.default_rng(seed)
    counts = np.bincount((np.abs(generator.standard_normal(4000)) * 60).astype(int), minlength=400)
    counts[390:400] += generator.integers(0, 2, 10)
    counts = np.append(counts[:399], 1)
    assert entropy_threshold(counts) == slow_entropy_threshold(counts.tolist())


def test_entropy_cuts_outliers_off_and_keeps_a_flat_distribution_whole():
    flat = counted(torch.linspace(-1, 1, 64 * 1024).view(1, 64, 1024))
    low, high = calibrated(flat, "entropy", symmetric=True)
    assert high > 0.95
    low, high = calibrated(counted(outliers()), "entropy", symmetric=True)
    assert 2 < high < 10  # the bell ends at about 4, outliers near 60
    assert low >= -high


@pytest.mark.parametrize("symmetric", [True, False])
def test_least_squares_range_is_the_best_of_all_on_the_samples(symmetric):
    """Samples count as the middles of their bins, so the best may be another that is as good to a hundredth."""
    x = outliers()
    histogram = counted(x)
    values = x.double().numpy().ravel()

    def error(low, high):
        low, high = min(low, 0), max(high, 0)
        if symmetric:
            scale = max(-low, high) / 127
            return ((np.clip(np.round(values / scale), -128, 127) * scale - values) ** 2).sum()
        scale = (high - low) / 255
        point = np.round(-low / scale)
        return (((np.clip(np.round(values / scale) + point, 0, 255) - point) * scale - values) ** 2).sum()

    least = min(
        error(*(max(abs(values)) * SHRINK**step * np.array([-1, 1])))
        if symmetric
        else error(values.min() * SHRINK**step, values.max() * SHRINK**step)
        for step in range(NUM_SHRINKS)
    )
    found = error(*least_squares_range(histogram, symmetric=symmetric))
    assert found <= 1.01 * least
    assert found < error(histogram.minimum, histogram.maximum)


@pytest.mark.parametrize("calibrator", ["min-max", "moving-average", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_lie_within_what_was_seen_even_of_a_constant(calibrator, symmetric):
    for x in (outliers(), torch.zeros(2, 100, 64), torch.full((2, 100, 64), -3.0)):
        histogram = counted(x)
        low, high = calibrated(histogram, calibrator, symmetric=symmetric, percentile=99)
        assert histogram.minimum <= low <= high <= histogram.maximum


def test_magnitudes_are_those_of_both_signs():
    histogram = counted(torch.tensor([[[0.25, -0.2501, 1.9]]]))
    counts = magnitudes(histogram)
    assert counts.sum() == 3
    assert counts[256] == 2
    assert len(counts) == 1 + 1945
