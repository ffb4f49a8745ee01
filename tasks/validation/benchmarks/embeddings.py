"""Embeddings of an encoder: how near they stay to the original's, and whether search finds the same texts."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from tasks.calibration.progress import Report
from tasks.validation.benchmarks.asking import Columns, Options, text_metric
from tasks.validation.benchmarks.items import Item
from tasks.validation.benchmarks.scores import Floats, Score, mean_of
from tasks.validation.benchmarks.subjects import Subject
from tasks.validation.measured import Metric

BATCH_SIZE = 16


class Text(BaseModel):
    """A line of the data."""

    text: str = Field(description="text.")


class Embeddings(Options, frozen=True, extra="forbid"):
    """The embedding of each `text`; each text is searched for among all others."""

    METRICS: ClassVar[tuple[Metric, ...]] = (
        text_metric("*.cosine", "cosine to the original's embedding", compared=False),
        text_metric("*.retrieval_agreement", "retrieval agreement with the original", compared=False),
    )
    ITEM: ClassVar[type[BaseModel]] = Text

    task: Literal["embeddings"]
    num_neighbours: int = Field(10, ge=1, description="Texts that a search finds.")

    def items(self, file: Path) -> list[Item]:
        """See `Options.items`; also refuses fewer texts than a search finds."""
        items = super().items(file)
        if len(items) <= self.num_neighbours:
            raise ValueError(
                f"num_neighbours {self.num_neighbours} needs more texts than that to search in; got {len(items)}. "
                "Lower it, or give more."
            )
        return items

    def prompts(self, items: list[Item]) -> list[str]:
        """The texts."""
        return [item["text"] for item in items]

    def ask(self, items: list[Item], subject: Subject, report: Report) -> Columns:
        """The embeddings: the model's own pooling where it has one, else the mean over a text's tokens.

        Texts longer than the model reads are cut, in the original as in the candidate.

        Raises:
            ValueError: it is no encoder, or one of tokens or classes only; an embedding is not finite or all zeros.
        """
        vectors: list[Floats] = []
        with subject.encoder() as (encoder, tokenizer):
            name = next((name for name in ("sentence_embedding", "last_hidden_state") if name in encoder.answers), None)
            if name is None:
                raise ValueError(
                    f"Embeddings need an encoder that gives hidden states; this one gives {', '.join(encoder.answers)}"
                    ". Compile the model without its head."
                )
            texts = self.prompts(items)
            for start in range(0, len(texts), BATCH_SIZE):
                ids, mask = _padded(tokenizer, texts[start : start + BATCH_SIZE], encoder.max_length)
                answer = encoder.encode(ids, mask)[name]
                if answer.ndim == 3:
                    answer = (answer * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
                vectors.extend(answer.astype(np.float64))
                report(len(vectors), len(texts), {})
        for item, vector in zip(items, vectors, strict=True):
            if not np.isfinite(vector).all() or not vector.any():
                raise ValueError(f"The embedding of line {item.line} of the data must be finite and not all zeros.")
        return {"embedding": [vector.tolist() for vector in vectors]}

    def scores(self, items: list[Item], answers: Columns, original: Columns | None) -> dict[str, Score]:
        """Cosine of both embeddings of a text; share of its nearest other texts that are the same with both."""
        if original is None:
            return {}
        ours, theirs = (_unit(columns["embedding"]) for columns in (answers, original))
        found, expected = (nearest(unit, self.num_neighbours) for unit in (ours, theirs))
        shared = [
            len({*a} & {*b}) / self.num_neighbours for a, b in zip(found.tolist(), expected.tolist(), strict=True)
        ]
        return {"cosine": mean_of((ours * theirs).sum(axis=1)), "retrieval_agreement": mean_of(shared)}

    def signatures(self, items: list[Item]) -> dict[str, str]:
        """How many neighbours."""
        return {"retrieval_agreement": f"{self.num_neighbours} nearest by cosine, among all texts of the data"}


def nearest(unit: Floats, num_neighbours: int) -> NDArray[np.int64]:
    """[N, num_neighbours]: of each row of `unit` [N, features], length 1, the rows most similar to it but itself."""
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")
    return np.asarray(order[:, :num_neighbours], np.int64)


def _unit(vectors: list[Any]) -> Floats:
    matrix = np.asarray([list(vector) for vector in vectors], np.float64)
    return np.asarray(matrix / np.linalg.norm(matrix, axis=1, keepdims=True), np.float64)


def _padded(tokenizer: Any, texts: list[str], longest: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask [batch, length] of texts, shorter ones padded behind, longer ones cut."""
    rows = tokenizer(texts, truncation=longest is not None, max_length=longest)["input_ids"]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise ValueError(f"A text must have at least one token; {text!r:.60} has none.")
    width = max(len(row) for row in rows)
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int64)
    ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int64)
    return ids, mask
