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

from tasks.calibration.exported_families import Kind
from tasks.validation import charts
from tasks.validation.diagnosis import Diagnosis
from tasks.validation.latency import ORIGINAL, SpeedSummary, SubjectSpeed
from tasks.validation.load import Level, LoadSummary
from tasks.validation.measured import Measured, Metric, metric_of
from tasks.validation.pareto import pareto_front
from tasks.validation.quality import METRICS, QualitySummary, ReferenceSummary
from tasks.validation.statistics import CONFIDENCE, Estimate, Percentiles, scaled
from tasks.validation.verdicts import Check, Judgement

TEMPLATE = "report.html.j2"
TASKS = "validation.tasks"
"""How the option begins that measures a metric of a task."""
MAX_COLUMNS = 4
"""Figures of tasks in the first table."""


class Parity(BaseModel, frozen=True, extra="forbid"):
    """An engine against PyTorch on the same checkpoint and inputs."""

    max_abs_error: float = Field(description="Largest difference of a logit; of an encoder, of any number it gives.")
    top1_agreement: float | None = Field(None, description="None: an encoder's, as is KL of an encoder-decoder.")
    kl_nats: float | None = None
    min_cosine: float | None = Field(None, description="Of an encoder's vectors, the least similar.")

    @property
    def words(self) -> str:
        """All of it, in words."""
        what = "a logit" if self.min_cosine is None else "what it gives"
        said = [f"largest difference of {what} {number(self.max_abs_error)}"]
        if self.top1_agreement is not None:
            said.append(f"same top-1 {100 * self.top1_agreement:.2f} %")
        if self.kl_nats is not None:
            said.append(f"KL {self.kl_nats:.2g} nats")
        if self.min_cosine is not None:
            said.append(f"least cosine {self.min_cosine:.4f}")
        return ", ".join(said)


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
    metric: str = Field(description="ttft_ms, tpot_ms or inter_token_ms; of an encoder latency_ms.")
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
    kind: Kind = Field("decoder", description="What the models do.")
    reference: ReferenceSummary | None = Field(description="None: no perplexity was measured.")
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
        columns=task_columns(data),
        time_columns=time_columns(data),
        rate_unit=rate_unit(data),
        rate=rate,
        writes=writes(data),
        quality=quality_metric(data),
        answer=answer,
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
    quality: float | None = Field(None, description="What the Pareto front compares: see `quality_metric`.")
    is_original: bool = False
    on_front: bool = False

    @property
    def verdict(self) -> str:
        return self.row.judgement.verdict if self.row.judgement else ""

    def time(self, metric: str) -> Percentiles | None:
        """One of `time_columns`, if it was measured."""
        its: Percentiles | None = getattr(self.speed, metric, None)
        return its

    @property
    def time_ms(self) -> float | None:
        """What the Pareto front compares: the median time per output token; of an encoder, its latency."""
        return self.speed.time_ms.p50.value if self.speed else None


