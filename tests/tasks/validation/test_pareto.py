import numpy as np

from tasks.validation.pareto import pareto_front


def test_a_point_worse_in_one_figure_and_better_in_none_is_off_the_front():
    small_slow, large_fast, beaten = (90, 12.0, 33.0), (140, 8.0, 32.0), (140, 12.0, 33.0)
    assert pareto_front([small_slow, large_fast, beaten]) == [True, True, False]


def test_equal_points_stand_on_the_front_together():
    assert pareto_front([(1, 1), (1, 1), (2, 2)]) == [True, True, False]


def test_a_point_that_was_not_measured_is_never_on_the_front_and_beats_nobody():
    assert pareto_front([(1, None), (2, 2), (float("nan"), 0)]) == [False, True, False]


def test_front_is_the_definition_on_random_points():
    points = np.random.default_rng(0).integers(0, 6, (60, 3)).tolist()
    expected = []
    for i, p in enumerate(points):
        beaten = False
        for j, q in enumerate(points):
            if i != j and all(q[k] <= p[k] for k in range(3)) and q != p:
                beaten = True
        expected.append(not beaten)
    assert pareto_front(points) == expected
    assert 0 < sum(expected) < 60
