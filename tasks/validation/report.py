"""The report of an optimization: one self-contained HTML page, and a table for the terminal.

The page needs no network, reads in light and dark, and prints; its few lines of JavaScript only show tooltips at once.
"""

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, Field, JsonValue
from rich import box
from rich.table import Table
from rich.text import Text

from tasks.validation import charts
from tasks.validation.diagnosis import Diagnosis
from tasks.validation.latency import ORIGINAL, SpeedSummary, SubjectSpeed
from tasks.validation.load import Level, LoadSummary
from tasks.validation.measured import Measured, Metric, metric_of
from tasks.validation.pareto import pareto_front
from tasks.validation.quality import QualitySummary, ReferenceSummary
from tasks.validation.statistics import CONFIDENCE, Estimate
from tasks.validation.verdicts import Check, Judgement

TEMPLATE = "report.html.j2"


class Parity(BaseModel, frozen=True, extra="forbid"):
    """An engine against PyTorch on the same checkpoint and inputs."""

    max_abs_error: float = Field(description="Largest difference of a logit.")
    top1_agreement: float
    kl_nats: float


class Row(BaseModel, frozen=True, extra="forbid"):
    """One engine bundle: a candidate, or the unchanged model in an engine as a baseline."""

    name: str = Field(description="As the speed summary names it: candidate/engine.")
    candidate: str
    engine: str = Field(description="As people read it, precision included.")
    engine_options: str = Field("", description="All of them, in words.")
    steps: str = Field("", description="What was done to the model: '22 of 30 layers, W8 per channel'.")
    status: str = Field("run", description="'run', or why it was not: 'built, not run here'.")
    size_bytes: int | None = Field(description="None: it could not be made.")
    quality: QualitySummary | None = None
    perplexity: Estimate | None = Field(None, description="Of another run's original, whose quality is its own.")
    parity: Parity | None = None
    figures: dict[str, Measured] = Field(default_factory=dict, description="All that was measured, by figure.")
    judgement: Judgement | None = Field(None, description="None: a baseline, which is not judged.")
    diagnosis: Diagnosis | None = Field(None, description="None: neither slower nor worse, or not examined.")
    url: str | None = Field(None, description="Of its tracking run.")


class Stage(BaseModel, frozen=True, extra="forbid"):
    """One stage: what it cost and what it gave."""

    title: str
    cached: bool
    elapsed_s: float = Field(description="When it ran; a cached stage took nothing this time.")
    peak_memory_mib: float | None = None
    gave: str = Field("", description="Its most telling figures, in words.")
    url: str | None = None


class Curve(BaseModel, frozen=True, extra="forbid"):
    """A figure that was followed during a stage."""

    title: str
    metric: str
    steps: tuple[float, ...] = Field(min_length=1, description="In units of `x_label`.")
    values: tuple[float, ...] = Field(min_length=1)
    x_label: str = "training tokens"


class DataSet(BaseModel, frozen=True, extra="forbid"):
    """Text in one role."""

    role: str
    description: str
    num_sequences: int
    sequence_length: int
    sha256: str


class LayerFigures(BaseModel, frozen=True, extra="forbid"):
    """A quantized layer, as the page tells it."""

    name: str
    method: str
    grid: str = Field(description="'4 bits, groups of 64, symmetric'.")
    relative_error: float
    output_error: float | None
    sqnr_db: float | None
    worst_channels: tuple[int, ...]
    inputs: str = Field(description="How they are rounded: 'float', 'static', 'per token'.")


class Distribution(BaseModel, frozen=True, extra="forbid"):
    """How a time of one subject is spread, at `charts.QUANTILES`."""

    subject: str
    metric: str = Field(description="ttft_ms, tpot_ms or inter_token_ms.")
    num: int
    values: tuple[float, float, float, float, float]


class Quantized(BaseModel, frozen=True, extra="forbid"):
    """What quantization made of a candidate, layer by layer."""

    title: str
    bits_per_weight: float
    choice: str = Field("", description="Of mixed precision, in words.")
    layers: tuple[LayerFigures, ...]
    left_float: dict[str, str] = Field(description="Layers that were not quantized, and why.")


