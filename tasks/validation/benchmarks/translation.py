"""Machine translation: BLEU and chrF of what a model writes, by sacrebleu."""

from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field

from tasks.calibration.progress import Report
from tasks.validation.benchmarks.asking import Columns, Texts, Written, not_installed, text_metric
from tasks.validation.benchmarks.items import Item
from tasks.validation.benchmarks.scores import Floats, Score
from tasks.validation.benchmarks.subjects import Subject
from tasks.validation.measured import Metric


class Sentence(BaseModel):
    """A line of the data; the prompt may name any other field of it."""

    source: str = Field(description="text, the sentence to translate.")
    reference: str | Texts = Field(description="text, or a list of texts: translations by people.")


class Translation(Written, frozen=True, extra="forbid"):
    """Translate `source`; compared with `reference`."""

    METRICS: ClassVar[tuple[Metric, ...]] = (
        text_metric("*.bleu", "BLEU", largest=100),
        text_metric("*.chrf", "chrF", largest=100),
    )
    ITEM: ClassVar[type[BaseModel]] = Sentence

    task: Literal["translation"]

    def missing(self) -> str | None:
        """Whether sacrebleu is."""
        return not_installed("sacrebleu", extra="benchmarks", task=self.task)

    def ask(self, items: list[Item], subject: Subject, report: Report) -> Columns:
        """The model's translations."""
        return {"answer": [text.strip() for text in self.write(items, subject, report)]}

    def scores(self, items: list[Item], answers: Columns, original: Columns | None) -> dict[str, Score]:
        """BLEU (Papineni et al., ACL 2002) and chrF (Popović, WMT 2015) over the corpus, 0 to 100."""
        references = _streams(items)
        return {
            name: Score(_statistics(metric, answers["answer"], references), partial(_figure, metric))
            for name, metric in _metrics().items()
        }

    def signatures(self, items: list[Item]) -> dict[str, str]:
        """sacrebleu's own."""
        for metric in (found := _metrics()).values():
            metric.corpus_score([""] * len(items), _streams(items))  # a signature tells how many references there were
        return {name: str(metric.get_signature()) for name, metric in found.items()}


def _metrics() -> dict[str, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"bleu": BLEU(), "chrf": CHRF()}


def _streams(items: list[Item]) -> list[list[str | None]]:
    """The first reference of every item, the second of every item, …; None where an item has fewer."""
    references = [[ref] if isinstance(ref := item["reference"], str) else list(ref) for item in items]
    most = max(len(each) for each in references)
    return [[each[place] if place < len(each) else None for each in references] for place in range(most)]


def _statistics(metric: Any, hypotheses: list[str], references: list[list[str | None]]) -> Floats:
    """[num_items, k]: what sacrebleu sums up before it computes the corpus' score."""
    return np.asarray(metric._extract_corpus_statistics(hypotheses, references), np.float64)


def _figure(metric: Any, sums: Floats) -> Floats:
    rows = sums.reshape(-1, sums.shape[-1])
    scores = [metric._compute_score_from_stats([int(part) for part in row]).score for row in rows]
    return np.asarray(scores, np.float64).reshape(sums.shape[:-1])
