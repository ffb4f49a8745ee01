"""Embeddings of an encoder: how near they stay to the original's, and whether search finds the same texts."""

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from tasks.calibration.corpora import Stdlib
from tasks.calibration.exported_families import Kind
from tasks.calibration.progress import Report
from tasks.engines.embedding import BATCH_SIZE, embed
from tasks.validation.benchmarks.asking import Columns, Options, text_metric
from tasks.validation.benchmarks.items import Item, draw
from tasks.validation.benchmarks.scores import Floats, Score, mean_of
from tasks.validation.benchmarks.subjects import Subject
from tasks.validation.measured import Metric

STDLIB = "stdlib"
PROSE = re.compile(r"[A-Z][^>|]*[a-z)][.:]")
"""Begins and ends as a sentence does, and is neither a table nor a session of the interpreter."""
MIN_WORDS, MAX_WORDS = 6, 100


class Text(BaseModel):
    """A line of the data."""

    text: str = Field(description="text.")


class Embeddings(Options, frozen=True, extra="forbid"):
    """The embedding of each `text`; each text is searched for among all others."""

    METRICS: ClassVar[tuple[Metric, ...]] = (
        text_metric("*.cosine", "cosine to the original's embedding", compared=False),
        text_metric("*.retrieval_agreement", "retrieval agreement with the original", compared=False),
    )
    ASKS: ClassVar[tuple[Kind, ...]] = ("encoder",)
    ITEM: ClassVar[type[BaseModel]] = Text

    task: Literal["embeddings"]
    data: str = Field(
        min_length=1,
        description="JSON lines (.jsonl, .jsonl.gz), one item each: a file, package:NAME/FILE, or s3://BUCKET/KEY; or "
        "`stdlib`: paragraphs of the documentation of Python's standard library, several of one document together.",
    )
    num_neighbours: int = Field(10, ge=1, description="Texts that a search finds.")

    @model_validator(mode="after")
    def _documents_are_named_once(self) -> "Embeddings":
        if self.data == STDLIB and self.document:
            raise ValueError("`data: stdlib` has documents of its own; leave `document` out.")
        return self

    def file(self) -> Path | None:
        """See `Options.file`."""
        return Path(sysconfig.get_path("stdlib")) if self.data == STDLIB else super().file()

    def data_fingerprint(self) -> str | None:
        """See `Options.data_fingerprint`."""
        return Stdlib().fingerprint() if self.data == STDLIB else super().data_fingerprint()

    def items(self, file: Path) -> list[Item]:
        """See `Options.items`; also refuses fewer texts than a search finds."""
        if self.data == STDLIB:
            items = draw(list(_paragraphs()), self.num_items, self.seed, file)
        else:
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
            for vector in embed(encoder, tokenizer, self.prompts(items)):
                vectors.append(vector)
                if len(vectors) % BATCH_SIZE == 0 or len(vectors) == len(items):
                    report(len(vectors), len(items), {})
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


def _paragraphs() -> Iterator[Item]:
    """Paragraphs of prose, each once; those of one module or chapter are of one document."""
    seen: set[str] = set()
    for number, document in enumerate(Stdlib().documents()):
        for paragraph in re.split(r"\n\s*\n", document.text):
            text = " ".join(paragraph.split())
            words = len(text.split())
            if PROSE.fullmatch(text) and MIN_WORDS <= words <= MAX_WORDS and text not in seen:
                seen.add(text)
                yield Item(len(seen), {"text": text, "name": document.name}, number)


def nearest(unit: Floats, num_neighbours: int) -> NDArray[np.int64]:
    """[N, num_neighbours]: of each row of `unit` [N, features], length 1, the rows most similar to it but itself."""
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")
    return np.asarray(order[:, :num_neighbours], np.int64)


def _unit(vectors: list[Any]) -> Floats:
    matrix = np.asarray([list(vector) for vector in vectors], np.float64)
    return np.asarray(matrix / np.linalg.norm(matrix, axis=1, keepdims=True), np.float64)
