"""Tasks of lm-evaluation-harness through an engine; the harness' own model of transformers says what is right."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from tasks.validation.benchmarks import LmEvaluation
from tasks.validation.benchmarks.measuring import ask_original, measure_benchmark
from tests.tasks.validation.benchmarks.proverbs import PROVERBS

pytest.importorskip("lm_eval")

CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}} =",
    "doc_to_target": "{{target}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
READ = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}


@pytest.fixture(scope="module")
def define(write_lines, greedy, tmp_path_factory):
    """Writes a task of the harness over a JSON-lines file of proverbs."""
    rows = [
        {
            "question": de,
            "choices": [en, PROVERBS[number - 1][1]][:: 1 if number % 2 else -1],
            "answer": 0 if number % 2 else 1,
            "target": greedy(f"{de} =", 6).split("\n")[0] if number % 2 else en,
        }
        for number, (de, en) in enumerate(PROVERBS)
    ]
    data = write_lines(rows)

    def write(name, definition):
        file = tmp_path_factory.mktemp("task") / f"{name}.yaml"
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        file.write_text(yaml.safe_dump({**common, "test_split": "test", **definition}))
        return file

    return write


def ask_both(benchmark, checkpoint, bundle, out):
    reference = out / "reference"
    reference.mkdir()
    original = ask_original(checkpoint=checkpoint, benchmark=benchmark, data=benchmark.file(), threads=1, out=reference)
    return original, measure_benchmark(bundle=bundle, reference=reference, benchmark=benchmark, threads=1, out=out)


def of_the_harness(file, checkpoint):
    """What the harness itself says of the checkpoint in transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1)
    task = next(iter(TaskManager(include_defaults=False).load(str(file))["tasks"].values()))
    found = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)["results"][file.stem]
    return {name.split(",")[0]: value for name, value in found.items() if isinstance(value, float)}


@pytest.mark.parametrize(
    ("name", "definition", "metrics"),
    [
        ("choices", CHOICES, ("acc", "acc_norm")),
        ("written", WRITTEN, ("exact_match",)),
        ("read", READ, ("word_perplexity", "byte_perplexity", "bits_per_byte")),
    ],
)
def test_an_engine_gets_what_the_harness_gives_transformers(
    name, definition, metrics, define, tiny_checkpoint, tiny_bundle, tmp_path
):
    file = define(name, definition)
    benchmark = LmEvaluation(task="lm_evaluation", data=str(file), metrics=metrics)
    original, summary = ask_both(benchmark, tiny_checkpoint, tiny_bundle, tmp_path)
    expected = of_the_harness(file, tiny_checkpoint)
    for metric in metrics:
        assert original.figures[metric] == pytest.approx(expected[metric], rel=1e-4)
        assert summary.metrics[metric].value.value == pytest.approx(expected[metric], rel=1e-3)
        assert summary.metrics[metric].degradation.low <= 0 <= summary.metrics[metric].degradation.high
    if name == "written":
        assert 0.5 <= expected["exact_match"] < 1
    items = pd.read_parquet(tmp_path / "items.parquet")
    assert len(items) == 24
    assert set(metrics) <= set(items)


def test_a_part_is_drawn_by_seed_and_a_damaged_engine_reads_worse(define, tiny_checkpoint, damaged_bundle, tmp_path):
    file = define("part", READ)
    benchmark = LmEvaluation(task="lm_evaluation", data=str(file), metrics=("bits_per_byte",), num_items=20)
    _, summary = ask_both(benchmark, tiny_checkpoint, damaged_bundle, tmp_path)
    assert summary.num_items == 20
    bits = summary.metrics["bits_per_byte"]
    assert bits.degradation.value == pytest.approx(bits.value.value - bits.original)  # lower is better
    items = pd.read_parquet(tmp_path / "items.parquet")
    parts = np.array([list(value) for value in items["value_bits_per_byte"]])
    assert bits.value.value == pytest.approx(-parts[:, 0].sum() / parts[:, 1].sum() / np.log(2))
    assert json.loads(items["prompt"][0])["question"] in [de for de, _ in PROVERBS]


def test_tasks_that_cannot_be_meant_are_refused(define, tiny_checkpoint, tmp_path):
    def ask(data, **changes):
        benchmark = LmEvaluation(task="lm_evaluation", data=str(data), **changes)
        ask_original(checkpoint=tiny_checkpoint, benchmark=benchmark, data=benchmark.file(), threads=1, out=tmp_path)

    with pytest.raises(ValueError, match="no task 'arc_eesy'"):
        ask("arc_eesy")
    with pytest.raises(ValueError, match="must have the metric 'exact_match'; it has acc, acc_norm"):
        ask(define("choices2", CHOICES), metrics=("exact_match",))
    with pytest.raises(ValueError, match=r"num_items 25 needs as many documents; .* has 24"):
        ask(define("choices3", CHOICES), num_items=25)
    sampled = {**WRITTEN, "generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 0.8}}
    with pytest.raises(ValueError, match=r"Answers are greedy here.* temperature 0.8"):
        ask(define("sampled", sampled), metrics=("exact_match",))
    median = {"metric": "exact_match", "aggregation": "median", "higher_is_better": True}
    with pytest.raises(ValueError, match=r"'exact_match' of .* is aggregated by 'median'"):
        ask(define("median", {**WRITTEN, "metric_list": [median]}), metrics=("exact_match",))


def test_the_fingerprint_follows_the_definition(define):
    file = define("changing", CHOICES)
    benchmark = LmEvaluation(task="lm_evaluation", data=str(file))
    before = benchmark.data_fingerprint()
    file.write_text(file.read_text() + "# changed\n")
    assert benchmark.data_fingerprint() != before
    assert LmEvaluation(task="lm_evaluation", data="arc_easy").data_fingerprint()
