"""The picture of a results.json: speed of every contender, one panel each for prompts, tokens and batches."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

PANELS = (
    (0, "ttft_ms", "time to first token, ms"),
    (0, "tokens_per_s", "tokens/s, batch 1"),
    (-1, "tokens_per_s", "tokens/s, batch {}"),
)


def draw(results: dict[str, Any], file: Path) -> None:
    """One line per contender, the fastest at batch size 1 on top, within its kind of weights; Slimline's are black."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "slimline", "font.size": 9})
    timed = [row for row in results["contenders"] if "batch_sizes" in row and "control_of" not in row["options"]]
    rows = sorted(timed, key=lambda row: (row["kind"], row["batch_sizes"]["1"]["tokens_per_s"]["value"]))
    sizes = results["settings"]["batch_sizes"]
    figure, panels = plt.subplots(
        1, len(PANELS), figsize=(11, 0.6 + 0.24 * len(rows)), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (index, metric, title) in zip(panels[0], PANELS, strict=True):
        for place, row in enumerate(rows):
            found = row["batch_sizes"][str(sizes[index])][metric]
            colour = "black" if row["tool"] == "Slimline" else "0.5"
            low, high = (found["value"] if found[end] is None else found[end] for end in ("low", "high"))
            axes.plot([low, high], [place, place], color=colour, linewidth=1.2)
            axes.plot(found["value"], place, "o" if colour == "black" else "s", color=colour, markersize=5)
        axes.set_title(title.format(sizes[index]), fontsize=9)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="x", which="minor", labelsize=7)
        axes.grid(True, axis="both", which="both", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(rows)), [f"{row['name']} ({row['kind']})" for row in rows])
    for tick, row in zip(panels[0][0].get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row["tool"] == "Slimline" else "normal")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text()), arguments.picture)


if __name__ == "__main__":
    main()
