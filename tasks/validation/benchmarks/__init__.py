"""Benchmarks: what an engine writes or finds likely on items of a task, scored, beside the original's answers."""

from typing import Annotated

from pydantic import Field

from tasks.validation.benchmarks.asking import Benchmark
from tasks.validation.benchmarks.classification import Classification
from tasks.validation.benchmarks.code_generation import CodeGeneration
from tasks.validation.benchmarks.embeddings import Embeddings
from tasks.validation.benchmarks.lm_evaluation import LmEvaluation
from tasks.validation.benchmarks.question_answering import QuestionAnswering
from tasks.validation.benchmarks.summarization import Summarization
from tasks.validation.benchmarks.translation import Translation

AnyBenchmark = Annotated[
    Translation | Summarization | QuestionAnswering | Classification | CodeGeneration | LmEvaluation | Embeddings,
    Field(discriminator="task"),
]
KINDS: tuple[type[Benchmark], ...] = (
    Translation,
    Summarization,
    QuestionAnswering,
    Classification,
    CodeGeneration,
    LmEvaluation,
    Embeddings,
)

METRICS = tuple({metric.name: metric for kind in KINDS for metric in kind.METRICS}.values())
"""Every metric of any benchmark; * stands for the name that a recipe gives it."""

__all__ = [
    "KINDS",
    "METRICS",
    "AnyBenchmark",
    "Classification",
    "CodeGeneration",
    "Embeddings",
    "LmEvaluation",
    "QuestionAnswering",
    "Summarization",
    "Translation",
]
