"""Figures and tables from what run.py wrote down: medians, intervals from resampled blocks, floors, ratios to peers."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from workers import Contender

from tasks.validation.machine import Kind, Machine
from tasks.validation.statistics import Estimate, median, ratio_of_medians

Floats = NDArray[np.float64]
Record = dict[str, Any]

METRICS = ("ttft_ms", "tpot_ms", "tokens_per_s")
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "int8")
"""Of products."""
OURS = "Slimline"
MIN_SHARED_BLOCKS = 3
"""Fewer blocks in common, and two contenders are compared as if they had been measured at different times."""


class Timings:
    """All timed rounds of one contender at one batch size."""

    def __init__(self, records: Sequence[Record], new_tokens: int) -> None:
        self.blocks = [int(record["block"]) for record in records]
        ttft_s = np.array([record["ttft_s"] for record in records], np.float64)  # [blocks, rounds]
        total_s = np.array([record["total_s"] for record in records], np.float64)
        batch_size = records[0]["batch_size"]
        self.of: dict[str, Floats] = {
            "ttft_ms": 1000 * ttft_s,
            "tpot_ms": 1000 * (total_s - ttft_s) / (new_tokens - 1),
            "tokens_per_s": batch_size * new_tokens / total_s,
        }

    def ratio_to(self, other: "Timings", metric: str) -> Estimate:
        """Of medians; of the blocks that both were in, if there are enough."""
        shared = sorted(set(self.blocks) & set(other.blocks))
        mine, others = self.of[metric], other.of[metric]
        paired = len(shared) >= MIN_SHARED_BLOCKS
        if paired:
            mine = mine[[self.blocks.index(block) for block in shared]]
            others = others[[other.blocks.index(block) for block in shared]]
        return ratio_of_medians(mine, others, seed=0, paired=paired)


def report(
    records: Sequence[Record],
    contenders: Sequence[Contender],
    checkpoint: Path,
    student: Path | None,
    about: Record,
    out: Path,
) -> None:
    """Writes results.json and results.md."""
    settings = about["settings"]
    by_name: dict[str, list[Record]] = {contender.name: [] for contender in contenders}
    for record in records:
        if record.get("contender") in by_name:
            by_name[record["contender"]].append(record)
    limits = limits_of([record for record in records if record["record"] == "machine"])
    num_weights = {False: count_weights(checkpoint), True: count_weights(student) if student else (0, 0)}
    timings = {name: _timings(found, settings) for name, found in by_name.items()}
    rows = [
        _row(
            contender,
            by_name[contender.name],
            timings[contender.name],
            limits,
            num_weights[contender.options.get("student", False)],
            settings["prompt_tokens"],
        )
        for contender in contenders
    ]
    for row in rows:
        row["first_tokens_as_float"] = _same_tokens(row, rows)
        row["versus"] = _versus(row, rows, timings)
    results = {**about, "limits": limits and limits.model_dump(), "contenders": rows}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(markdown(results))


def limits_of(records: Sequence[Record]) -> Machine | None:
    """The best that the machine did in any measurement of the run."""
    found = [Machine(**{name: record[name] for name in Machine.model_fields}) for record in records]
    return functools.reduce(Machine.best_with, found) if found else None


def count_weights(checkpoint: Path) -> tuple[int, int]:
    """Weights of the blocks' linear layers, and of the LM head."""
    in_blocks = in_head = 0
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2 and name.startswith("model.layers."):
                    in_blocks += shape[0] * shape[1]
                elif len(shape) == 2:
                    in_head = shape[0] * shape[1]
    return in_blocks, in_head


def _timings(records: Sequence[Record], settings: Record) -> dict[int, Timings]:
    """By batch size."""
    timed = [record for record in records if record["record"] == "timing"]
    by_size = {size: [r for r in timed if r["batch_size"] == size] for size in settings["batch_sizes"]}
    return {size: Timings(found, settings["new_tokens"]) for size, found in by_size.items() if found}