def lines(data: ReportData) -> list[Line]:
    """The original first, then baselines, then candidates: accepted ones first, the winner on top."""
    subjects = data.speed.subjects if data.speed else {}
    original = Line(
        row=Row(name=ORIGINAL, candidate=ORIGINAL, engine=data.original_engine, size_bytes=data.original_size_bytes),
        speed=subjects.get(ORIGINAL),
        perplexity=data.reference.perplexity if data.reference else None,
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
    metric = quality_metric(data)
    everything = [line.model_copy(update={"quality": _quality(line, metric, data)}) for line in (original, *rows)]
    sign = -1 if metric and metric.better == "higher" else 1  # less is better on the front
    figures: list[tuple[float | None, ...]] = []
    for line in everything:
        times = (line.time_ms,) if data.speed else ()  # else the front is that of size and quality
        figures.append((line.row.size_bytes, *times, None if line.quality is None else sign * line.quality))
    front = pareto_front(figures)
    return [line.model_copy(update={"on_front": on}) for line, on in zip(everything, front, strict=True)]


def writes(data: ReportData) -> bool:
    """Whether the models write, so that there are times per token; not so of encoders."""
    return data.kind != "encoder"


def time_columns(data: ReportData) -> dict[str, str]:
    """The times that tables show, by metric, and how they are headed; none where speed was not measured."""
    if data.speed is None:
        return {}
    return {"ttft_ms": "TTFT", "tpot_ms": "TPOT"} if writes(data) else {"latency_ms": "latency"}


def rate_unit(data: ReportData) -> str:
    """What tables count of throughput: tokens that are written, or the sequences that an encoder reads."""
    return "tokens" if writes(data) else "samples"


def rate(data: ReportData, line: Line, batch_size: int) -> Estimate | None:
    """Throughput at a batch size in `rate_unit` per second, if it was measured."""
    at = line.speed.throughput.get(batch_size) if line.speed else None
    if at is None or data.speed is None or writes(data):
        return at.tokens_per_s if at else None
    return scaled(at.tokens_per_s, 1 / data.speed.prompt_tokens)


def quality_metric(data: ReportData) -> Metric | None:
    """What stands for quality where one figure has to: perplexity; else that of a task, one that is limited if any."""
    if data.reference:
        return data.metrics.get("perplexity", METRICS[0])
    judged = [row.judgement for row in data.rows if row.judgement]
    limited = {check.figure for judgement in judged for check in judgement.checks}
    of_tasks = [metric for metric in data.metrics.values() if _is_of_task(metric)]
    return next((metric for metric in of_tasks if metric.name in limited), of_tasks[0] if of_tasks else None)


def task_columns(data: ReportData) -> list[Metric]:
    """Metrics of tasks that the first table shows: the first few where no perplexity stands there."""
    return [] if data.reference else [m for m in data.metrics.values() if _is_of_task(m)][:MAX_COLUMNS]


def answer(data: ReportData, line: Line, metric: Metric) -> Estimate | None:
    """A task's figure, if it was measured; of the original without an interval."""
    if not line.is_original:
        measured = line.row.figures.get(metric.name)
        return measured.value if measured else None
    value = _originals_figure(data, metric)
    return None if value is None else Estimate(value=value, low=None, high=None, num=0)


def _originals_figure(data: ReportData, metric: Metric) -> float | None:
    """A task's figure of the original, which agrees with itself wholly."""
    known = (row.figures[metric.name].original for row in data.rows if metric.name in row.figures)
    found = next((original for original in known if original is not None), None)
    return metric.largest if found is None and not metric.compared else found


def _quality(line: Line, metric: Metric | None, data: ReportData) -> float | None:
    its = line.perplexity if data.reference else answer(data, line, metric) if metric else None
    return its.value if its else None


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
            what = f"the {'tokens' if writes(data) else 'sequences'} per second at batch size {batch_size}"
            figures.append((f"{ratio.value:.1f}×", what, interval(ratio)))
    if row.quality:
        increase = row.quality.perplexity_increase_percent
        figures.append((f"{increase.value:+.2f} %", "perplexity", interval(increase)))
        agreement = row.quality.top1_agreement
        figures.append((f"{100 * agreement.value:.1f} %", "same likeliest next token", interval(agreement, 100)))
    for metric in task_columns(data)[:2]:
        if metric.name in row.figures:
            estimate = row.figures[metric.name].value
            figures.append((f"{estimate.value:.4g}", metric.title, interval(estimate)))
    others = len([other for other in judged if other.judgement and other.judgement.verdict == "ACCEPT"]) - 1
    beside = f" {others} other{'s' if others > 1 else ''} kept them too." if others > 0 else ""
    sentence = f"{row.candidate} in {row.engine} won: it keeps every limit.{beside}"
    return Headline(verdict="ACCEPT", sentence=sentence, figures=tuple(figures))


def engines_of(data: ReportData) -> list[str]:
    """Engines in the order of their marks; PyTorch first."""
    return list(dict.fromkeys(line.row.engine for line in lines(data)))


def figures_of_front(data: ReportData) -> dict[str, str]:
    """What quality is drawn against: time and size, and how their axes are named."""
    time = "time per output token, ms" if writes(data) else "latency of one sequence, ms"
    return {"time": time, "size": "size on disk, MiB"}


def front_points(data: ReportData, figure: str) -> list[tuple[Line, float, float]]:
    """(line, time or size, quality) of everything that was measured; none where runs are not comparable."""
    if data.incomparable:  # points of one picture are held against each other
        return []
    found = []
    for line in lines(data):
        size_bytes = line.row.size_bytes
        x = line.time_ms if figure == "time" else size_bytes / 2**20 if size_bytes else None
        if x is not None and line.quality is not None and math.isfinite(line.quality):
            found.append((line, x, line.quality))
    return found


def _charts(data: ReportData) -> list[Markup]:
    """Quality against time and against size, of everything that was measured."""
    engines = engines_of(data)
    drawn: list[Markup] = []
    metric = quality_metric(data)
    if metric is None:
        return drawn
    for figure, name in figures_of_front(data).items():
        points = [
            charts.Point(
                x=x,
                y=quality,
                label=line.row.candidate,
                tooltip=f"{line.row.candidate}, {line.row.engine}: {number(x)} ({name}), {metric.title} "
                f"{quality:.4g}" + (f", {line.verdict}" if line.verdict else ""),
                series=engines.index(line.row.engine),
                on_front=line.on_front,
            )
            for line, x, quality in front_points(data, figure)
        ]
        if points:
            higher = metric.better == "higher"
            drawn.append(charts.scatter(points, x_label=name, y_label=metric.title, higher_is_better=higher))
    return drawn


DISTRIBUTIONS = {
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time per output token of a request, ms",
    "inter_token_ms": "gaps between tokens, ms",
    "latency_ms": "latency of one sequence, ms",
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
    return metric.option.startswith(TASKS)


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
    of_tasks, times = task_columns(data), time_columns(data)
    headers = ["size\nMiB", *(("perplexity", "change\n%", "top-1\n%") if data.reference else ())]
    headers += [metric.name.replace("_", " ").replace(".", "\n", 1) for metric in of_tasks]
    headers += [f"{title}\nms" for title in times.values()]
    headers += [f"{rate_unit(data)}/s\nbatch {batch_size}" for batch_size in batch_sizes]
    for header in [*headers, *(["peak\nMiB"] if data.speed else ())]:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=len("INCONCLUSIVE"))
    styles = {"ACCEPT": "green", "REJECT": "red", "INCONCLUSIVE": "yellow", "ANOMALOUS": "magenta"}
    told = f" ({data.original_engine.partition(' float')[0]})"
    for line in lines(data):
        speed, quality = line.speed, line.row.quality
        figures = [its.p50 if (its := line.time(metric)) else None for metric in times]
        figures += [rate(data, line, batch_size) for batch_size in batch_sizes]
        answers = [
            f"{line.perplexity.value:.2f}" if line.perplexity else "",
            f"{line.increase_percent.value:+.1f}" if line.increase_percent else "",
            f"{100 * quality.top1_agreement.value:.1f}" if quality else "",
        ]
        verdict = Text(line.verdict, style=styles.get(line.verdict, ""))
        if line.row.status != "run":
            verdict.append(f" {line.row.status}".strip() if not line.verdict else f", {line.row.status}")
        table.add_row(
            Text(("★ " if line.row.name == data.winner else "  ") + line.row.name + told * line.is_original),
            number(line.row.size_bytes / 2**20) if line.row.size_bytes else "",
            *(answers if data.reference else ()),
            *(f"{found.value:.4g}" if (found := answer(data, line, metric)) else "" for metric in of_tasks),
            *(number(each.value) if each else "" for each in figures),
            *([number(speed.peak_memory_mib) if speed else ""] if data.speed else []),
            verdict,
            style="bold" if line.row.name == data.winner else "",
        )
    return table


def _caption(data: ReportData) -> str:
    parts = []
    if reference := data.reference:
        windows = f"{reference.num_windows} windows of {reference.window} tokens, stride {reference.window}"
        parts.append(f"Perplexity: {windows}, of {reference.num_documents} documents.")
    if data.speed:
        lengths = f"{data.speed.prompt_tokens} prompt and {data.speed.new_tokens} new tokens"
        if not writes(data):
            lengths = f"sequences of {data.speed.prompt_tokens} tokens"
        parts.append(
            f"Speed: {lengths}, {data.speed.threads} threads, medians of {data.speed.num_blocks} interleaved blocks."
        )
        if data.speed.noisy:
            parts.append(data.speed.noise)
    return " ".join(parts)
