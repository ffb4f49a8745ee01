import numpy as np
import pytest

from tasks.validation.benchmarks.scores import Score, compare, mean_of, most_unseen
from tasks.validation.statistics import expanded_tail


def compared(candidate, original, documents=None, **options):
    documents = range(len(candidate.parts)) if documents is None else documents
    options = {"better": "higher", "largest": 1.0, "seed": 0, **options}
    return compare("qa.f1", candidate, original, list(documents), **options)


def test_value_and_loss_are_those_of_all_items():
    found = compared(mean_of([1, 0, 1, 0]), mean_of([1, 1, 1, 0]))
    assert found.value.value == 0.5
    assert found.original == 0.75
    assert found.degradation.value == 0.25
    assert found.degradation_percent.value == pytest.approx(100 / 3)
    assert found.degradation.low < 0.25 < found.degradation.high


def test_pairs_make_the_interval_narrow():
    rng = np.random.default_rng(0)
    original = rng.uniform(size=200)
    candidate = original - 0.01 * rng.uniform(size=200)  # always a little worse, whatever the item
    paired = compared(mean_of(candidate), mean_of(original)).degradation
    assert paired.high - paired.low < 0.002
    assert paired.low > 0
    alone = compared(mean_of(candidate), None).value
    assert alone.high - alone.low > 0.05


def test_items_of_a_document_are_one_observation():
    scores = np.repeat(np.random.default_rng(0).uniform(size=20), 10)
    as_items = compared(mean_of(scores), None).value
    as_documents = compared(mean_of(scores), None, np.repeat(np.arange(20), 10)).value
    assert as_documents.high - as_documents.low > 2 * (as_items.high - as_items.low)


def test_equal_answers_on_few_items_do_not_prove_that_all_are_equal():
    right_or_wrong = compared(mean_of([1, 0] * 10), mean_of([1, 0] * 10)).degradation
    assert right_or_wrong.high >= most_unseen(20)
    same = compared(mean_of([0.5, 0.3] * 10), mean_of([0.5, 0.3] * 10)).degradation
    assert same.value == 0
    # Clopper and Pearson's bound of 0 of 20: (1 - p)^20 = 0.025
    assert same.high == pytest.approx(-same.low) == pytest.approx(most_unseen(20))
    assert (1 - same.high) ** 20 == pytest.approx(0.025)
    assert most_unseen(1000) < 0.004


def test_right_and_wrong_items_are_compared_by_their_proportions():
    from tasks.validation.statistics import paired_proportions, wilson

    candidate, original = [True] * 14 + [False] * 6, [True] * 17 + [False] * 3
    found = compared(mean_of(candidate), mean_of(original))
    expected = paired_proportions(candidate, original).difference
    assert (found.degradation.value, found.degradation.low, found.degradation.high) == pytest.approx(
        (-expected.value, -expected.high, -expected.low)
    )
    assert (found.value.low, found.value.high) == wilson(14, 20)
    clustered = compared(mean_of(candidate), mean_of(original), np.arange(20) // 2)  # then they are not independent
    assert clustered.degradation.low != pytest.approx(found.degradation.low)


def test_few_documents_get_the_interval_of_their_means():
    from scipy import stats

    values = [0.3, 0.5, 0.9, 0.4]
    found = compared(mean_of(values), None).value
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)


def test_a_lower_is_better_figure_loses_upwards():
    found = compared(mean_of([2.0, 2.0, 3.0]), mean_of([1.0, 1.0, 1.0]), better="lower", largest=10)
    assert found.degradation.value == pytest.approx(4 / 3)


def test_an_original_at_zero_has_no_percent():
    found = compared(mean_of([0.0, 1.0]), mean_of([0.0, 0.0]))
    assert found.degradation.value == -0.5
    assert found.degradation_percent is None


def test_what_is_not_a_number_is_refused_by_name():
    with pytest.raises(ValueError, match=r"qa.f1 must be a number; got nan"):
        compared(mean_of([np.nan, 1.0]), mean_of([1.0, 1.0]))


def test_one_document_has_no_interval():
    found = compared(mean_of([1, 0]), mean_of([1, 1]), documents=[0, 0])
    assert found.value.low is None
    assert found.degradation.high is None


def test_figures_of_sums_are_resampled_as_sums_not_as_means_of_items():
    """Against a slow loop: a ratio of sums, which no mean of the items' ratios is."""
    parts = np.array([[1.0, 10.0], [9.0, 10.0], [0.0, 1.0]] * 20)
    found = compared(Score(parts), None).value
    assert found.value == pytest.approx(10 / 21)
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(4000):
        total = parts[rng.integers(0, 60, 60)].sum(axis=0)
        ratios.append(total[0] / total[1])
    tail = expanded_tail(60)
    # 4000 resamples give a 1 % quantile within about 0.02
    np.testing.assert_allclose([found.low, found.high], np.quantile(ratios, [tail, 1 - tail]), atol=0.02)


def test_equal_models_are_seldom_called_different():
    """A/A: two models that answer each item right with the same chance; 95 % intervals of the loss hold 0."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        easy = rng.uniform(size=60)
        first, second = (rng.uniform(size=60) < easy for _ in range(2))
        loss = compared(mean_of(first), mean_of(second)).degradation
        missed += not loss.low <= 0 <= loss.high
    assert missed / 200 <= 0.07