def _row(
    contender: Contender,
    records: Sequence[Record],
    timings: Mapping[int, Timings],
    limits: Machine | None,
    num_weights: tuple[int, int],
    prompt_tokens: int,
) -> Record:
    num_in_blocks, num_in_head = num_weights
    checks = [record for record in records if record["record"] == "check"]
    starts = [record for record in records if record["record"] == "start"]
    timed = [record for record in records if record["record"] == "timing"]
    row: Record = {"name": contender.name, "tool": contender.tool, "kind": contender.kind, "options": contender.options}
    if checks:
        wanted = ("tokens", "text", "perplexity", "num_windows", "size_bytes")
        row |= {name: checks[-1][name] for name in wanted}
    if not timings:
        return row
    row |= {
        "versions": starts[-1]["versions"],
        "facts": starts[-1]["facts"],
        "load_s": starts[-1]["load_s"],
        "peak_rss_loaded_mib": max(start["peak_rss_loaded_mib"] for start in starts),
        "peak_rss_batch_1_mib": max(start["peak_rss_batch_1_mib"] for start in starts),
        "peak_rss_mib": max(record["peak_rss_mib"] for record in timed),
        "idle_cpu_percent": max(record["idle_cpu_percent"] for record in timed),
        "num_blocks": len(timings[1].blocks),
        "batch_sizes": {
            size: {metric: median(found.of[metric], seed=0).model_dump() for metric in METRICS}
            for size, found in timings.items()
        },
    }
    if limits and "size_bytes" in row:
        read_bytes = row["size_bytes"] - (4 * num_in_head if row["options"].get("float_embedding") else 0)
        row |= floors(row["kind"], read_bytes, limits, 2 * (num_in_blocks * prompt_tokens + num_in_head))
        at_one = row["batch_sizes"][1]
        row["ttft_by_floor"] = at_one["ttft_ms"]["value"] / row["ttft_floor_ms"]
        row["tpot_by_floor"] = at_one["tpot_ms"]["value"] / row["tpot_floor_ms"]
    return row


def floors(kind: str, read_bytes: int, limits: Machine, num_operations: int) -> dict[str, float]:
    """What no runtime can go below at batch size 1, by the machine's measured limits.

    A token reads `read_bytes`, all weights once, at the bandwidth of a working set of that size. A prompt takes
    `num_operations` at the fastest measured rate of a kind of product that the contender may use: float32 its own
    alone. They are two for each weight of the blocks and each token of the prompt, and two for each weight of the LM
    head, which the last token alone needs; attention itself, here 2 % more, is left out.
    """
    allowed: dict[str, tuple[Kind, ...]] = {"float32": ("float32",), "bfloat16": ("float32", "bfloat16")}
    fastest = max(limits.operations_per_s[name] for name in allowed.get(kind, KINDS))
    return {
        "tpot_floor_ms": 1000 * read_bytes / limits.bandwidth(read_bytes),
        "ttft_floor_ms": 1000 * num_operations / fastest,
    }


def _same_tokens(row: Record, rows: Sequence[Record]) -> int | None:
    """How many tokens of the answer to the question are transformers' in float32, until the first that is not."""
    answers = [other["tokens"] for other in rows if other["name"] == "transformers-float32" and "tokens" in other]
    if not answers or "tokens" not in row:
        return None
    same = [mine == other for mine, other in zip(row["tokens"], answers[0], strict=True)]
    return same.index(False) if False in same else len(same)


def _versus(row: Record, rows: Sequence[Record], timings: Mapping[str, Mapping[int, Timings]]) -> list[Record]:
    """Of a contender of Slimline's: each metric by that of the best peer with weights of the same kind.

    A control is compared with the contender that it repeats, a student with the best peer of all.
    """
    if row["tool"] != OURS or "batch_sizes" not in row:
        return []
    control_of = row["options"].get("control_of")
    found = []
    for size in row["batch_sizes"]:
        for metric in METRICS:
            if control_of:
                rivals = [other for other in rows if other["name"] == control_of]
            else:
                rivals = [other for other in rows if other["tool"] != OURS]
                if not row["options"].get("student"):
                    rivals = [other for other in rivals if other["kind"] == row["kind"]]
            rivals = [other for other in rivals if size in other.get("batch_sizes", {})]
            if not rivals:
                continue
            best = (max if metric == "tokens_per_s" else min)(
                rivals, key=lambda other: other["batch_sizes"][size][metric]["value"]
            )
            ratio = timings[row["name"]][size].ratio_to(timings[best["name"]][size], metric)
            found.append({"batch_size": size, "metric": metric, "peer": best["name"], "ratio": ratio.model_dump()})
    return found


