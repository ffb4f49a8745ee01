"""What all benchmarks have in common: items from a file, a prompt for each, an answer to each, a score of each."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import BaseModel, Field, field_validator, model_validator

from tasks.calibration.exported_families import Kind
from tasks.calibration.progress import Report
from tasks.engines.text import Sampling, TextGenerator
from tasks.validation.benchmarks.items import S3, Item, draw, fingerprint, local_file, read_items
from tasks.validation.benchmarks.prompts import encode, fields_of, fill
from tasks.validation.benchmarks.scores import Score
from tasks.validation.benchmarks.subjects import Subject
from tasks.validation.measured import Better, Metric

ITEMS_AT_ONCE = 16

Texts = Annotated[list[str], Field(min_length=1)]
Columns = dict[str, list[Any]]
"""What a model answered, by name, one value per item: "answer", and what else a benchmark keeps of it."""


class Options(BaseModel, frozen=True, extra="forbid"):
    """Which items are asked."""

    METRICS: ClassVar[tuple[Metric, ...]]
    ASKS: ClassVar[tuple[Kind, ...]] = ("decoder",)
    ITEM: ClassVar[type[BaseModel]]

    data: str = Field(
        min_length=1,
        description="JSON lines (.jsonl, .jsonl.gz), one item each: a file, package:NAME/FILE, or s3://BUCKET/KEY.",
    )
    num_items: int | None = Field(None, ge=1, description="So many, drawn with `seed`; null: all of the file.")
    document: str | None = Field(
        None,
        min_length=1,
        description="Field that names the document of an item, where several items are about the same one: they are "
        "resampled together. null: each item by itself.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the drawn items and of the bootstrap.")

    def measured_metrics(self) -> tuple[Metric, ...]:
        """Those of `METRICS` that these options measure."""
        return self.METRICS

    def missing(self) -> str | None:
        """Why this machine cannot measure it; None if it can."""
        return None

    def file(self) -> Path | None:
        """Where the data lie on this machine; None: they are behind a service."""
        return None if self.data.startswith(S3) else local_file(self.data)

    def data_fingerprint(self) -> str | None:
        """What changes when the data file does; None: it is behind a service."""
        return None if self.data.startswith(S3) else fingerprint(self.data)

    def items(self, file: Path) -> list[Item]:
        """The items to ask.

        Raises:
            ValueError: there are none, or fewer than asked for, or a line is not as it has to be.
        """
        return draw(read_items(file, self.ITEM, self.document), self.num_items, self.seed, file)


class Prompted(Options, frozen=True, extra="forbid"):
    """How an item becomes a prompt."""

    prompt: str = Field(min_length=1, description="Template; {name} is a field of the line, {{ a brace.")
    chat: bool = Field(False, description="Ask through the model's chat template, the prompt as the user's message.")
    system: str | None = Field(None, min_length=1, description="System message of the chat.")

    @field_validator("prompt")
    @classmethod
    def _template_is_sound(cls, prompt: str) -> str:
        if not fields_of(prompt):
            raise ValueError(
                "a prompt without a field would ask the same of every item; name one in braces: {question}"
            )
        return prompt

    @model_validator(mode="after")
    def _system_message_is_used(self) -> "Prompted":
        if self.system and not self.chat:
            raise ValueError("`system` is a message of a chat; set `chat: true`, or put it into `prompt`.")
        return self

    def items(self, file: Path) -> list[Item]:
        """See `Options.items`; also refuses items that the prompt does not fit."""
        items = super().items(file)
        for item in items:
            fill(self.prompt, item, file.name)
        return items

    def prompts(self, items: list[Item]) -> list[str]:
        """The prompt of each item."""
        return [fill(self.prompt, item, "the data") for item in items]


class Written(Prompted, frozen=True, extra="forbid"):
    """How an answer is written: the likeliest tokens."""

    ASKS: ClassVar[tuple[Kind, ...]] = ("decoder", "encoder-decoder")

    max_new_tokens: int = Field(128, ge=1, description="Tokens of an answer at most.")
    stop: tuple[str, ...] = Field((), description="Texts that end an answer; they are not part of it.")

    @model_validator(mode="after")
    def _sampling_is_sound(self) -> "Written":
        self.sampling()
        return self

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(max_new_tokens=self.max_new_tokens, stop=self.stop)

    def write(self, items: list[Item], subject: Subject, report: Report) -> list[str]:
        """What the model writes after each item's prompt.

        Raises:
            ValueError: it cannot write, has no chat template, or a prompt is too long for it.
        """
        with subject.generator() as generator:
            return self.written_by(generator, items, self.sampling(), report)

    def written_by(self, generator: TextGenerator, items: list[Item], sampling: Sampling, report: Report) -> list[str]:
        """See `write`."""
        prompts = [
            encode(generator.tokenizer, text, chat=self.chat, system=self.system) for text in self.prompts(items)
        ]
        for item, prompt in zip(items, prompts, strict=True):
            try:
                generator.check(0, prompt, sampling.max_new_tokens)
            except ValueError as error:
                raise ValueError(f"Line {item.line} of the data: {error}") from None
        texts = [""] * len(items)
        # Engines that decode only prompts of equal length together find some this way.
        order = sorted(range(len(items)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), ITEMS_AT_ONCE):
            chunk = order[start : start + ITEMS_AT_ONCE]
            answers, _ = generator.answer([prompts[index] for index in chunk], sampling)
            for index, answer in zip(chunk, answers, strict=True):
                texts[index] = answer.text
            report(start + len(chunk), len(order), {})
        return texts


class Benchmark(Protocol):
    """A kind of task with its data: one file of this package each."""

    METRICS: ClassVar[tuple[Metric, ...]]
    ASKS: ClassVar[tuple[Kind, ...]]

    @property
    def task(self) -> str:
        """The name of the kind."""

    @property
    def data(self) -> str:
        """Where its items come from."""

    @property
    def seed(self) -> int:
        """Of the drawn items and of the bootstrap."""

    def measured_metrics(self) -> tuple[Metric, ...]:
        """Those of `METRICS` that these options measure."""

    def missing(self) -> str | None:
        """Why this machine cannot measure it; None if it can."""

    def file(self) -> Path | None:
        """Where the data lie on this machine; None: they are behind a service."""

    def data_fingerprint(self) -> str | None:
        """What changes when its data do; None: they are behind a service."""

    def items(self, file: Path) -> list[Item]:
        """The items to ask."""

    def prompts(self, items: list[Item]) -> list[str]:
        """What is asked, item by item; for people."""

    def ask(self, items: list[Item], subject: Subject, report: Report) -> Columns:
        """What a model answers."""

    def scores(self, items: list[Item], answers: Columns, original: Columns | None) -> dict[str, Score]:
        """How good answers are, by name of the metric.

        Args:
            original: what the original answered; None: these are the original's own.
        """

    def signatures(self, items: list[Item]) -> dict[str, str]:
        """How figures are computed, by name of the metric, as others have to know to compare theirs."""


def not_installed(module: str, *, extra: str, task: str) -> str | None:
    """That the library of a task is missing, and how to get it; None if it is there."""
    if importlib.util.find_spec(module):
        return None
    return (
        f"The task {task!r} needs {module.replace('_', '-')}; it is not installed. Run: pip install 'slimline[{extra}]'"
    )


def text_metric(
    name: str, title: str, *, largest: float | None = 1.0, compared: bool = True, better: Better = "higher"
) -> Metric:
    """A metric of answers."""
    return Metric(
        name=name,
        title=title,
        unit="",
        better=better,
        aspect="quality",
        option="validation.tasks",
        compared=compared,
        largest=largest,
    )
