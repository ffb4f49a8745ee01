"""Summarization: ROUGE of what a model writes, by rouge-score."""

from importlib.metadata import version
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from tasks.calibration.progress import Report
from tasks.validation.benchmarks.asking import Columns, Texts, Written, not_installed, text_metric
from tasks.validation.benchmarks.items import Item
from tasks.validation.benchmarks.scores import Score, mean_of
from tasks.validation.benchmarks.subjects import Subject
from tasks.validation.measured import Metric

NAMES = ("rouge1", "rouge2", "rougeL")


class Text(BaseModel):
    """A line of the data; the prompt may name any other field of it."""

    text: str = Field(description="text, what to summarize.")
    summary: str | Texts = Field(description="text, or a list of texts: summaries by people.")


class Summarization(Written, frozen=True, extra="forbid"):
    """Summarize `text`; compared with `summary`."""

    METRICS: ClassVar[tuple[Metric, ...]] = tuple(
        text_metric(f"*.{name}", name.replace("rouge", "ROUGE-")) for name in NAMES
    )
    ITEM: ClassVar[type[BaseModel]] = Text

    task: Literal["summarization"]
    prompt: str = Field("{text}\n\nSummary:", min_length=1, description="Template; {name} is a field of the line.")

    def missing(self) -> str | None:
        """Whether rouge-score is."""
        return not_installed("rouge_score", extra="benchmarks", task=self.task)

    def ask(self, items: list[Item], subject: Subject, report: Report) -> Columns:
        """The model's summaries."""
        return {"answer": [text.strip() for text in self.write(items, subject, report)]}

    def scores(self, items: list[Item], answers: Columns, original: Columns | None) -> dict[str, Score]:
        """F1 of ROUGE-1, -2 and -L (Lin, ROUGE, ACL 2004), 0 to 1, words stemmed; of several summaries the best."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(NAMES, use_stemmer=True)
        found: dict[str, list[float]] = {name: [] for name in NAMES}
        for item, answer in zip(items, answers["answer"], strict=True):
            references = [item["summary"]] if isinstance(item["summary"], str) else item["summary"]
            by_reference = [scorer.score(reference, answer) for reference in references]
            for name in NAMES:
                found[name].append(max(scores[name].fmeasure for scores in by_reference))
        return {name: mean_of(values) for name, values in found.items()}

    def signatures(self, items: list[Item]) -> dict[str, str]:
        """The library's version and options."""
        return {name: f"F1, use_stemmer, rouge-score {version('rouge-score')}" for name in NAMES}
