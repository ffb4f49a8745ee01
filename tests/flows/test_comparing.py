from datetime import UTC, datetime

from flows.comparing import incomparable, join
from tasks.validation.quality import ReferenceSummary
from tasks.validation.report import DataSet, ReportData, Row, lines, render
from tasks.validation.statistics import exactly


def report(cpu: str = "a processor", evaluation: str = "1" * 64, perplexity: float = 20.0) -> ReportData:
    reference = ReferenceSummary(
        perplexity=exactly(perplexity),
        bits_per_byte=exactly(1.0),
        window=64,
        num_windows=8,
        num_documents=8,
        num_tokens=504,
        num_kl_positions=10,
    )
    return ReportData(
        title="a recipe",
        source="a model",
        finished_at=datetime(2026, 1, 2, tzinfo=UTC),
        elapsed_s=1.0,
        original_size_bytes=2**20,
        reference=reference,
        rows=(Row(name="int8/onnxruntime", candidate="int8", engine="ONNX Runtime float32", size_bytes=2**19),),
        speed=None,
        winner=None,
        data_sets=(
            DataSet(role="evaluation", description="text", num_sequences=8, sequence_length=64, sha256=evaluation),
        ),
        command="slimline run",
        recipe_yaml="name: a",
        hardware={"cpu": cpu, "cores": 2},
        versions={"onnxruntime": "1.2"},
    )


def test_runs_that_measured_the_same_may_be_compared() -> None:
    assert incomparable([("a", report()), ("b", report(perplexity=21.0))]) == []


def test_another_machine_and_another_text_are_named_with_both_values() -> None:
    problems = incomparable([("a", report()), ("b", report(cpu="another", evaluation="2" * 64))])
    assert len(problems) == 2
    assert "times and memory say nothing about each other (a: a processor, 2 cores; b: another, 2 cores)" in problems[0]
    assert "perplexities are of other texts" in problems[1]
    assert "sha256 111111111111; b: 8 windows of 64 tokens, sha256 222222222222" in problems[1]


def test_every_bundle_and_every_original_is_a_line_of_the_page(tmp_path) -> None:
    joined = join([("a", report()), ("b", report(perplexity=21.0))])
    assert [line.row.name for line in lines(joined)] == [
        "original",
        "a: int8/onnxruntime",
        "b: original",
        "b: int8/onnxruntime",
    ]
    assert [line.perplexity.value for line in lines(joined) if line.perplexity] == [20.0, 21.0]
    assert "2 runs side by side" in render(joined, tmp_path / "page.html").read_text()


def test_no_picture_mixes_what_is_not_comparable(tmp_path) -> None:
    apart = join([("a", report()), ("b", report(cpu="another"))])
    page = render(apart, tmp_path / "page.html").read_text()
    assert "These runs are not comparable in everything" in page
    assert "Quality against speed and size" not in page
