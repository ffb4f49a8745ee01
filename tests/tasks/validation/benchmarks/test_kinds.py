"""Figures of answers by hand, and against the libraries' own."""

import numpy as np
import pytest

from tasks.validation.benchmarks import Classification, QuestionAnswering, Summarization, Translation
from tasks.validation.benchmarks.classification import macro_f1
from tasks.validation.benchmarks.items import Item
from tasks.validation.benchmarks.question_answering import f1, normalized
from tests.tasks.validation.benchmarks.proverbs import PROVERBS


def items(*fields):
    return [Item(number, each, number) for number, each in enumerate(fields, start=1)]


def test_bleu_and_chrf_are_sacrebleus_also_of_resampled_items_and_several_references():
    from sacrebleu.metrics import BLEU, CHRF

    asked = items(
        *({"source": de, "reference": [en, en.lower()] if n % 3 else en} for n, (de, en) in enumerate(PROVERBS))
    )
    answers = [en.replace("the", "a").replace("is", "was") for _, en in PROVERBS]
    benchmark = Translation(task="translation", data="x", prompt="{source}")
    scores = benchmark.scores(asked, {"answer": answers}, None)
    rng = np.random.default_rng(0)
    for chosen in [np.arange(len(asked)), *rng.integers(0, len(asked), (3, len(asked)))]:
        references = [asked[n]["reference"] for n in chosen]
        both = [r if isinstance(r, list) else [r, None] for r in references]
        streams = list(zip(*both, strict=True))
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            expected = metric.corpus_score([answers[n] for n in chosen], streams).score
            assert scores[name].figure(scores[name].parts[chosen].sum(axis=0)) == pytest.approx(expected, rel=1e-9)
            assert 20 < expected < 100
    assert "version:2.6.0" in benchmark.signatures(asked)["bleu"]
    assert "nc:6" in benchmark.signatures(asked)["chrf"]
    assert "nrefs:var" in benchmark.signatures(asked)["bleu"]
    assert "nrefs:2" in benchmark.signatures(asked[1:3])["chrf"]


@pytest.mark.parametrize(
    ("benchmark", "field"),
    [
        (Translation(task="translation", data="x", prompt="{source}"), "reference"),
        (Summarization(task="summarization", data="x"), "summary"),
    ],
)
def test_an_item_without_anything_to_compare_with_is_refused(benchmark, field, write_lines):
    file = write_lines([{"source": "a", "text": "a", field: ["b"]}, {"source": "c", "text": "c", field: []}])
    with pytest.raises(ValueError, match=rf"{field!r} in line 2 of items.jsonl must be: text, or .* Got \[\]"):
        benchmark.items(file)


def test_rouge_is_rouge_scores_and_the_best_of_several_summaries():
    from rouge_score.rouge_scorer import RougeScorer

    references = [["the cat sat on the mat", "dogs run"], "a dog was running far"]
    answers = ["the dogs run", "the dog ran far away"]
    asked = items(*({"text": "", "summary": reference} for reference in references))
    scores = Summarization(task="summarization", data="x").scores(asked, {"answer": answers}, None)
    one = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rougeL"):
        expected = [
            max(one.score(reference, answers[0])[name].fmeasure for reference in references[0]),
            one.score(references[1], answers[1])[name].fmeasure,
        ]
        assert list(scores[name].by_item()) == pytest.approx(expected)
        assert scores[name].value == pytest.approx(sum(expected) / 2)
    assert scores["rouge2"].by_item()[0] == pytest.approx(2 * (1 / 2) * 1 / (1 / 2 + 1))  # "dogs run" is in it


def test_answers_are_compared_as_squad_does():
    assert normalized("The  Eiffel-Tower, a tower!") == "eiffeltower tower"
    assert f1("the big red dog", "a red dog house") == pytest.approx(2 * 2 / (3 + 3))
    asked = items(
        {"question": "", "answers": "Paris"},
        {"question": "", "answers": {"text": ["in 1889", "1889"]}},
        {"question": "", "answers": []},
        {"question": "", "answers": []},
    )
    answers = ["paris.", "It was 1889", "", "I do not know"]
    scores = QuestionAnswering(task="question_answering", data="x").scores(asked, {"answer": answers}, None)
    assert list(scores["exact_match"].by_item()) == [1, 0, 1, 0]
    assert list(scores["f1"].by_item()) == pytest.approx([1, 2 * 1 / (3 + 1), 1, 0])


def test_macro_f1_is_scikit_learns():
    from sklearn.metrics import accuracy_score, f1_score

    rng = np.random.default_rng(0)
    names = ["red", "green", "blue", "never"]
    right, answers = rng.choice(names[:3], 50), rng.choice(names[:3], 50)
    asked = items(*({"label": str(label)} for label in right))
    benchmark = Classification(task="classification", data="x", prompt="{x}", labels={name: name for name in names})
    scores = benchmark.scores(asked, {"answer": list(answers)}, None)
    assert scores["accuracy"].value == pytest.approx(accuracy_score(right, answers))
    assert scores["macro_f1"].value == pytest.approx(f1_score(right, answers, average="macro"))
    confusion = np.array([[5.0, 1.0], [2.0, 2.0]])
    assert macro_f1(confusion.reshape(-1)) == pytest.approx((10 / 13 + 4 / 7) / 2)


@pytest.mark.parametrize(
    ("labels", "message"), [({"a": "x", "b": "x"}, "same text"), ({"a": "x", "b": ""}, "needs a text")]
)
def test_labels_that_cannot_be_told_apart_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        Classification(task="classification", data="x", prompt="{x}", labels=labels)
