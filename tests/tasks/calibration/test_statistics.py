import math
import pickle

import pytest
import torch

from tasks.calibration.statistics import Histogram, InputActivity, InputGram, InputNorm, InputPeak


def test_norm_is_that_of_all_tokens_together():
    norm = InputNorm(2)
    norm.update(torch.tensor([[[3.0, 1.0]], [[4.0, 0.0]]]))
    norm.update(torch.tensor([[[0.0, 0.0], [0.0, 2.0]]]))
    torch.testing.assert_close(norm.value, torch.tensor([5.0, 5.0**0.5]))


def test_activity_is_the_mean_over_a_sequence_and_the_norm_over_sequences():
    torch.manual_seed(0)
    x = torch.randn(5, 7, 3)
    activity = InputActivity(3)
    activity.update(x[:2])
    activity.update(x[2:])
    expected = []
    for channel in range(3):
        means = [sum(abs(x[sequence, token, channel].item()) for token in range(7)) / 7 for sequence in range(5)]
        expected.append(sum(mean**2 for mean in means) ** 0.5)
    torch.testing.assert_close(activity.value, torch.tensor(expected))


def test_gram_is_that_of_all_tokens_together():
    torch.manual_seed(0)
    batches = [torch.randn(2, 5, 8), torch.randn(1, 3, 8)]
    gram = InputGram(8)
    for batch in batches:
        gram.update(batch)
    x = torch.cat([batch.reshape(-1, 8) for batch in batches]).double()
    torch.testing.assert_close(gram.value.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert gram.num_tokens == 13


def test_peak_is_the_largest_magnitude_of_each_feature():
    peak = InputPeak(2)
    peak.update(torch.tensor([[[3.0, 1.0]], [[-4.0, 0.0]]]))
    peak.update(torch.tensor([[[0.0, -2.0]]]))
    assert peak.value.tolist() == [4.0, 2.0]


def test_histogram_counts_values_in_bins_that_are_a_power_of_two_wide():
    histogram = Histogram()
    histogram.update(torch.tensor([[[0.0, 1.5, -1.0, -0.0005, 1.4999]]]))
    assert histogram.width == 2 / 2048  # 2 is the smallest power of two above 1.5
    assert {int(i) - 2048: int(histogram.counts[i]) for i in histogram.counts.nonzero()} == {
        0: 1,
        1536: 1,
        1535: 1,
        -1024: 1,
        -1: 1,
    }
    assert (histogram.minimum, histogram.maximum, histogram.num_values) == (-1.0, 1.5, 5)


def test_growing_range_counts_as_if_it_had_been_known():
    torch.manual_seed(0)
    batches = [torch.randn(3, 8, 16) * 10**power for power in (-6, -3, 0, 1, -2, 2)]
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    values = torch.cat([batch.flatten() for batch in batches])
    limit = 2.0 ** math.ceil(math.log2(values.abs().max()))
    expected = torch.zeros(4096, dtype=torch.int64)
    for value in values.tolist():
        expected[math.floor(value / (limit / 2048)) + 2048] += 1
    assert histogram.width == limit / 2048
    assert torch.equal(histogram.counts, expected)


@pytest.mark.parametrize("powers", [(0, 0), (-4, 3), (5, -20)])
def test_histograms_of_two_processes_merge_into_that_of_one(powers):
    torch.manual_seed(0)
    parts = [torch.randn(4, 8, 16) * 2.0**power for power in powers]
    apart, together = [Histogram(), Histogram()], Histogram()
    for part, histogram in zip(parts, apart, strict=True):
        histogram.update(part)
        together.update(part)
    merged = apart[0].merge(pickle.loads(pickle.dumps(apart[1])))
    assert torch.equal(merged.counts, together.counts)
    for name in ("exponent", "minimum", "maximum", "sum_of_minima", "sum_of_maxima", "num_sequences"):
        assert getattr(merged, name) == getattr(together, name)
    assert apart[0].num_values == parts[0].numel()  # not changed


def test_mean_range_is_that_of_sequences_whatever_the_batches():
    x = torch.tensor([[[1.0, -1.0]], [[3.0, 0.0]], [[2.0, -5.0]]])
    whole, single = Histogram(), Histogram()
    whole.update(x)
    for sequence in x:
        single.update(sequence[None])
    assert whole.mean_range == single.mean_range == (-2.0, 2.0)


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="1 of 4 are NaN or infinite"):
        Histogram().update(torch.tensor([[[1.0, float("inf"), 2.0, 3.0]]]))
