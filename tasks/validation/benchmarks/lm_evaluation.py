"""Tasks of lm-evaluation-harness (EleutherAI), asked of the engine that will serve instead of a PyTorch model."""

import hashlib
import importlib.metadata
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tasks.calibration.progress import Report
from tasks.validation.benchmarks.asking import Columns, Options, not_installed, text_metric
from tasks.validation.benchmarks.items import Item
from tasks.validation.benchmarks.scores import Floats, Score, mean_of
from tasks.validation.benchmarks.subjects import Subject
from tasks.validation.measured import Metric

if TYPE_CHECKING:
    from lm_eval.api.task import Task

PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte")


class LmEvaluation(Options, frozen=True, extra="forbid"):
    """One task of lm-evaluation-harness, with its own prompts and rules, through the engine."""

    METRICS: ClassVar[tuple[Metric, ...]] = (
        text_metric("*.acc", "accuracy"),
        text_metric("*.acc_norm", "accuracy, by likelihood per byte"),
        text_metric("*.exact_match", "exact match"),
        *(text_metric(f"*.{name}", name.replace("_", " "), largest=None, better="lower") for name in PERPLEXITIES),
    )

    task: Literal["lm_evaluation"]
    data: str = Field(min_length=1, description="Name of a task of the harness (arc_easy), or path of its YAML file.")
    metrics: tuple[
        Literal["acc", "acc_norm", "exact_match", "word_perplexity", "byte_perplexity", "bits_per_byte"], ...
    ] = Field(("acc",), min_length=1, description="Which of the task's metrics are kept.")
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question; null: as the task says.")
    chat: bool = Field(False, description="Ask through the model's chat template.")

    def measured_metrics(self) -> tuple[Metric, ...]:
        """Those that are named."""
        return tuple(metric for metric in self.METRICS if metric.name.removeprefix("*.") in self.metrics)

    def missing(self) -> str | None:
        """Whether the harness is."""
        return not_installed("lm_eval", extra="lm-eval", task=self.task)

    def file(self) -> Path | None:
        """The task's name or file, as a path."""
        return Path(self.data)

    def data_fingerprint(self) -> str | None:
        """The contents of the YAML file, or the task's name, whose definition changes with the harness' version."""
        file = Path(self.data)
        return hashlib.sha256(file.read_bytes() if file.is_file() else self.data.encode()).hexdigest()

    def items(self, file: Path) -> list[Item]:
        """The task's documents that are asked.

        Raises:
            ValueError: there is no such task, or it has too few documents.
        """
        documents = list(_load(str(file)).eval_docs)
        if self.num_items is not None and self.num_items > len(documents):
            raise ValueError(
                f"num_items {self.num_items} needs as many documents; {self.data} has {len(documents)}. Lower it, or "
                "leave it out."
            )
        if not documents:
            raise ValueError(f"A benchmark needs items; {self.data} has none.")
        places = np.arange(len(documents))
        if self.num_items is not None:
            places = np.sort(np.random.default_rng(self.seed).choice(places, self.num_items, replace=False))
        names: dict[str, int] = {}
        found = []
        for place in places:
            fields = json.loads(json.dumps(documents[place], default=str))
            if self.document is not None and self.document not in fields:
                raise ValueError(
                    f"Document {place} of {self.data} must have the field {self.document!r}; it has "
                    f"{', '.join(map(repr, fields))}."
                )
            name = str(place) if self.document is None else json.dumps(fields[self.document])
            found.append(Item(int(place) + 1, fields, names.setdefault(name, len(names))))
        return found

    def prompts(self, items: list[Item]) -> list[str]:
        """The documents; the harness makes the prompts."""
        return [json.dumps(item.fields, ensure_ascii=False) for item in items]

    def ask(self, items: list[Item], subject: Subject, report: Report) -> Columns:
        """What the harness says of each document: the kept metrics, and the model's responses.

        Raises:
            ValueError: the task has no such metric, or none that is a mean or a perplexity over its documents.
        """
        from lm_eval.evaluator import evaluate

        from tasks.validation.benchmarks.lm_evaluation_model import EngineLM

        task = _load(self.data)
        if self.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=self.num_fewshot)
        task.set_fewshot_seed(seed=self.seed)
        name = str(task.task_name)
        _check_metrics(task, self.metrics, self.data)
        with ExitStack() as stack:
            if task.OUTPUT_TYPE == "generate_until":
                model = EngineLM(report, generator=stack.enter_context(subject.generator()))
            else:
                model = EngineLM(report, scorer=stack.enter_context(subject.session()))
            results = evaluate(
                lm=model,
                task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
                samples={name: [item.line - 1 for item in items]},
                bootstrap_iters=0,
                apply_chat_template=self.chat,
            )
        samples = results["samples"][name]
        first = samples[0]["filter"]  # of a task with several filters, the first
        by_place = {sample["doc_id"]: sample for sample in samples if sample["filter"] == first}
        kept = [by_place[item.line - 1] for item in items]
        columns: Columns = {"answer": [json.dumps(sample["filtered_resps"], default=str) for sample in kept]}
        for metric in self.metrics:
            columns[f"value_{metric}"] = [_values(sample[metric]) for sample in kept]
        return columns

    def scores(self, items: list[Item], answers: Columns, original: Columns | None) -> dict[str, Score]:
        """The harness' own values: means over documents, or perplexities of all their words or bytes."""
        found: dict[str, Score] = {}
        for metric in self.metrics:
            values = np.asarray([list(value) for value in answers[f"value_{metric}"]], np.float64)
            if metric not in PERPLEXITIES:
                found[metric] = mean_of(values[:, 0])
            else:
                found[metric] = Score(values, _bits if metric == "bits_per_byte" else _perplexity)
        return found

    def signatures(self, items: list[Item]) -> dict[str, str]:
        """Task, examples and version."""
        version = importlib.metadata.version("lm_eval")
        how = f"{self.data}, num_fewshot {self.num_fewshot}, lm-evaluation-harness {version}"
        return dict.fromkeys(self.metrics, how)


