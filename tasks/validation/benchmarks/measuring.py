"""A benchmark asked of the original, once, and of each candidate; scored item by item, compared in pairs."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from tasks.calibration.progress import Report, silent
from tasks.validation.benchmarks import AnyBenchmark
from tasks.validation.benchmarks.asking import Columns
from tasks.validation.benchmarks.items import Item, load_items, save_items
from tasks.validation.benchmarks.scores import Score, compare
from tasks.validation.benchmarks.subjects import Subject
from tasks.validation.measured import Measured, Metric

ITEMS, ANSWERS, ABOUT = "items.jsonl", "answers.parquet", "benchmark.json"


class OriginalAnswers(BaseModel, frozen=True, extra="forbid"):
    """What the original came to."""

    task: str
    num_items: int
    num_documents: int
    figures: dict[str, float] = Field(description="By name of the metric.")


class BenchmarkSummary(BaseModel, frozen=True, extra="forbid"):
    """What a candidate came to, beside the original on the same items; intervals are 95 %."""

    task: str
    num_items: int
    num_documents: int
    metrics: dict[str, Measured] = Field(description="By name, without that of the benchmark.")
    signatures: dict[str, str] = Field(description="How each figure is computed.")


def ask_original(
    *, checkpoint: Path, benchmark: AnyBenchmark, data: Path, threads: int, out: Path, report: Report = silent
) -> OriginalAnswers:
    """The original's answers, in PyTorch or as the engine bundle that it is, stored in `out` for candidates.

    Writes items.jsonl, the items; answers.parquet, a row per item: what the original answered, and its own score under
    each metric; benchmark.json, what was asked.

    Raises:
        ValueError: the data cannot be used, or the model cannot answer them.
    """
    if problem := benchmark.missing():
        raise ValueError(problem)
    items = benchmark.items(data)
    answers = benchmark.ask(items, Subject(checkpoint, threads), report)
    scores = benchmark.scores(items, answers, None)
    save_items(items, out / ITEMS)
    _table(benchmark, items, {"": answers}, {"": scores}).to_parquet(out / ANSWERS, index=False)
    (out / ABOUT).write_text(_about(benchmark), encoding="utf-8")
    return OriginalAnswers(
        task=benchmark.task,
        num_items=len(items),
        num_documents=_num_documents(items),
        figures={name: each.value for name, each in scores.items()},
    )


def measure_benchmark(
    *, bundle: Path, reference: Path, benchmark: AnyBenchmark, threads: int, out: Path, report: Report = silent
) -> BenchmarkSummary:
    """The answers of an engine bundle, compared with those that `ask_original` stored in `reference`.

    Writes items.parquet, a row per item: prompt, both answers, and both scores under each metric.

    Raises:
        ValueError: the engine cannot answer, or a figure is not a number.
    """
    import pandas as pd

    if (reference / ABOUT).read_text(encoding="utf-8") != _about(benchmark):
        raise ValueError("Candidate and original must be asked alike; the original was asked otherwise. Ask it again.")
    items = load_items(reference / ITEMS)
    kept = pd.read_parquet(reference / ANSWERS)
    answers = benchmark.ask(items, Subject(bundle, threads), report)
    original: Columns = {name: list(kept[name]) for name in answers}
    scores = benchmark.scores(items, answers, original)
    originals = benchmark.scores(items, original, None)
    _table(benchmark, items, {"": answers, "original_": original}, {"": scores, "original_": originals}).to_parquet(
        out / "items.parquet", index=False
    )
    metrics = {metric.name.removeprefix("*."): metric for metric in benchmark.METRICS}
    documents = [item.document for item in items]
    return BenchmarkSummary(
        task=benchmark.task,
        num_items=len(items),
        num_documents=_num_documents(items),
        metrics={
            name: compare(
                name,
                each,
                originals.get(name),
                documents,
                better=metrics[name].better,
                largest=metrics[name].largest,
                seed=benchmark.seed,
            )
            for name, each in scores.items()
        },
        signatures=benchmark.signatures(items),
    )


def metrics_of(name: str, benchmark: AnyBenchmark) -> tuple[Metric, ...]:
    """The metrics that a benchmark called `name` measures."""
    return tuple(
        metric.model_copy(update={"name": metric.name.replace("*", name, 1), "option": f"validation.tasks.{name}"})
        for metric in benchmark.measured_metrics()
    )


def measured(name: str, summary: BenchmarkSummary) -> dict[str, Measured]:
    """What was measured, by name of the metric."""
    return {f"{name}.{metric}": each for metric, each in summary.metrics.items()}


def _table(
    benchmark: AnyBenchmark, items: list[Item], answers: dict[str, Columns], scores: dict[str, dict[str, Score]]
) -> Any:
    import pandas as pd

    columns: dict[str, Any] = {
        "line": [item.line for item in items],
        "document": [item.document for item in items],
        "prompt": benchmark.prompts(items),
    }
    for prefix, found in answers.items():
        columns |= {prefix + name: values for name, values in found.items()}
    for prefix, each in scores.items():
        columns |= {prefix + name: score.by_item() for name, score in each.items()}
    return pd.DataFrame(columns)


def _about(benchmark: AnyBenchmark) -> str:
    return json.dumps(benchmark.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def _num_documents(items: list[Item]) -> int:
    return len({item.document for item in items})
