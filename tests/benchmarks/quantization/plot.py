"""The picture of a results.json: what quantization costs against how many bits it leaves."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

STYLES = {  # marker, fill, line; told apart in greyscale too
    "Slimline": ("o", "black", "-"),
    "NNCF": ("s", "white", "--"),
    "llama.cpp": ("^", "white", ":"),
    "ONNX Runtime": ("D", "0.7", "-."),
    "torchao and HQQ": ("v", "0.7", (0, (1, 3))),
    "AutoRound": ("P", "white", (0, (5, 2, 1, 2))),
    "LLM Compressor": ("X", "0.7", (0, (3, 3))),
}
SMALLEST_PERCENT = 0.03
"""Where the axis begins; what costs less, or gains, is drawn there."""


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """One mark per contender; a line and a label per tool, through those that none of its own beats."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "slimline", "font.size": 10})
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    ends = []
    for tool, (marker, fill, line) in STYLES.items():
        points = [
            (row["bits_per_weight"], max(row["change_percent"], SMALLEST_PERCENT))
            for row in rows
            if row["tool"] == tool
        ]
        if not points:
            continue
        colour = "black" if tool == "Slimline" else "0.35"
        size = 45 if tool == "Slimline" else 30
        axes.scatter(*zip(*points, strict=True), s=size, marker=marker, facecolor=fill, edgecolor=colour, zorder=3)
        best = frontier(points)
        axes.plot(*zip(*best, strict=True), linestyle=line, color=colour, linewidth=2 if tool == "Slimline" else 1.2)
        ends.append((tool, *best[-1], colour, marker))
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.28 * (high - low))
    axes.set_xlabel("bits per weight, all weights and their scales counted")
    axes.set_ylabel("increase of perplexity over float32, % (log)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    label(axes, ends)
    figure.savefig(file, metadata={"Date": None})


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of fewest bits for what they cost, by bits."""
    best: list[tuple[float, float]] = []
    for bits, cost in sorted(points):
        if not best or cost < best[-1][1]:
            best.append((bits, cost))
    return best


def label(axes: Any, ends: list[tuple[str, float, float, str, str]]) -> None:
    """Each tool's name in the right margin, level with its line's last point where no other name is, joined to it."""
    axes.figure.canvas.draw()
    right = axes.get_xlim()[1]
    low, high = (axes.transAxes.inverted().transform(axes.transData.transform((right, y)))[1] for y in axes.get_ylim())
    wanted = sorted(
        (axes.transAxes.inverted().transform(axes.transData.transform((bits, cost)))[1], tool, bits, cost, colour)
        for tool, bits, cost, colour, _ in ends
    )
    place = low
    for level, tool, bits, cost, colour in wanted:
        place = max(place + 0.055, min(level, high))
        axes.annotate(
            tool,
            (bits, cost),
            xytext=(0.82, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            weight="bold" if tool == "Slimline" else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.7",
                "linewidth": 0.7,
                "shrinkA": 2,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text()), arguments.picture)


if __name__ == "__main__":
    main()