class ReportData(BaseModel, frozen=True, extra="forbid"):
    """All that the report tells."""

    title: str
    source: str = Field(description="Where the original came from.")
    finished_at: datetime
    elapsed_s: float
    original_size_bytes: int = Field(description="Of the float32 checkpoint, or the bundle that is the original.")
    original_engine: str = Field("PyTorch float32", description="In which the original answers.")
    reference: ReferenceSummary
    rows: tuple[Row, ...]
    speed: SpeedSummary | None
    load: LoadSummary | None = None
    metrics: dict[str, Metric] = Field(default_factory=dict, description="What was measured, by name.")
    winner: str | None = Field(description="Name of the row that was chosen.")
    registered: str | None = Field(None, description="The model version: 'smollm2-135m version 3, alias candidate'.")
    register_note: str = Field("", description="Why nothing was registered, where nothing was.")
    stages: tuple[Stage, ...] = ()
    curves: tuple[Curve, ...] = ()
    distributions: tuple[Distribution, ...] = ()
    quantized: tuple[Quantized, ...] = ()
    data_sets: tuple[DataSet, ...] = ()
    compared: tuple[str, ...] = Field((), description="Names of the runs, where the page compares several.")
    incomparable: tuple[str, ...] = Field((), description="Why their figures must not be held against each other.")
    links: dict[str, str] = Field(default_factory=dict, description="Text to URL: MLflow run, Prefect flow run.")
    command: str = Field(description="That makes all of this again.")
    recipe_yaml: str
    git_commit: str | None = None
    hardware: dict[str, JsonValue]
    versions: dict[str, str]
    notes: tuple[str, ...] = Field((), description="What a reader has to know: skipped layers, joined documents.")


