"""Which candidates nobody beats: the Pareto front over size, time and quality."""

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float | None]]) -> list[bool]:
    """Whether each point is on the front: no other is at least as good in everything and better in something.

    Args:
        points: [num_points][num_figures], less is better in every figure (size, time per token, perplexity). A point
            with a missing figure (None, NaN) is never on the front and beats nobody.

    Returns:
        [num_points]; equal points are on the front together.
    """
    complete = [None if any(v is None or math.isnan(v) for v in p) else [float(v or 0) for v in p] for p in points]
    return [p is not None and not any(_beats(q, p) for q in complete if q is not None) for p in complete]


def _beats(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))