def markdown(results: Record) -> str:
    """The tables."""
    timed = [row for row in results["contenders"] if "batch_sizes" in row]
    untimed = [row for row in results["contenders"] if "batch_sizes" not in row]
    sizes = results["settings"]["batch_sizes"]
    parts = [_about(results), _speed(timed, sizes), _versus_table(timed), _checks(results["contenders"])]
    if untimed:
        parts.append("Not timed: " + ", ".join(row["name"] for row in untimed) + ".\n")
    return "\n".join(part for part in parts if part)


def _about(results: Record) -> str:
    limits, settings = results["limits"], results["settings"]
    lines = [
        f"Machine: {json.dumps(results['machine'])}",
        f"Settings: {json.dumps(settings)}",
    ]
    if limits:
        products = ", ".join(f"{kind} {limits['operations_per_s'][kind] / 1e12:.2f}" for kind in KINDS)
        rates = ", ".join(f"{size // 10**6} MB {rate / 1e9:.0f}" for size, rate in limits["read_bytes_per_s"].items())
        lines += [
            f"Memory read, GB/s by working set: {rates}",
            f"Products, 10^12 operations/s: {products}",
        ]
    lines.append("Medians with 95 % intervals from resampled blocks. Floors are those of batch size 1.")
    return "\n\n".join(lines) + "\n"


def _speed(rows: Sequence[Record], sizes: Sequence[int]) -> str:
    if not rows:
        return ""
    columns = ["contender", "blocks"]
    columns += [f"{name}, batch {size}" for size in sizes for name in ("TTFT ms", "TPOT ms", "tokens/s")]
    columns += ["TTFT / floor", "TPOT / floor", "peak MiB, batch 1", "peak MiB", "MB", "perplexity", "load s"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for row in sorted(rows, key=lambda row: (row["kind"], -row["batch_sizes"][1]["tokens_per_s"]["value"])):
        cells = [row["name"], str(row["num_blocks"])]
        cells += [_estimate(row["batch_sizes"][size][metric]) for size in sizes for metric in METRICS]
        checked = "size_bytes" in row
        cells += [f"{row[name]:.1f}" if name in row else "" for name in ("ttft_by_floor", "tpot_by_floor")]
        cells += [f"{row['peak_rss_batch_1_mib']:.0f}", f"{row['peak_rss_mib']:.0f}"]
        cells += [f"{row['size_bytes'] / 1e6:.0f}" if checked else "", _perplexity(row), f"{row['load_s']:.1f}"]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _versus_table(rows: Sequence[Record]) -> str:
    found = [(row["name"], versus) for row in rows for versus in row["versus"]]
    if not found:
        return ""
    columns = ["Slimline's", "batch", "metric", "by the best peer's (of a student: of any kind)", "peer"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for name, versus in found:
        ratio = _estimate(versus["ratio"], digits=3)
        lines.append(_line([name, str(versus["batch_size"]), versus["metric"], ratio, versus["peer"]]))
    return "\n".join(lines) + "\n"


def _checks(rows: Sequence[Record]) -> str:
    columns = ["contender", "first tokens as float32", "answer"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for row in rows:
        if "text" in row:
            text = " ".join(row["text"].split()).replace("|", "\\|")
            lines.append(_line([row["name"], str(row["first_tokens_as_float"]), text]))
    return "\n".join(lines) + "\n"


def _perplexity(row: Record) -> str:
    return "" if row.get("perplexity") is None else f"{row['perplexity']:.2f}"


def _estimate(estimate: Record, digits: int | None = None) -> str:
    if digits is None:
        digits = 1 if estimate["value"] < 100 else 0
    text = f"{estimate['value']:.{digits}f}"
    if estimate["low"] is None:
        return text
    return f"{text} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
