"""Benchmarks asked of a real tiny model in real engines, beside the original in PyTorch."""

import json

import pandas as pd
import pytest

from tasks.validation.benchmarks import Classification, QuestionAnswering, Summarization, Translation
from tasks.validation.benchmarks.measuring import ask_original, measure_benchmark, measured, metrics_of
from tests.tasks.validation.benchmarks.proverbs import PROVERBS

PROMPT = "{source} in English:"


def translation(file, **changes):
    options = {"task": "translation", "data": str(file), "prompt": PROMPT, "max_new_tokens": 8, **changes}
    return Translation.model_validate(options)


@pytest.fixture(scope="module")
def translations(write_lines, greedy):
    """Every second reference is what the original itself writes."""
    rows = [
        {"source": de, "reference": greedy(PROMPT.format(source=de), 8).strip() if number % 2 else en}
        for number, (de, en) in enumerate(PROVERBS)
    ]
    return write_lines(rows)


@pytest.fixture(scope="module")
def original(translations, tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("original")
    benchmark = translation(translations)
    summary = ask_original(checkpoint=tiny_checkpoint, benchmark=benchmark, data=translations, threads=1, out=out)
    return out, summary


def measure(bundle, original, benchmark, out):
    return measure_benchmark(bundle=bundle, reference=original, benchmark=benchmark, threads=1, out=out)


def test_the_original_writes_what_transformers_writes(original, translations, greedy):
    out, summary = original
    answers = pd.read_parquet(out / "answers.parquet")
    for line, answer in zip(translations.read_text().splitlines(), answers["answer"], strict=True):
        assert answer == greedy(PROMPT.format(**json.loads(line)), 8).strip()
    assert (summary.task, summary.num_items, summary.num_documents) == ("translation", 24, 24)
    assert 20 < summary.figures["chrf"] < 100
    assert list(answers["chrf"][1::2]) == pytest.approx([100.0] * 12)


def test_the_same_model_in_an_engine_writes_the_same(original, translations, tiny_bundle, tmp_path):
    summary = measure(tiny_bundle, original[0], translation(translations), tmp_path)
    assert summary.metrics["chrf"].value.value == pytest.approx(original[1].figures["chrf"])
    assert summary.metrics["chrf"].degradation.value == 0
    assert summary.metrics["chrf"].degradation.high > 10  # 24 items prove little, however equal
    found = measured("proverbs", summary)
    assert set(found) == {"proverbs.bleu", "proverbs.chrf"}
    assert {m.name for m in metrics_of("proverbs", translation(translations))} == set(found)


def test_a_damaged_model_loses_and_the_figures_follow_from_the_stored_items(
    original, translations, damaged_bundle, tmp_path
):
    from sacrebleu.metrics import CHRF

    summary = measure(damaged_bundle, original[0], translation(translations), tmp_path)
    chrf = summary.metrics["chrf"]
    assert chrf.degradation.low > 5
    items = pd.read_parquet(tmp_path / "items.parquet")
    references = [json.loads(line)["reference"] for line in translations.read_text().splitlines()]
    assert chrf.value.value == pytest.approx(CHRF().corpus_score(list(items["answer"]), [references]).score)
    assert chrf.original == pytest.approx(CHRF().corpus_score(list(items["original_answer"]), [references]).score)
    assert items["prompt"][0] == "Aller Anfang ist schwer. in English:"
    assert {"line", "document", "bleu", "original_bleu", "chrf", "original_chrf"} <= set(items)


def test_openvino_writes_and_scores_too(tiny_checkpoint, small_data, translations, original, write_lines, tmp_path):
    pytest.importorskip("openvino_genai")
    from tasks.engines import OpenVino
    from tasks.engines.compiling import compile_engine

    bundle = tmp_path / "bundle"
    bundle.mkdir()
    engine = OpenVino(precision="float32", activations="float32", kv_cache="float32")
    compile_engine(checkpoint=tiny_checkpoint, data=small_data, engine=engine, threads=1, out=bundle)
    summary = measure(bundle, original[0], translation(translations), tmp_path)
    assert summary.metrics["chrf"].degradation.value == pytest.approx(0, abs=1)


def test_classification_takes_the_likeliest_label(tiny_checkpoint, tiny_bundle, damaged_bundle, write_lines, tmp_path):
    file = write_lines({"text": de, "label": ("a", "b")[n % 2]} for n, (de, _) in enumerate(PROVERBS))
    benchmark = Classification(
        task="classification", data=str(file), prompt="{text}\nanswer", labels={"a": " s", "b": " t"}
    )
    reference = tmp_path / "reference"
    reference.mkdir()
    original = ask_original(checkpoint=tiny_checkpoint, benchmark=benchmark, data=file, threads=1, out=reference)
    summary = measure(tiny_bundle, reference, benchmark, tmp_path)
    assert summary.metrics["accuracy"].value.value == original.figures["accuracy"]
    items = pd.read_parquet(tmp_path / "items.parquet")
    for _, item in items.iterrows():
        assert item["answer"] == "ab"[item["log_likelihoods"].argmax()]
        assert item["log_likelihoods"] == pytest.approx(item["original_log_likelihoods"], abs=1e-3)
    measure(damaged_bundle, reference, benchmark, tmp_path)
    items = pd.read_parquet(tmp_path / "items.parquet")
    assert (items["answer"] != items["original_answer"]).any()


def test_summaries_and_answers_go_the_same_way(tiny_checkpoint, tiny_bundle, write_lines, greedy, tmp_path):
    file = write_lines({"text": de, "summary": greedy(f"{de}\n\nSummary:", 6)} for de, _ in PROVERBS[:4])
    benchmark = Summarization(task="summarization", data=str(file), max_new_tokens=6)
    reference = tmp_path / "reference"
    reference.mkdir()
    ask_original(checkpoint=tiny_checkpoint, benchmark=benchmark, data=file, threads=1, out=reference)
    summary = measure(tiny_bundle, reference, benchmark, tmp_path)
    assert summary.metrics["rouge1"].value.value == pytest.approx(1)

    prompt = "{question}"
    file = write_lines(
        {"question": de, "answers": greedy(de, 4), "page": n // 2} for n, (de, _) in enumerate(PROVERBS[:6])
    )
    benchmark = QuestionAnswering(
        task="question_answering", data=str(file), prompt=prompt, max_new_tokens=4, stop=(), document="page"
    )
    ask_original(checkpoint=tiny_checkpoint, benchmark=benchmark, data=file, threads=1, out=reference)
    summary = measure(tiny_bundle, reference, benchmark, tmp_path)
    assert summary.metrics["f1"].value.value == 1
    assert (summary.num_items, summary.num_documents) == (6, 3)


def test_a_chat_without_a_template_and_a_prompt_that_is_too_long_are_refused(tiny_checkpoint, translations, tmp_path):
    def ask(benchmark, data):
        ask_original(checkpoint=tiny_checkpoint, benchmark=benchmark, data=data, threads=1, out=tmp_path)

    with pytest.raises(ValueError, match="chat template; this one has none"):
        ask(translation(translations, chat=True), translations)
    with pytest.raises(ValueError, match=r"Line 1 of the data: A sequence may have at most 512 tokens"):
        ask(translation(translations, max_new_tokens=600), translations)


def test_a_label_that_is_none_of_the_options_is_refused(tiny_checkpoint, write_lines, tmp_path):
    file = write_lines([{"text": "x", "label": "a"}, {"text": "y", "label": "c"}])
    benchmark = Classification(task="classification", data=str(file), prompt="{text}", labels={"a": "A", "b": "B"})
    with pytest.raises(ValueError, match=r"label in line 2 of the data must be one of 'a', 'b'; got 'c'"):
        ask_original(checkpoint=tiny_checkpoint, benchmark=benchmark, data=file, threads=1, out=tmp_path)


def test_an_encoder_writes_nothing(transformer_checkpoint, translations, tmp_path):
    with pytest.raises(ValueError, match="needs a model that writes; 'bert' is an encoder"):
        ask_original(
            checkpoint=transformer_checkpoint("BertForMaskedLM"),
            benchmark=translation(translations),
            data=translations,
            threads=1,
            out=tmp_path,
        )


def test_a_candidate_is_asked_what_the_original_was(original, translations, tiny_bundle, tmp_path):
    with pytest.raises(ValueError, match="asked otherwise"):
        measure(tiny_bundle, original[0], translation(translations, max_new_tokens=9), tmp_path)
