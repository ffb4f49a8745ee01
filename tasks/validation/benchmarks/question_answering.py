"""Question answering: exact match and F1 over words, as SQuAD computes them."""

import re
import string
from collections import Counter
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from tasks.calibration.progress import Report
from tasks.validation.benchmarks.asking import Columns, Written, text_metric
from tasks.validation.benchmarks.items import Item
from tasks.validation.benchmarks.scores import Score, mean_of
from tasks.validation.benchmarks.subjects import Subject
from tasks.validation.measured import Metric


class SpanTexts(BaseModel):
    """Answers as the SQuAD data set on the hub keeps them."""

    text: list[str]


class Question(BaseModel):
    """A line of the data; the prompt may name any other field of it."""

    question: str = Field(description="text.")
    answers: str | list[str] | SpanTexts = Field(
        description='text, a list of texts, or {"text": [...]} as in SQuAD; an empty list: there is no answer.'
    )


class QuestionAnswering(Written, frozen=True, extra="forbid"):
    """Answer `question`; compared with `answers`."""

    METRICS: ClassVar[tuple[Metric, ...]] = (
        text_metric("*.exact_match", "exact match"),
        text_metric("*.f1", "F1 over words"),
    )
    ITEM: ClassVar[type[BaseModel]] = Question

    task: Literal["question_answering"]
    prompt: str = Field(
        "{context}\n\nQuestion: {question}\nAnswer:",
        min_length=1,
        description="Template; {name} is a field of the line.",
    )
    max_new_tokens: int = Field(32, ge=1, description="Tokens of an answer at most.")
    stop: tuple[str, ...] = Field(("\n",), description="Texts that end an answer; they are not part of it.")

    def ask(self, items: list[Item], subject: Subject, report: Report) -> Columns:
        """The model's answers."""
        return {"answer": [text.strip() for text in self.write(items, subject, report)]}

    def scores(self, items: list[Item], answers: Columns, original: Columns | None) -> dict[str, Score]:
        """Both, the best over an item's answers: Rajpurkar et al., SQuAD, EMNLP 2016, arXiv:1606.05250, section 6.1."""
        matches, overlaps = [], []
        for item, answer in zip(items, answers["answer"], strict=True):
            right = right_answers(item["answers"])
            matches.append(max(float(normalized(answer) == normalized(each)) for each in right))
            overlaps.append(max(f1(answer, each) for each in right))
        return {"exact_match": mean_of(matches), "f1": mean_of(overlaps)}

    def signatures(self, items: list[Item]) -> dict[str, str]:
        """The normalization."""
        how = "lower case, no punctuation, no articles (a, an, the), single spaces: SQuAD's evaluation script"
        return {"exact_match": how, "f1": how}


def right_answers(answers: Any) -> list[str]:
    """The texts that count as right; an empty one where there is no answer."""
    texts = answers["text"] if isinstance(answers, dict) else [answers] if isinstance(answers, str) else answers
    return list(texts) or [""]


def normalized(text: str) -> str:
    """The text as SQuAD's evaluation script compares it."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall over normalized words, counted as often as they come."""
    ours, theirs = normalized(answer).split(), normalized(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))
