import math

import numpy as np
import pytest

from tasks.validation.statistics import (
    MIN_FOR_P99,
    bootstrap_ratio_of_sums,
    expanded_tail,
    median,
    paired_increase_percent,
    paired_proportions,
    percentiles,
    ratio_of_medians,
    ratio_through_control,
    wilson,
)


def naive_cluster_bootstrap(values, weights, clusters, num_resamples, rng):
    """The definition: draw documents with replacement, put all their windows into one bag, take the ratio of sums."""
    names = sorted(set(clusters))
    ratios = []
    for _ in range(num_resamples):
        above = below = 0.0
        for name in rng.choice(names, len(names)):
            for value, weight, cluster in zip(values, weights, clusters, strict=True):
                if cluster == name:
                    above += value
                    below += weight
        ratios.append(above / below)
    return np.array(ratios)


def test_perplexity_is_exp_of_total_loss_by_total_tokens_not_the_mean_of_windows():
    nll, tokens = [10.0, 1.0], [10, 100]
    estimate = bootstrap_ratio_of_sums(nll, tokens, [0, 1], seed=0, transform=np.exp)
    assert estimate.value == pytest.approx(math.exp(11 / 110))
    assert estimate.value != pytest.approx((math.exp(1.0) + math.exp(0.01)) / 2, rel=0.1)


def test_interval_equals_that_of_documents_drawn_in_slow_loops():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(36), [1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1] * 3)
    values, weights = rng.gamma(2.0, size=126), rng.integers(1, 9, 126)
    estimate = bootstrap_ratio_of_sums(values, weights, clusters, seed=3)
    slow = naive_cluster_bootstrap(values, weights, clusters, 400, rng)
    tail = expanded_tail(36)
    low, high = np.quantile(slow, [tail, 1 - tail])
    # both ends are Monte Carlo estimates at a tail of about 1 %: 400 draws leave some percent of the width
    assert estimate.low == pytest.approx(low, abs=0.15 * (high - low))
    assert estimate.high == pytest.approx(high, abs=0.15 * (high - low))


def test_windows_of_one_document_do_not_count_as_independent():
    rng = np.random.default_rng(0)
    of_document = rng.normal(3, 1, 8)
    values = np.repeat(of_document, 10)  # ten windows that all say what their document says
    clustered = bootstrap_ratio_of_sums(values, np.ones(80), np.repeat(np.arange(8), 10), seed=0)
    alone = bootstrap_ratio_of_sums(values, np.ones(80), np.arange(80), seed=0)
    assert clustered.value == pytest.approx(alone.value)
    assert clustered.high - clustered.low > 2.5 * (alone.high - alone.low)


def test_intervals_cover_the_true_mean_about_as_often_as_they_promise():
    rng = np.random.default_rng(7)
    for n in (5, 20):
        hits = 0
        for trial in range(300):
            estimate = bootstrap_ratio_of_sums(
                rng.normal(3, 1, n), np.ones(n), np.arange(n), seed=trial, num_resamples=1500
            )
            hits += estimate.low <= 3 <= estimate.high
        # 95 % of 300 has a standard deviation of 1.3 %; plain percentile intervals of 5 values cover about 83 %
        assert 0.90 <= hits / 300 <= 0.985