def render(data: ReportData, out: Path) -> Path:
    """Write the page to the file `out` and return it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(mib=_mib, num=number, interval=interval, duration=duration)
    figures = measured_by_figure(data)
    judged = [row.judgement for row in data.rows if row.judgement]
    page = environment.get_template(TEMPLATE).render(
        data=data,
        lines=lines(data),
        headline=headline(data),
        charts=_charts(data),
        spreads=_spreads(data),
        load_charts=_load_charts(data),
        task_figures=[each for each in figures if _is_of_task(each[1])],
        other_figures=[each for each in figures if not _is_of_task(each[1])],
        block_errors=_block_errors,
        check_bar=_check_bar,
        confidence=max((check.confidence for row in judged for check in row.checks), default=CONFIDENCE),
        curve=charts.curve,
        mark=charts.mark,
        engines=engines_of(data),
        total_s=sum(stage.elapsed_s for stage in data.stages) or 1.0,
    )
    out.write_text(page, encoding="utf-8")
    return out


class Line(BaseModel, frozen=True):
    """One line of the table: a row with its figures side by side; None where not measured."""

    row: Row
    speed: SubjectSpeed | None
    perplexity: Estimate | None
    increase_percent: Estimate | None
    is_original: bool = False
    on_front: bool = False

    @property
    def verdict(self) -> str:
        return self.row.judgement.verdict if self.row.judgement else ""

    def tokens_per_s(self, batch_size: int) -> Estimate | None:
        """Throughput at a batch size, if it was measured."""
        at = self.speed.throughput.get(batch_size) if self.speed else None
        return at.tokens_per_s if at else None

    def figures(self) -> tuple[float | None, ...]:
        """What the Pareto front compares: size, time per output token, perplexity."""
        return (
            self.row.size_bytes,
            self.speed.tpot_ms.p50.value if self.speed else None,
            self.perplexity.value if self.perplexity else None,
        )


def lines(data: ReportData) -> list[Line]:
    """The original first, then baselines, then candidates: accepted ones first, the winner on top."""
    subjects = data.speed.subjects if data.speed else {}
    original = Line(
        row=Row(name=ORIGINAL, candidate=ORIGINAL, engine=data.original_engine, size_bytes=data.original_size_bytes),
        speed=subjects.get(ORIGINAL),
        perplexity=data.reference.perplexity,
        increase_percent=None,
        is_original=True,
    )
    rows = [
        Line(
            row=row,
            speed=subjects.get(row.name),
            perplexity=row.quality.perplexity if row.quality else row.perplexity,
            increase_percent=row.quality.perplexity_increase_percent if row.quality else None,
        )
        for row in data.rows
    ]
    order = {"": 0, "ACCEPT": 1, "ANOMALOUS": 2, "INCONCLUSIVE": 3, "REJECT": 4}
    rows.sort(key=lambda line: (order[line.verdict], line.row.name != data.winner))
    everything = [original, *rows]
    figures = [line.figures() for line in everything]
    if data.speed is None:  # then the front is that of size and quality
        figures = [(size_bytes, perplexity) for size_bytes, _, perplexity in figures]
    front = pareto_front(figures)
    return [line.model_copy(update={"on_front": on}) for line, on in zip(everything, front, strict=True)]


class Headline(BaseModel, frozen=True):
    """The answer in one sentence, and the figures under it."""

    verdict: str
    sentence: str
    figures: tuple[tuple[str, str, str], ...] = ()
    """(figure, what it is, its interval or reference)."""


def headline(data: ReportData) -> Headline:
    """Which candidate won, and what it gained at what cost."""
    judged = [row for row in data.rows if row.judgement]
    if data.compared:
        accepted = [row.name for row in judged if row.judgement and row.judgement.verdict == "ACCEPT"]
        sentence = f"{len(data.compared)} runs side by side, as they were measured."
        if accepted:
            sentence += f" Accepted in their own runs: {', '.join(accepted)}."
        return Headline(verdict="INCONCLUSIVE" if data.incomparable else "ACCEPT", sentence=sentence)
    if data.winner is None:
        verdicts = [row.judgement.verdict for row in judged if row.judgement]
        rejected, odd, open_ones = (verdicts.count(name) for name in ("REJECT", "ANOMALOUS", "INCONCLUSIVE"))
        beside = f" {odd} too good to be true," if odd else ""
        return Headline(
            verdict="ANOMALOUS" if odd else "INCONCLUSIVE" if open_ones else "REJECT",
            sentence=f"No candidate was accepted: {rejected} rejected,{beside} {open_ones} not decided by what was "
            "measured.",
        )
    row = next(row for row in data.rows if row.name == data.winner)
    assert row.size_bytes is not None  # what was accepted exists
    times_smaller = data.original_size_bytes / row.size_bytes
    figures = [
        (
            f"{times_smaller:.1f}×",
            "smaller on disk",
            f"{number(row.size_bytes / 2**20)} MiB in place of {number(data.original_size_bytes / 2**20)} MiB",
        ),
    ]
    subject = data.speed.subjects.get(row.name) if data.speed else None
    if subject:
        for batch_size, at in subject.throughput.items():
            ratio = at.ratio_to_original
            what = f"the tokens per second at batch size {batch_size}"
            figures.append((f"{ratio.value:.1f}×", what, interval(ratio)))
    if row.quality:
        increase = row.quality.perplexity_increase_percent
        figures.append((f"{increase.value:+.2f} %", "perplexity", interval(increase)))
        agreement = row.quality.top1_agreement
        figures.append((f"{100 * agreement.value:.1f} %", "same likeliest next token", interval(agreement, 100)))
    others = len([other for other in judged if other.judgement and other.judgement.verdict == "ACCEPT"]) - 1
    beside = f" {others} other{'s' if others > 1 else ''} kept them too." if others > 0 else ""
    sentence = f"{row.candidate} in {row.engine} won: it keeps every limit.{beside}"
    return Headline(verdict="ACCEPT", sentence=sentence, figures=tuple(figures))


def engines_of(data: ReportData) -> list[str]:
    """Engines in the order of their marks; PyTorch first."""
    return list(dict.fromkeys(line.row.engine for line in lines(data)))


FIGURES_OF_FRONT = {"time per output token, ms": "time", "size on disk, MiB": "size"}
"""What perplexity is drawn against, and a short name of each."""


def front_points(data: ReportData, name: str) -> list[tuple[Line, float, float]]:
    """(line, figure, perplexity) of everything that was measured; none where runs are not comparable."""
    if data.incomparable:  # points of one picture are held against each other
        return []
    found = []
    for line in lines(data):
        size_bytes, tpot_ms, perplexity = line.figures()
        x = tpot_ms if FIGURES_OF_FRONT[name] == "time" else size_bytes / 2**20 if size_bytes else None
        if x is not None and perplexity is not None and math.isfinite(perplexity):
            found.append((line, x, perplexity))
    return found


def _charts(data: ReportData) -> list[Markup]:
    """Quality against time and against size, of everything that was measured."""
    engines = engines_of(data)
    drawn: list[Markup] = []
    for name in FIGURES_OF_FRONT:
        points = [
            charts.Point(
                x=x,
                y=perplexity,
                label=line.row.candidate,
                tooltip=f"{line.row.candidate}, {line.row.engine}: {number(x)} ({name}), perplexity "
                f"{perplexity:.2f}" + (f", {line.verdict}" if line.verdict else ""),
                series=engines.index(line.row.engine),
                on_front=line.on_front,
            )
            for line, x, perplexity in front_points(data, name)
        ]
        if points:
            drawn.append(charts.scatter(points, x_label=name, y_label="perplexity"))
    return drawn


DISTRIBUTIONS = {
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time per output token of a request, ms",
    "inter_token_ms": "gaps between tokens, ms",
}


def _spreads(data: ReportData) -> list[Markup]:
    """Distributions of what was timed, one chart per metric, subjects in the order of the table."""
    engines = engines_of(data)
    drawn = []
    for metric, x_label in DISTRIBUTIONS.items():
        of = {each.subject: each for each in data.distributions if each.metric == metric}
        rows = [
            charts.Spread(
                label=line.row.name,
                values=each.values,
                tooltip=f"{line.row.name}: half of {each.num} between {number(each.values[1])} and "
                f"{number(each.values[3])}, median {number(each.values[2])}, p5 {number(each.values[0])}, "
                f"p95 {number(each.values[4])} ({x_label})",
                series=engines.index(line.row.engine),
            )
            for line in lines(data)
            if (each := of.get(line.row.name))
        ]
        if rows:
            drawn.append(charts.spreads(rows, x_label=x_label))
    return drawn


LOADS = {
    "latency": ("requests per second", "time to the last token, p90, ms"),
    "served": ("users at a time", "output tokens per second"),
}


def load_curves(data: ReportData) -> dict[str, list[tuple[str, list[Level]]]]:
    """The levels of each subject that each chart of LOADS draws: open loops by rate, closed ones by users."""
    found: dict[str, list[tuple[str, list[Level]]]] = {name: [] for name in LOADS}
    for subject, load in (data.load.subjects if data.load else {}).items():
        opened = [level for level in load.levels if level.loop == "open" and level.latency_ms]
        closed = [level for level in load.levels if level.loop == "closed"]
        if opened:
            ordered = sorted(opened, key=lambda level: level.offered_requests_per_s or 0.0)
            found["latency"].append((subject, ordered))
        if closed:
            found["served"].append((subject, sorted(closed, key=lambda level: level.users or 0)))
    return {name: curves for name, curves in found.items() if curves}


def point_of(level: Level) -> tuple[float, float]:
    """Where a level's mark is in its chart."""
    if level.loop == "closed":
        return float(level.users or 0), level.tokens_per_s.value
    assert level.latency_ms
    return level.offered_requests_per_s or 0.0, level.latency_ms.p90.value


