"""The report's plots as PNG files, for MLflow and for slides; the page itself draws SVG that one can hover."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.validation.charts import is_log
from tasks.validation.report import (
    DISTRIBUTIONS,
    LOADS,
    Line,
    ReportData,
    engines_of,
    figures_of_front,
    front_points,
    lines,
    load_curves,
    point_of,
    quality_metric,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#4d5663", "#0072b2", "#d55e00", "#00835f", "#aa4499")
MARKERS = ("o", "s", "^", "D", "v")
VERDICTS = {"ACCEPT": "#1a7f4b", "REJECT": "#b3261e", "INCONCLUSIVE": "#8a5a00", "ANOMALOUS": "#8a5a00"}
DPI = 150


def draw(data: ReportData, folder: Path) -> list[Path]:
    """Writes one PNG per plot of the page into `folder`, and returns them."""
    drawn: dict[str, Figure] = {}
    for short, label in figures_of_front(data).items():
        points = front_points(data, short)
        if points:
            drawn[f"pareto-{short}"] = _scatter(data, points, label)
    for metric, label in DISTRIBUTIONS.items():
        if any(each.metric == metric for each in data.distributions):
            drawn[f"latency-{metric}"] = _spreads(data, metric, label)
    for name, curves in load_curves(data).items():
        x_label, y_label = LOADS[name]
        figure, axes = _axes(x_label, y_label, f"{data.title}: {y_label}")
        for index, (subject, levels) in enumerate(curves):
            xs, ys = zip(*(point_of(level) for level in levels), strict=True)
            axes.plot(xs, ys, color=COLOURS[index % 5], marker=MARKERS[index % 5], label=subject)
        axes.legend(fontsize=8, frameon=False)
        drawn[f"load-{name}"] = figure
    for line in lines(data):
        name = line.row.name.replace("/", "-").replace(": ", "-").replace(" ", "_")
        if line.row.judgement and any(check.measured is not None for check in line.row.judgement.checks):
            drawn[f"limits-{name}"] = _limits(line)
        if line.row.diagnosis and line.row.diagnosis.facts.layers:
            drawn[f"blocks-{name}"] = _blocks(line)
    for index, each in enumerate(data.curves):
        figure, axes = _axes(each.x_label, each.metric, f"{each.title}: {each.metric}")
        axes.plot(each.steps, each.values, color=COLOURS[1])
        drawn[f"curve-{index}"] = figure
    paths = []
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        paths.append(path)
    return paths


def _axes(x_label: str, y_label: str, title: str, height: float = 4.5) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(color="#e9ecf0")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _scatter(data: ReportData, points: Sequence[tuple[Line, float, float]], name: str) -> "Figure":
    metric = quality_metric(data)
    assert metric is not None  # of the points
    figure, axes = _axes(name, metric.title, f"{data.title}: {metric.title} against {name}")
    engines = engines_of(data)
    for index, engine in enumerate(engines):
        of = [(line, x, y) for line, x, y in points if line.row.engine == engine]
        colour, marker = COLOURS[index % 5], MARKERS[index % 5]
        faces = [colour if line.on_front else "white" for line, _, _ in of]
        for (_, x, y), face in zip(of, faces, strict=True):
            axes.scatter(x, y, marker=marker, edgecolors=colour, facecolors=face, s=45, zorder=3)
        axes.scatter([], [], marker=marker, color=colour, label=engine)
        for line, x, y in of:
            axes.annotate(line.row.candidate, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    if is_log([x for _, x, _ in points]):
        axes.set_xscale("log")
    axes.legend(fontsize=8, frameon=False)
    return figure


def _spreads(data: ReportData, metric: str, label: str) -> "Figure":
    of = {each.subject: each for each in data.distributions if each.metric == metric}
    rows = [line for line in lines(data) if line.row.name in of]
    figure, axes = _axes(label, "", f"{data.title}: {label}", height=1.2 + 0.4 * len(rows))
    engines = engines_of(data)
    for index, line in enumerate(reversed(rows)):
        p5, p25, p50, p75, p95 = of[line.row.name].values
        colour = COLOURS[engines.index(line.row.engine) % 5]
        axes.plot([p5, p95], [index, index], color=colour, linewidth=1.3)
        axes.barh(index, p75 - p25, left=p25, height=0.45, color=colour, alpha=0.35, edgecolor=colour)
        axes.plot([p50, p50], [index - 0.3, index + 0.3], color=colour, linewidth=2.5)
    axes.set_yticks(range(len(rows)), [line.row.name for line in reversed(rows)], fontsize=8)
    if is_log([value for line in rows for value in of[line.row.name].values]):
        axes.set_xscale("log")
    return figure


def _limits(line: Line) -> "Figure":
    """Every limit on a scale of its own: the interval in percent of the limit, or from it where that is zero."""
    judgement = line.row.judgement
    assert judgement
    checks = [check for check in judgement.checks if check.measured is not None]
    title = f"{line.row.name}: {judgement.verdict}"
    figure, axes = _axes("measured / limit", "", title, height=1.2 + 0.45 * len(checks))
    for index, check in enumerate(reversed(checks)):
        measured = check.measured or 0.0
        low, high = (measured if end is None else end for end in (check.low, check.high))
        scale, shift = (abs(check.limit), 0.0) if check.limit else (1.0, 1.0)
        colour = VERDICTS[check.verdict]
        axes.plot([shift + low / scale, shift + high / scale], [index, index], color=colour, linewidth=2.5)
        axes.plot(shift + measured / scale, index, "o", color=colour)
    axes.axvline(1.0, color="#1b1f24", linewidth=1)
    names = [f"{check.metric} {'≤' if check.bound == 'max' else '≥'} {check.limit:.4g}" for check in reversed(checks)]
    axes.set_yticks(range(len(checks)), names, fontsize=8)
    axes.set_ylim(-0.6, len(checks) - 0.4)
    return figure


def _blocks(line: Line) -> "Figure":
    diagnosis = line.row.diagnosis
    assert diagnosis
    layers = diagnosis.facts.layers
    figure, axes = _axes("block", "error of its output, %", f"{line.row.name}: error of each block", height=3)
    axes.bar(range(len(layers)), [100 * layer.whole for layer in layers], color=COLOURS[2])
    return figure