def test_one_document_gives_no_interval():
    estimate = bootstrap_ratio_of_sums([1.0, 2.0], [1, 1], [5, 5], seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (1.5, None, None)


def test_a_model_compared_with_itself_has_no_increase_at_all():
    nll = np.random.default_rng(0).gamma(50.0, size=20)
    estimate = paired_increase_percent(nll, nll, np.full(20, 100), np.arange(20), seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_pairing_makes_a_small_loss_visible_that_unpaired_intervals_hide():
    rng = np.random.default_rng(0)
    original = rng.normal(300, 60, 30)  # documents differ much
    candidate = original + rng.normal(1, 0.3, 30)  # the candidate loses 1 nat of 100 tokens on each
    tokens, documents = np.full(30, 100), np.arange(30)
    paired = paired_increase_percent(candidate, original, tokens, documents, seed=0)
    assert paired.value == pytest.approx(100 * math.expm1((candidate - original).sum() / 3000))
    assert 0.5 < paired.low < paired.high < 1.5
    perplexity = bootstrap_ratio_of_sums(original, tokens, documents, seed=0, transform=np.exp)
    assert (perplexity.high - perplexity.low) / perplexity.value > 0.2


def test_percentiles_are_numpy_linear_and_p99_says_when_it_is_not_supported():
    blocks = np.arange(100.0).reshape(10, 10)
    found = percentiles(blocks, seed=0)
    assert (found.num, found.p50.value, found.p90.value) == (100, 49.5, pytest.approx(89.1))
    assert not found.p99_supported
    assert found.p50.low < 49.5 < found.p50.high
    assert percentiles(np.zeros((10, MIN_FOR_P99 // 10)), seed=0).p99_supported


def test_median_of_blocks_that_drift_has_a_wide_interval():
    rng = np.random.default_rng(0)
    quiet = median(10 + rng.normal(0, 0.1, (10, 20)), seed=0)
    drifting = median(10 + np.arange(10)[:, None] + rng.normal(0, 0.1, (10, 20)), seed=0)
    assert quiet.high - quiet.low < 0.2
    assert drifting.high - drifting.low > 3


def test_drift_cancels_in_the_ratio_of_subjects_measured_in_the_same_blocks():
    rng = np.random.default_rng(0)
    machine = 1 + rng.random((12, 1))  # slows down up to twofold, for both alike
    fast, slow = 10 * machine, 20 * machine * (1 + rng.normal(0, 0.01, (12, 1)))
    paired = ratio_of_medians(fast, slow, seed=0)
    unpaired = ratio_of_medians(fast, slow, seed=0, paired=False)
    assert paired.value == pytest.approx(0.5, rel=0.03)
    assert paired.high - paired.low < 0.25 * (unpaired.high - unpaired.low)


def test_subjects_of_different_groups_are_compared_through_the_control_of_each():
    rng = np.random.default_rng(0)
    noise = lambda: 1 + rng.normal(0, 0.01, (10, 1))  # noqa: E731
    # the machine is three times slower while the second group runs
    estimate = ratio_through_control(10 * noise(), 40 * noise(), 3 * 20 * noise(), 3 * 40 * noise(), seed=0)
    assert estimate.low < 0.5 < estimate.high
    assert estimate.value == pytest.approx(0.5, rel=0.03)


def test_many_clusters_need_no_expansion():
    assert expanded_tail(100_000) == pytest.approx(0.025, rel=1e-3)
    assert expanded_tail(5) < 0.002  # Student's t of 4 degrees, 2.776, times sqrt(5 / 4)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).random(40)
    first, again, other = (bootstrap_ratio_of_sums(values, np.ones(40), np.arange(40), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("num", [2, 20, 400])
def test_equal_answers_leave_room_for_what_was_not_asked(num):
    answers = np.arange(num) % 2 == 0
    found = paired_proportions(answers, answers).difference
    assert found.value == 0
    assert found.low == pytest.approx(-found.high)
    assert 1 / num < found.high < 4 / np.sqrt(num)


def test_newcombes_tenth_method_by_hand():
    """20 right in both, 12 gained, 2 lost, 16 wrong in both; phi = (320 - 24 - 25) / sqrt(32 * 18 * 22 * 28)."""
    right = np.repeat([True, True, False, False], [20, 12, 2, 16])
    before = np.repeat([True, False, True, False], [20, 12, 2, 16])
    (p_low, p_high), (q_low, q_high), phi = wilson(32, 50), wilson(22, 50), 271 / np.sqrt(32 * 18 * 22 * 28)
    a, b, c, d = 0.64 - p_low, q_high - 0.44, 0.44 - q_low, p_high - 0.64
    found = paired_proportions(right, before).difference
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - np.sqrt(a * a - 2 * phi * a * b + b * b))
    assert found.high == pytest.approx(0.2 + np.sqrt(c * c - 2 * phi * c * d + d * d))