def _perplexity(sums: Floats) -> Floats:
    """Args: sums [..., 2], log-likelihoods in nats, and words or bytes."""
    return np.asarray(np.exp(-sums[..., 0] / sums[..., 1]), np.float64)


def _bits(sums: Floats) -> Floats:
    return np.asarray(-sums[..., 0] / sums[..., 1] / np.log(2), np.float64)


def _load(name: str) -> "Task":
    from lm_eval.tasks import TaskManager

    try:
        found = TaskManager(include_defaults=not Path(name).is_file()).load(name)
    except KeyError:
        raise ValueError(
            f"lm-evaluation-harness has no task {name!r}, and there is no such YAML file. `lm-eval ls tasks` lists "
            "them."
        ) from None
    tasks = list(found["tasks"].values())
    if len(tasks) != 1:
        raise ValueError(
            f"A benchmark is one task; {name!r} names {len(tasks)}: {', '.join(list(found['tasks'])[:5])}, … Name each "
            "of them under validation.tasks."
        )
    task: Task = tasks[0]
    return task


def _check_metrics(task: "Task", wanted: tuple[str, ...], name: str) -> None:
    aggregations = task.aggregation()
    for metric in wanted:
        if metric not in aggregations:
            raise ValueError(
                f"The task {name} must have the metric {metric!r}; it has {', '.join(aggregations)}. Change `metrics`."
            )
        how = getattr(aggregations[metric], "__name__", str(aggregations[metric]))
        if how not in ("mean", "weighted_perplexity", "bits_per_byte"):
            raise ValueError(
                f"Metrics that are a mean or a perplexity over documents can be compared here; {metric!r} of {name} is "
                f"aggregated by {how!r}. Use another of its metrics: {', '.join(aggregations)}."
            )


def _values(value: Any) -> list[float]:
    return [float(part) for part in (value if isinstance(value, tuple | list) else [value])]
