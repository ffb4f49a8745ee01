import itertools
import math
import re
import xml.dom.minidom

import pytest

from tasks.validation.charts import (
    Axis,
    Point,
    curve,
    interval_bar,
    mark,
    nice_ticks,
    place_labels,
    scatter,
    text_width,
)


def boxes(anchors, places):
    return [(x, y - 9, x + text_width(label), y + 2) for (_, _, label), (x, y, _) in zip(anchors, places, strict=True)]


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_labels_of_crowded_points_do_not_overlap_and_stay_inside():
    anchors = [(100 + 9 * i, 200 + 5 * (i % 3), f"candidate-{i}") for i in range(10)]
    found = boxes(anchors, place_labels(anchors, left=50, right=540, top=10, bottom=350))
    assert not any(overlap(a, b) for a, b in itertools.combinations(found, 2))
    assert all(50 <= a[0] and a[2] <= 540 and 10 <= a[1] and a[3] <= 350 for a in found)


def test_labels_do_not_cover_points():
    anchors = [(100, 100, "int8"), (120, 100, "int4"), (140, 100, "pruned")]
    found = boxes(anchors, place_labels(anchors, left=0, right=400, top=0, bottom=200))
    for box, (x, y, _) in itertools.product(found, anchors):
        assert not overlap(box, (x - 4, y - 4, x + 4, y + 4))


def test_a_lone_label_sits_right_beside_its_point():
    assert place_labels([(100, 100, "int8")], left=0, right=400, top=0, bottom=200) == [(110, 104, False)]


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 10, [0, 2, 4, 6, 8, 10]), (0.93, 1.02, [0.94, 0.96, 0.98, 1.0, 1.02])]
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_ticks_of_a_constant_do_not_fail():
    assert nice_ticks(5.0, 5.0) == [5.0]


def test_logarithmic_axis_maps_factors_to_equal_lengths():
    axis = Axis(1, 100, 0, 200, is_log=True)
    assert [axis(v) for v in (1, 10, 100)] == pytest.approx([0, 100, 200])
    assert all(1 <= v <= 100 for v in axis.ticks())
    assert len(axis.ticks()) >= 3


def test_scatter_is_well_formed_escapes_names_and_draws_the_front_as_a_staircase():
    points = [
        Point(8, 60, "fast & <b>bad</b>", "t", 1, True),
        Point(10, 27, "even", "t", 2, True),
        Point(33, 26, "slow", "t", 0, True),
        Point(34, 61, "beaten", "t", 0, False),
    ]
    svg = scatter(points, x_label="ms", y_label="perplexity")
    xml.dom.minidom.parseString(svg)
    assert "<b>" not in svg
    assert "fast &amp; &lt;b&gt;" in svg
    front = re.search(r'class="front" d="([^"]+)"', svg).group(1)
    assert front.count("H") == 3  # three points on the front; the fourth is not a corner
    assert svg.count("hollow") == 1
    assert "ms (log scale)" in svg
    assert "perplexity (log scale)" not in svg


def test_one_point_and_equal_points_can_be_drawn():
    for count in (1, 2):
        svg = scatter([Point(1.0, 2.0, "only", "t", 0, True)] * count, x_label="x", y_label="y")
        assert "nan" not in svg
        xml.dom.minidom.parseString(svg)


def test_curves_of_one_step_and_of_many_are_well_formed():
    for steps, values in (((0,), (3.0,)), (range(50), [4730 * math.exp(-s / 9) + 40 for s in range(50)])):
        svg = curve(list(steps), list(values), label="loss", x_label="steps")
        assert "nan" not in svg
        xml.dom.minidom.parseString(svg)


def test_interval_bar_shades_the_bad_side():
    below = interval_bar(limit=1.0, measured=0.5, low=0.4, high=0.6, is_max=True, verdict="ACCEPT")
    x, width = map(float, re.search(r'class="bad" x="([\d.]+)" y="2" width="([\d.]+)"', below).groups())
    dot = float(re.search(r'cx="([\d.]+)"', below).group(1))
    assert dot < x
    assert x + width == pytest.approx(182, abs=0.2)
    xml.dom.minidom.parseString(interval_bar(limit=1, measured=1, low=None, high=None, is_max=False, verdict="REJECT"))


def test_interval_bar_goes_to_the_edge_where_nothing_bounds_it():
    bar = interval_bar(limit=1.0, measured=4.0, low=2.0, high=None, is_max=False, verdict="ACCEPT")
    assert re.search(r'class="whisker accept" x1="[\d.]+" x2="182.0"', bar)
    assert "measured 4 [2, ∞], limit 1" in bar


def test_a_sixth_engine_has_the_mark_of_the_first():
    assert mark(5) == mark(0)
    assert len({mark(series) for series in range(5)}) == 5