def _load_charts(data: ReportData) -> list[Markup]:
    drawn = []
    order = list(data.load.subjects) if data.load else []
    for name, curves in load_curves(data).items():
        x_label, y_label = LOADS[name]
        told = []
        for subject, levels in curves:
            xs, ys = zip(*(point_of(level) for level in levels), strict=True)
            tooltips = tuple(
                f"{subject}: {number(x)} {x_label}, {number(y)} ({y_label}), {number(level.requests_per_s.value)} "
                f"requests per second completed{', saturated' if level.saturated else ''}"
                for level, x, y in zip(levels, xs, ys, strict=True)
            )
            told.append(charts.Line(label=subject, xs=xs, ys=ys, tooltips=tooltips, series=order.index(subject)))
        within = data.load.options.within if data.load else None
        limit = within.latency_ms if within and name == "latency" else None
        drawn.append(charts.curves(told, x_label=x_label, y_label=y_label, limit=limit))
    return drawn


def measured_by_figure(data: ReportData) -> list[tuple[str, Metric, list[Measured | None]]]:
    """(figure, its metric, what was measured of each row that has any figure); figures in the order of metrics."""
    rows = [row for row in data.rows if row.figures]
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    known = [(name, data.metrics[metric_of(name, data.metrics)]) for name in names]
    order = list(data.metrics)
    known.sort(key=lambda each: order.index(each[1].name))
    return [(name, metric, [row.figures.get(name) for row in rows]) for name, metric in known]


def _is_of_task(metric: Metric) -> bool:
    return metric.option.startswith("validation.tasks")


