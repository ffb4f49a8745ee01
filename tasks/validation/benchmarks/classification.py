"""Classification: the label that a model finds likeliest after the prompt; accuracy and macro F1."""

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field, field_validator

from tasks.calibration.progress import Report
from tasks.validation.benchmarks.asking import Columns, Prompted, text_metric
from tasks.validation.benchmarks.items import Item
from tasks.validation.benchmarks.likelihood import Request, encode_pair, score
from tasks.validation.benchmarks.prompts import encode
from tasks.validation.benchmarks.scores import Floats, Score, mean_of
from tasks.validation.benchmarks.subjects import Subject
from tasks.validation.measured import Metric


class Labelled(BaseModel):
    """A line of the data; the prompt names its other fields."""

    label: str | int = Field(description="text or a number, one of `labels`.")


class Classification(Prompted, frozen=True, extra="forbid"):
    """Which of `labels` follows the prompt; compared with `label`."""

    METRICS: ClassVar[tuple[Metric, ...]] = (
        text_metric("*.accuracy", "accuracy"),
        text_metric("*.macro_f1", "macro F1"),
    )
    ITEM: ClassVar[type[BaseModel]] = Labelled

    task: Literal["classification"]
    labels: dict[str, str] = Field(
        min_length=2,
        description="Text that stands for each label after the prompt, with the space before it where one is due: "
        '{positive: " good", negative: " bad"}.',
    )
    per: Literal["text", "byte"] = Field(
        "text", description="Compare whole log-likelihoods, or log-likelihoods per byte where texts differ in length."
    )

    @field_validator("labels")
    @classmethod
    def _labels_have_text(cls, labels: dict[str, str]) -> dict[str, str]:
        for label, text in labels.items():
            if not text:
                raise ValueError(f"each label needs a text; that of {label!r} is empty")
        if len(set(labels.values())) < len(labels):
            raise ValueError("two labels have the same text; give each its own")
        return labels

    def ask(self, items: list[Item], subject: Subject, report: Report) -> Columns:
        """The likeliest label of each item, and the log-likelihood of all.

        Raises:
            ValueError: an item's label is none of `labels`; the engine gives no likelihoods.
        """
        for item in items:
            if str(item["label"]) not in self.labels:
                raise ValueError(
                    f"The label in line {item.line} of the data must be one of {', '.join(map(repr, self.labels))}; "
                    f"got {item['label']!r}."
                )
        texts = list(self.labels.values())
        with subject.session() as (session, tokenizer):
            requests = [self._request(tokenizer, prompt, text) for prompt in self.prompts(items) for text in texts]
            found = score(session, requests, report)
        log_likelihoods = np.array([each.log_probability for each in found]).reshape(len(items), len(texts))
        divisors = np.array([len(text.encode()) if self.per == "byte" else 1 for text in texts])
        names = list(self.labels)
        return {
            "answer": [names[index] for index in (log_likelihoods / divisors).argmax(axis=1)],
            "log_likelihoods": log_likelihoods.tolist(),
        }

    def scores(self, items: list[Item], answers: Columns, original: Columns | None) -> dict[str, Score]:
        """Accuracy; and F1 of each label, averaged over those that occur in the items or the answers."""
        names = list(self.labels)
        confusion = np.zeros((len(items), len(names), len(names)))
        for row, (item, answer) in enumerate(zip(items, answers["answer"], strict=True)):
            confusion[row, names.index(str(item["label"])), names.index(answer)] = 1
        right = [str(item["label"]) == answer for item, answer in zip(items, answers["answer"], strict=True)]
        return {"accuracy": mean_of(right), "macro_f1": Score(confusion.reshape(len(items), -1), macro_f1)}

    def signatures(self, items: list[Item]) -> dict[str, str]:
        """How the label is found."""
        how = f"likeliest label by log-likelihood per {self.per}"
        return {"accuracy": how, "macro_f1": how}

    def _request(self, tokenizer: Any, prompt: str, text: str) -> Request:
        if not self.chat:
            return encode_pair(tokenizer, prompt, text)
        context = encode(tokenizer, prompt, chat=True, system=self.system)
        answer = tokenizer.encode(text, add_special_tokens=False)
        return Request(tuple(context), tuple(answer))


def macro_f1(sums: Floats) -> Floats:
    """Mean over labels of 2 TP / (2 TP + FP + FN), labels that never occur left out.

    Args:
        sums: [..., num_labels * num_labels], counts by true label and answer.
    """
    num_labels = round(sums.shape[-1] ** 0.5)
    counts = sums.reshape(*sums.shape[:-1], num_labels, num_labels)
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    occurring = counts.sum(axis=-1) + counts.sum(axis=-2)
    with np.errstate(invalid="ignore"):
        f1 = 2 * right / occurring
    return np.asarray(np.nanmean(f1, axis=-1), np.float64)
