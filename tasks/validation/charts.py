"""Small charts as inline SVG: scatter plots with a Pareto front, curves, intervals beside their limit.

Colours come from the page's style sheet through classes, so that the charts follow light, dark and print. Every mark
has a <title>, which browsers show as a tooltip and screen readers read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tasks.validation.pareto import pareto_front

CHARACTER_WIDTH = 6.4
"""Of the 11.5 px labels, on average; labels are placed with it, not measured."""
LINE_HEIGHT = 14
NUM_SERIES = 5
"""Colours of the style sheet, and shapes of marks."""


@dataclass(frozen=True)
class Point:
    """A mark of a scatter plot."""

    x: float
    y: float
    label: str
    tooltip: str
    series: int
    """Which colour and shape, one per engine; they repeat after NUM_SERIES."""
    on_front: bool
    """Filled, because no other point beats it in any of the figures compared (more than the two drawn)."""


@dataclass(frozen=True)
class Axis:
    """A scale from data to pixels; 0 is not forced in."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        a, b, v = (math.log(x) if self.is_log else x for x in (self.low, self.high, value))
        return self.start + (v - a) / ((b - a) or 1) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(k / 4 for k in range(4, 40))):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(found) >= 3:
                    return found if len(found) < 9 else found[:: math.ceil(len(found) / 8)]
            return nice_ticks(self.low, self.high)
        return nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], about as many as asked."""
    span = (high - low) or abs(high) or 1.0
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def scatter(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    higher_is_better: bool = False,
    width: int = 560,
    height: int = 400,
) -> Markup:
    """Points with the front of the two figures drawn as a staircase; less is better of x, and of y as it says.

    An axis whose values span more than a factor of three is logarithmic, and says so.
    """
    left, right, top, bottom = 58, 16, 14, 46
    x = _axis([p.x for p in points], left + 14, width - right - 14)
    y = _axis([p.y for p in points], height - bottom - 12, top + 12)
    parts = [_grid(x, y, left, width - right, top, height - bottom)]
    parts.append(_axis_names(x, y, x_label, y_label, left, width, height, bottom))
    costs = [(p.x, -p.y if higher_is_better else p.y) for p in points]
    front = sorted({(p.x, p.y) for p, on in zip(points, pareto_front(costs), strict=True) if on})
    if front:
        path = f"M{x(front[0][0]):.1f},{height - bottom if higher_is_better else top}V{y(front[0][1]):.1f}"
        path += "".join(f"H{x(px):.1f}V{y(py):.1f}" for px, py in front[1:]) + f"H{width - right}"
        parts.append(
            Markup('<path class="front" d="{}"><title>Pareto front of these two figures</title></path>').format(path)
        )
    placed = place_labels(
        [(x(p.x), y(p.y), p.label) for p in points], left=left, right=width - right, top=top, bottom=height - bottom
    )
    for point, (label_x, label_y, far) in zip(points, placed, strict=True):
        at_x, at_y = x(point.x), y(point.y)
        if far:
            end_x = min(max(at_x, label_x), label_x + text_width(point.label))
            end_y = label_y - 10 if label_y > at_y else label_y + 2
            parts.append(
                Markup('<line class="leader" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
                    at_x, at_y, end_x, end_y
                )
            )
        parts.append(_mark(at_x, at_y, point))
        parts.append(
            Markup('<text class="label" x="{:.1f}" y="{:.1f}">{}<title>{}</title></text>').format(
                label_x, label_y, point.label, point.tooltip
            )
        )
    return _svg(width, height, f"{y_label} against {x_label}", parts)


def place_labels(
    anchors: Sequence[tuple[float, float, str]], *, left: float, right: float, top: float, bottom: float
) -> list[tuple[float, float, bool]]:
    """Where each label starts, (x, baseline y, whether it is so far that it needs a line to its point).

    Greedy: each label takes the nearest of rings of places around its point that covers no point and no earlier label
    and lies inside the plot; points in the thick of others choose first. When nothing is free the label takes the
    place that covers least.
    """
    marks = [(px - 6, py - 6, px + 6, py + 6) for px, py, _ in anchors]
    taken: list[tuple[float, float, float, float]] = []
    chosen: dict[int, tuple[float, float, bool]] = {}

    def crowd(index: int) -> float:
        px, py, _ = anchors[index]
        return -sum(1 / (1 + math.hypot(px - qx, (py - qy) * 3)) for qx, qy, _ in anchors)

    for index in sorted(range(len(anchors)), key=crowd):
        px, py, label = anchors[index]
        wide = text_width(label)
        best: tuple[float, tuple[float, float, bool], tuple[float, float, float, float]] | None = None
        for distance in (10, 18, 30, 44, 60, 80, 104, 130):
            sideways = [(px + distance, py + 4), (px - distance - wide, py + 4)]
            above = [(px - wide / 2, py - distance), (px - wide / 2, py + distance + 8)]
            corners = [
                (px + side * distance * 0.8 - (wide if side < 0 else 0), py + 4 + updown * distance)
                for side in (1, -1)
                for updown in (-0.8, 0.8)
            ]
            for lx, ly in [*sideways, *above, *corners]:
                box = (lx - 1, ly - LINE_HEIGHT + 3, lx + wide + 1, ly + 3)
                outside = max(0, left - box[0], box[2] - right, top - box[1], box[3] - bottom)
                covered = sum(_overlap(box, other) for other in [*taken, *marks])
                cost = covered + 40 * outside
                if best is None or cost < best[0] - 1e-9:
                    best = (cost, (lx, ly, distance > 18), box)
            if best is not None and best[0] == 0:
                break
        assert best is not None
        chosen[index] = best[1]
        taken.append(best[2])
    return [chosen[index] for index in range(len(anchors))]


def text_width(text: str) -> float:
    """Pixels that a label takes, roughly."""
    return CHARACTER_WIDTH * len(text)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def curve(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    label: str,
    x_label: str,
    width: int = 270,
    height: int = 130,
) -> Markup:
    """One training curve; logarithmic where it falls by more than a factor of three."""
    left, right, top, bottom = 46, 10, 8, 30
    x = Axis(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1, left, width - right, is_log=False)
    y = _axis(values, height - bottom, top + 4)
    parts = [_grid(x, y, left, width - right, top, height - bottom, x_ticks=nice_ticks(x.low, x.high, 3))]
    points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, values, strict=True))
    tooltip = f"{label}: {values[0]:.4g} to {values[-1]:.4g} at {steps[-1]:,.0f} {x_label}"
    parts.append(Markup('<polyline class="curve" points="{}"><title>{}</title></polyline>').format(points, tooltip))
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (left + width - right) / 2, height - 3, x_label
        )
    )
    return _svg(width, height, tooltip, parts)


@dataclass(frozen=True)
class Spread:
    """One row of a chart of distributions: values at QUANTILES, ascending."""

    label: str
    values: tuple[float, ...]
    tooltip: str
    series: int


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def spreads(rows: Sequence[Spread], *, x_label: str, width: int = 560) -> Markup:
    """Distributions under each other: a box from p25 to p75, a line from p5 to p95, a mark at the median."""
    left, right, top, bottom, step = 10, 16, 6, 40, 40
    height = top + step * len(rows) + bottom
    x = _axis([value for row in rows for value in row.values], left + 8, width - right - 8)
    parts = [_vertical_grid(x, top, height - bottom)]
    for index, row in enumerate(rows):
        middle = top + step * index + 27
        p5, p25, p50, p75, p95 = (x(value) for value in row.values)
        parts.append(
            Markup(
                '<g class="spread s{series}"><title>{tooltip}</title>'
                '<rect class="hit" x="{left}" y="{hit}" width="{wide}" height="{step}"/>'
                '<text class="label" x="{left}" y="{text}">{label}</text>'
                '<line x1="{p5:.1f}" x2="{p95:.1f}" y1="{y}" y2="{y}"/>'
                '<rect class="box" x="{p25:.1f}" y="{box}" width="{box_wide:.1f}" height="9" rx="2"/>'
                '<line class="median" x1="{p50:.1f}" x2="{p50:.1f}" y1="{above}" y2="{below}"/></g>'
            ).format(
                series=row.series % NUM_SERIES,
                tooltip=row.tooltip,
                left=left,
                hit=middle - 22,
                wide=width - left - right,
                step=step - 2,
                text=middle - 10,
                label=row.label,
                p5=p5,
                p95=p95,
                p25=p25,
                box=middle - 4.5,
                box_wide=max(p75 - p25, 1.0),
                p50=p50,
                y=middle,
                above=middle - 7,
                below=middle + 7,
            )
        )
    name = f"{x_label} (log scale)" if x.is_log else x_label
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(width / 2, height - 8, name)
    )
    return _svg(width, height, f"distributions of {x_label}", parts)


@dataclass(frozen=True)
class Line:
    """One curve of a chart of several, with a mark at every point."""

    label: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    tooltips: tuple[str, ...]
    series: int


def curves(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    limit: float | None = None,
    width: int = 560,
    height: int = 340,
) -> Markup:
    """Several curves over one axis, named at their ends; a dashed line where a limit is."""
    width, height = 560, 340
    left, right, top, bottom = 58, 16, 14, 46
    ys = [value for line in lines for value in line.ys] + ([limit] if limit else [])
    x = _axis([value for line in lines for value in line.xs], left + 10, width - right - 14)
    y = _axis(ys, height - bottom - 10, top + 10)
    parts = [_grid(x, y, left, width - right, top, height - bottom)]
    parts.append(_axis_names(x, y, x_label, y_label, left, width, height, bottom))
    if limit:
        parts.append(
            Markup(
                '<line class="front" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"><title>limit {}</title></line>'
            ).format(left, width - right, f"{limit:.4g}", y=y(limit))
        )
    ends = [(x(line.xs[-1]), y(line.ys[-1]), line.label) for line in lines]
    placed = place_labels(ends, left=left, right=width - right, top=top, bottom=height - bottom)
    for line, (label_x, label_y, _) in zip(lines, placed, strict=True):
        points = list(zip(line.xs, line.ys, line.tooltips, strict=True))
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py, _ in points)
        parts.append(Markup('<polyline class="load s{}" points="{}"/>').format(line.series % NUM_SERIES, path))
        parts += [
            _mark(x(px), y(py), Point(px, py, line.label, tooltip, line.series, on_front=True))
            for px, py, tooltip in points
        ]
        parts.append(Markup('<text class="label" x="{:.1f}" y="{:.1f}">{}</text>').format(label_x, label_y, line.label))
    return _svg(width, height, f"{y_label} over {x_label}", parts)


def bars(values: Sequence[tuple[str, float]], *, y_label: str, width: int = 560, height: int = 170) -> Markup:
    """Bars of (what the tooltip calls it, part of one), numbered from 0: errors of blocks."""
    left, right, top, bottom = 58, 12, 10, 40
    y = Axis(0, max([value for _, value in values] + [1e-9]) * 1.08, height - bottom, top, is_log=False)
    step = (width - left - right) / len(values)
    parts = []
    for value in nice_ticks(0, y.high, 4):
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{} %</text>'
            ).format(left, width - right, left - 6, y(value) + 4, tick(100 * value), y=y(value))
        )
    every = math.ceil(len(values) / 16)
    for index, (name, value) in enumerate(values):
        at = left + step * index
        parts.append(
            Markup(
                '<rect class="column" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
            ).format(at + 0.1 * step, y(value), 0.8 * step, max(height - bottom - y(value), 0.5), name)
        )
        if index % every == 0:
            parts.append(
                Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                    at + step / 2, height - bottom + 13, index
                )
            )
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (left + width) / 2, height - 4, y_label
        )
    )
    return _svg(width, height, y_label, parts)


def interval_bar(
    *, limit: float, measured: float, low: float | None, high: float | None, is_max: bool, verdict: str
) -> Markup:
    """The measured interval beside its limit, the bad side shaded."""
    width, height, edge = 190, 22, 8.0
    said = f" [{'-∞' if low is None else f'{low:.4g}'}, {'∞' if high is None else f'{high:.4g}'}]"
    tooltip = f"measured {measured:.4g}{said if (low, high) != (None, None) else ''}, limit {limit:.4g}"
    is_open = high is None and low is not None  # as far as the picture goes
    low, high = (measured if end is None else end for end in (low, high))
    ends = [limit, low, high]
    pad = 0.25 * ((max(ends) - min(ends)) or abs(limit) or 1)
    x = Axis(min(ends) - pad, max(ends) + pad, edge, width - edge, is_log=False)
    shaded = (x(limit), width - edge) if is_max else (edge, x(limit))
    parts = [
        Markup('<rect class="bad" x="{:.1f}" y="2" width="{:.1f}" height="{}"/>').format(
            shaded[0], max(0.0, shaded[1] - shaded[0]), height - 4
        ),
        Markup('<line class="limit" x1="{0:.1f}" x2="{0:.1f}" y1="1" y2="{1}"/>').format(x(limit), height - 1),
        Markup('<line class="whisker {}" x1="{:.1f}" x2="{:.1f}" y1="11" y2="11"/>').format(
            verdict.lower(), x(low), width - edge if is_open else max(x(high), x(low) + 0.1)
        ),
        Markup('<circle class="dot {}" cx="{:.1f}" cy="11" r="4"><title>{}</title></circle>').format(
            verdict.lower(), x(measured), tooltip
        ),
    ]
    return _svg(width, height, tooltip, parts, css="interval")


def mark(series: int, *, on_front: bool = True) -> Markup:
    """A mark as the legend shows it."""
    point = Point(0, 0, "", "", series, on_front)
    return Markup('<svg class="key" width="16" height="16" viewBox="0 0 16 16" aria-hidden="true">{}</svg>').format(
        _mark(8, 8, point)
    )


def is_log(values: Sequence[float]) -> bool:
    """Whether an axis of these values is logarithmic: they are positive and span more than a factor of three."""
    return min(values) > 0 and max(values) / min(values) > 3


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    low, high = min(values), max(values)
    if is_log(values):
        room = (high / low) ** 0.06
        return Axis(low / room, high * room, start, end, is_log=True)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room, start, end, is_log=False)


def _vertical_grid(x: Axis, top: float, bottom: float, ticks: Sequence[float] | None = None) -> Markup:
    return Markup("").join(
        Markup(
            '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
            '<text class="tick" x="{0:.1f}" y="{3}" text-anchor="middle">{4}</text>'
        ).format(x(value), top, bottom, bottom + 13, tick(value))
        for value in (x.ticks() if ticks is None else ticks)
    )


def _grid(
    x: Axis,
    y: Axis,
    left: float,
    right: float,
    top: float,
    bottom: float,
    x_ticks: Sequence[float] | None = None,
) -> Markup:
    parts = [_vertical_grid(x, top, bottom, x_ticks)]
    for value in y.ticks():
        parts.append(
            Markup(
                '<line class="grid" x1="{1}" x2="{2}" y1="{0:.1f}" y2="{0:.1f}"/>'
                '<text class="tick" x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>'
            ).format(y(value), left, right, left - 6, y(value) + 4, tick(value))
        )
    return Markup("").join(parts)


def tick(value: float) -> str:
    """A tick's number without needless digits."""
    if abs(value) < 1e-12:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def _axis_names(
    x: Axis, y: Axis, x_label: str, y_label: str, left: float, width: float, height: float, bottom: float
) -> Markup:
    x_name, y_name = (f"{n} (log scale)" if a.is_log else n for n, a in ((x_label, x), (y_label, y)))
    return Markup(
        '<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>'
        '<text class="axis" transform="translate(13,{}) rotate(-90)" text-anchor="middle">{}</text>'
    ).format((left + width) / 2, height - 8, x_name, (height - bottom) / 2, y_name)