def _block_errors(diagnosis: Diagnosis) -> Markup:
    values = []
    for layer in diagnosis.facts.layers:
        tooltip = (
            f"{layer.name}: {layer.whole:.2%} of what it adds; attention alone {layer.attention:.2%}, feed-forward "
            f"alone {layer.feed_forward:.2%}; {layer.accumulated:.2%} of the hidden states after it"
        )
        values.append((tooltip, layer.whole))
    return charts.bars(values, y_label="error of each block's output, in order")


def _check_bar(check: Check) -> Markup:
    if check.measured is None:
        return Markup("")
    return charts.interval_bar(
        limit=check.limit,
        measured=check.measured,
        low=check.low,
        high=check.high,
        is_max=check.bound == "max",
        verdict=check.verdict,
    )


def number(value: float) -> str:
    """Three significant digits, or whole numbers from 100 on."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}".replace(",", "\u202f")  # narrow no-break space
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}"


def _mib(num_bytes: float) -> str:
    return number(num_bytes / 2**20)


def interval(estimate: Estimate, scale: float = 1.0) -> str:
    """'[low, high]', or nothing for what was counted or measured once; '[low, ∞)' where nothing bounds it above."""
    if estimate.low is not None and estimate.high is None:
        return f"[{number(scale * estimate.low)}, ∞)"
    if estimate.low is None or estimate.high is None or math.isclose(estimate.low, estimate.high):
        return ""
    low, high = scale * estimate.low, scale * estimate.high
    decimals = 0 if high - low >= 5 else min(6, max(1, 1 - math.floor(math.log10(high - low))))
    return f"[{low:.{decimals}f}, {high:.{decimals}f}]"


def duration(seconds: float) -> str:
    """'4.2 s', '3 min 20 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def terminal_table(data: ReportData) -> Table:
    """What was measured and what it means, one line per engine bundle."""
    batch_sizes: Sequence[int] = ()
    if data.speed:
        batch_sizes = tuple(next(iter(data.speed.subjects.values())).throughput)
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold", caption=_caption(data)
    )
    table.caption_justify = "left"
    table.add_column("candidate", no_wrap=True)
    for header in ("size\nMiB", "perplexity", "change\n%", "top-1\n%", "TTFT\nms", "TPOT\nms"):
        table.add_column(header, justify="right", no_wrap=True)
    for batch_size in batch_sizes:
        table.add_column(f"tokens/s\nbatch {batch_size}", justify="right", no_wrap=True)
    table.add_column("peak\nMiB", justify="right", no_wrap=True)
    table.add_column("verdict", min_width=len("INCONCLUSIVE"))
    styles = {"ACCEPT": "green", "REJECT": "red", "INCONCLUSIVE": "yellow", "ANOMALOUS": "magenta"}
    told = f" ({data.original_engine.partition(' float')[0]})"
    for line in lines(data):
        speed, quality = line.speed, line.row.quality
        rates = [line.tokens_per_s(batch_size) for batch_size in batch_sizes]
        verdict = Text(line.verdict, style=styles.get(line.verdict, ""))
        if line.row.status != "run":
            verdict.append(f" {line.row.status}".strip() if not line.verdict else f", {line.row.status}")
        table.add_row(
            Text(("★ " if line.row.name == data.winner else "  ") + line.row.name + told * line.is_original),
            number(line.row.size_bytes / 2**20) if line.row.size_bytes else "",
            f"{line.perplexity.value:.2f}" if line.perplexity else "",
            f"{line.increase_percent.value:+.1f}" if line.increase_percent else "",
            f"{100 * quality.top1_agreement.value:.1f}" if quality else "",
            number(speed.ttft_ms.p50.value) if speed else "",
            number(speed.tpot_ms.p50.value) if speed else "",
            *(number(rate.value) if rate else "" for rate in rates),
            number(speed.peak_memory_mib) if speed else "",
            verdict,
            style="bold" if line.row.name == data.winner else "",
        )
    return table


def _caption(data: ReportData) -> str:
    reference = data.reference
    windows = f"{reference.num_windows} windows of {reference.window} tokens, stride {reference.window}"
    parts = [f"Perplexity: {windows}, of {reference.num_documents} documents."]
    if data.speed:
        parts.append(
            f"Speed: {data.speed.prompt_tokens} prompt and {data.speed.new_tokens} new tokens, {data.speed.threads} "
            f"threads, medians of {data.speed.num_blocks} interleaved blocks."
        )
        if data.speed.noisy:
            parts.append(data.speed.noise)
    return " ".join(parts)