def _mark(x: float, y: float, point: Point) -> Markup:
    series = point.series % NUM_SERIES
    css = f"mark s{series}" + ("" if point.on_front else " hollow")
    tag, shape = (
        ("circle", f'cx="{x:.1f}" cy="{y:.1f}" r="5"'),
        ("rect", f'x="{x - 4.6:.1f}" y="{y - 4.6:.1f}" width="9.2" height="9.2"'),
        ("path", f'd="M{x:.1f},{y - 5.8:.1f}l5.4,10h-10.8z"'),
        ("path", f'd="M{x:.1f},{y - 6.2:.1f}l6.2,6.2l-6.2,6.2l-6.2,-6.2z"'),
        ("path", f'd="M{x:.1f},{y + 5.8:.1f}l5.4,-10h-10.8z"'),
    )[series]
    drawn = Markup(shape)  # noqa: S704 of the numbers above
    return Markup('<{tag} class="{css}" {shape}><title>{tooltip}</title></{tag}>').format(
        tag=tag, css=css, shape=drawn, tooltip=point.tooltip
    )


def _svg(width: int, height: int, title: str, parts: Sequence[Markup], css: str = "chart") -> Markup:
    return Markup(
        '<svg class="{}" viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}</svg>'
    ).format(css, width, height, width, height, title, Markup("").join(parts))
