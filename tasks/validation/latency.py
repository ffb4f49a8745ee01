"""How fast engines answer, measured side by side on one machine.

A machine drifts: clocks, neighbours, caches. So nothing here is timed alone. Every subject lives in a process of its
own, loaded and warm; time is cut into blocks, and in each block every subject answers the same prompt once, in an order
drawn anew, one at a time. Ratios compare subjects block by block, where what slowed the machine down cancels. The
original model in PyTorch takes part twice, as `original` and as its own control: the ratio between the two must be 1,
and how far it is from 1 tells what the machine's noise does to every other figure.

Definitions: TTFT is the time from the request until the first token is chosen; TPOT is (end - TTFT) / (new tokens - 1)
of one request; inter-token times are the single gaps. Throughput is completed output tokens by wall-clock time of a
batch of requests from its start, prompts included. The load is closed-loop: the next batch starts when the last ended.
Every prompt is new, so no prefix cache answers.

An encoder-decoder's prompt is its source. An encoder writes nothing (`new_tokens: 0`): its latency is the time until
everything is said of a batch of sequences, and its throughput is that of tokens it has read.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, field_validator

from tasks.calibration.exported_families import Kind, a_kind
from tasks.calibration.progress import Report, silent
from tasks.validation.conditions import Conditions, conditions, snapshot
from tasks.validation.energy import Meter
from tasks.validation.gpu_memory import GpuMemory
from tasks.validation.latency_worker import LatencyWorker
from tasks.validation.machine import Machine, machine
from tasks.validation.measured import PERCENTILES, Measured, Metric, Percentile, beside, figure_name
from tasks.validation.statistics import (
    CONFIDENCE,
    MIN_OBSERVATIONS,
    Estimate,
    Floats,
    Percentiles,
    exactly,
    median,
    percentiles,
    ratio_of_medians,
    ratio_of_percentiles,
    ratio_through_control,
    scaled,
)
from tasks.validation.worker import FAILURES

ORIGINAL = "original"
CONTROL = "original (control)"
MIN_BLOCKS = 3
SETTLE_S = 0.02
"""Between two subjects: OpenMP and thread pools of the last one spin a few milliseconds before they sleep."""
CONTROL_TOLERANCE = 0.03
"""The control's interval may miss 1 by this much before the machine counts as noisy."""
POWER = 0.8
"""Probability with which a difference has to be told to count as one that a run could tell."""
CONTROL_MAX_HALF_WIDTH = 0.15
"""A wider interval of the control says that the machine's noise hides differences of this size."""
ENERGY, GPU_MEMORY = "energy_j_per_token", "peak_gpu_memory_mib"
"""Metrics that not every machine tells."""
SAMPLES = "samples_per_s"
OF_WRITING = ("ttft_ms", "tpot_ms")
_SPEED: dict[str, Any] = {"aspect": "speed", "option": "validation.speed"}
METRICS = (
    Metric(name="ttft_ms", title="TTFT", unit="ms", better="lower", **_SPEED),
    Metric(name="tpot_ms", title="TPOT", unit="ms", better="lower", **_SPEED),
    Metric(name="latency_ms", title="end-to-end latency", unit="ms", better="lower", **_SPEED),
    Metric(name="throughput_tokens_per_s", title="throughput", unit="tokens/s", better="higher", **_SPEED),
    Metric(
        name=SAMPLES,
        title="throughput in sequences",
        unit="samples/s",
        better="higher",
        **_SPEED | {"option": "validation.speed of an encoder (`new_tokens: 0`)"},
    ),
    Metric(
        name="speedup_over_original",
        title="throughput relative to the original",
        unit="×",
        better="higher",
        compared=False,
        **_SPEED,
    ),
    Metric(
        name="speedup_over_unquantized",
        title="throughput relative to the unquantized original in the same engine",
        unit="×",
        better="higher",
        compared=False,
        **_SPEED,
    ),
    Metric(name=ENERGY, title="energy", unit="J/token", better="lower", **_SPEED),
    Metric(
        name="peak_memory_mib",
        title="peak memory",
        unit="MiB",
        better="lower",
        aspect="cost",
        option="validation.speed",
    ),
    Metric(
        name=GPU_MEMORY,
        title="peak GPU memory",
        unit="MiB",
        better="lower",
        aspect="cost",
        option="validation.speed",
        compared=False,  # the original runs on the processor
    ),
)


class Speed(BaseModel, frozen=True, extra="forbid"):
    """How speed is measured: greedy generation of a fixed number of tokens, subjects interleaved in blocks."""

    prompt_tokens: int = Field(
        128,
        ge=1,
        description="Tokens per prompt; of an encoder-decoder, of its source; of an encoder, of its sequence.",
    )
    new_tokens: int = Field(
        48, ge=0, description="Tokens generated per prompt, at least 2; 0 of an encoder, which writes none."
    )
    batch_sizes: tuple[int, ...] = Field(
        (1, 8), min_length=1, description="Requests at a time; TTFT and TPOT are those of batch size 1."
    )
    num_blocks: int = Field(8, ge=MIN_BLOCKS, description="Blocks in which every subject is timed at batch size 1.")
    num_batch_blocks: int = Field(3, ge=1, description="Blocks that also time the larger batch sizes.")
    max_minutes: float = Field(
        6.0,
        gt=0,
        description=f"No new block starts after this, but {MIN_BLOCKS} blocks of each batch size are always measured.",
    )
    max_memory_mib: int = Field(
        6000,
        ge=1,
        description="Subjects that would exceed this together are measured in groups, each beside the original.",
    )
    timeout_s: float = Field(
        300.0, gt=0, description="A subject that does not answer a request in this time is ended, and the others go on."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of prompts, of the order within blocks, and of the bootstrap.")

    @field_validator("batch_sizes")
    @classmethod
    def _batch_sizes_begin_with_one(cls, batch_sizes: tuple[int, ...]) -> tuple[int, ...]:
        if batch_sizes[0] != 1 or any(a >= b for a, b in pairwise(batch_sizes)):
            raise ValueError(f"batch_sizes must ascend from 1; got {list(batch_sizes)}. Write [1, 8], for example.")
        return batch_sizes

    @field_validator("new_tokens")
    @classmethod
    def _gaps_can_be_measured(cls, new_tokens: int) -> int:
        if new_tokens == 1:
            raise ValueError(
                "must be at least 2, since TPOT is of the tokens after the first, or 0 of an encoder; got 1."
            )
        return new_tokens

    def misfit(self, kind: Kind) -> str | None:
        """Why models of a kind cannot be measured so; None if they can."""
        if kind == "encoder" and self.new_tokens:
            return f"an encoder writes no tokens; speed.new_tokens is {self.new_tokens}. Write `new_tokens: 0`."
        if kind != "encoder" and not self.new_tokens:
            return f"new_tokens 0 is of encoders; this is {a_kind(kind)}. Write how many tokens it generates."
        return None

    def metrics(self) -> tuple[Metric, ...]:
        """What these options measure."""
        refused: dict[Percentile, str] = {
            percentile: f"needs at least {MIN_OBSERVATIONS[percentile]} requests; speed.num_blocks is "
            f"{self.num_blocks}. Raise it, or limit p50."
            for percentile in PERCENTILES
            if self.num_blocks < MIN_OBSERVATIONS[percentile]
        }
        of_requests = {
            "percentiles": tuple(percentile for percentile in PERCENTILES if percentile not in refused),
            "refused": refused,
            "batch_sizes": (1,),
        }
        by_batch = {"batch_sizes": self.batch_sizes}
        measured_of: dict[str, dict[str, Any]] = {
            **dict.fromkeys((*OF_WRITING, "latency_ms"), of_requests),
            ENERGY: {"batch_sizes": (1,)},
            "peak_memory_mib": {},
            GPU_MEMORY: {},
        }
        left_out: tuple[str, ...] = (SAMPLES,)
        if not self.new_tokens:
            measured_of |= {"latency_ms": of_requests | by_batch, SAMPLES: by_batch | {"option": "validation.speed"}}
            left_out = OF_WRITING
        return tuple(
            metric.model_copy(update=measured_of.get(metric.name, by_batch))
            for metric in METRICS
            if metric.name not in left_out
        )


class Subject(BaseModel, frozen=True, extra="forbid"):
    """An engine bundle to time."""

    name: str
    bundle: Path
    baseline: str | None = Field(
        None, description="Name of the subject that is the same engine with the unquantized original."
    )


class Throughput(BaseModel, frozen=True, extra="forbid"):
    """Tokens per second of one subject at one batch size."""

    num: int = Field(description="Timed batches.")
    tokens_per_s: Estimate
    ratio_to_original: Estimate = Field(description="Above 1: more tokens per second than the original.")
    ratio_to_baseline: Estimate | None = None


class BatchLatency(BaseModel, frozen=True, extra="forbid"):
    """One subject at one batch size."""

    ttft_ms: Percentiles | None = Field(None, description="None: an encoder's, which writes no tokens.")
    tpot_ms: Percentiles | None = None
    latency_ms: Percentiles = Field(description="From the request to its last token, or until an encoder has answered.")
    latency_ratios_to_original: dict[str, Estimate] = Field({}, description="By percentile; below 1: faster.")


class SubjectSpeed(BaseModel, frozen=True, extra="forbid"):
    """One subject: batch size 1 unless said otherwise; intervals are 95 %, from resampled blocks."""

    ttft_ms: Percentiles | None = Field(None, description="None: an encoder's, which writes no tokens.")
    tpot_ms: Percentiles | None = Field(None, description="Over requests.")
    inter_token_ms: Percentiles | None = Field(None, description="Over single gaps between tokens.")
    ttft_ratios_to_original: dict[str, Estimate] = Field({}, description="By percentile; below 1: faster.")
    tpot_ratios_to_original: dict[str, Estimate] = {}
    latency_ms: Percentiles | None = Field(None, description="From the request to its last token.")
    latency_ratios_to_original: dict[str, Estimate] = Field({}, description="By percentile; below 1: faster.")
    by_batch_size: dict[int, BatchLatency] = Field({}, description="The same latencies, of every batch size.")
    energy_j_per_token: Estimate | None = Field(
        None, description="Of the whole machine while it answered, prompts included. None: see `energy` of the summary."
    )
    energy_ratio_to_original: Estimate | None = Field(None, description="Below 1: fewer joules per token.")
    throughput: dict[int, Throughput] = Field(description="By batch size.")
    load_s: float = Field(description="From an empty process with our code to a session; files may be in the cache.")
    peak_memory_mib: float = Field(description="Largest resident set of its process, the Python runtime included.")
    peak_gpu_memory_mib: float | None = Field(
        None,
        description="Most that its process held on all GPUs after a request. None: see `gpu_memory` of the summary.",
    )
    size_bytes: int
    idle_cpu_percent: float = Field(description="Of one core, burnt while others were measured; should be near 0.")
    group: int

    def ratios_to_original(self, metric: str) -> dict[str, Estimate]:
        """Those of ttft_ms, tpot_ms or latency_ms, by percentile."""
        ratios: dict[str, Estimate] = getattr(self, f"{metric.removesuffix('_ms')}_ratios_to_original")
        return ratios

    @property
    def time_ms(self) -> Percentiles:
        """What is compared where one figure has to do: time per output token; of an encoder, its latency."""
        found = self.tpot_ms or self.latency_ms
        assert found is not None
        return found


class Control(BaseModel, frozen=True, extra="forbid"):
    """The original beside itself: every ratio should be 1."""

    ttft_ratio: Estimate | None = Field(None, description="None: an encoder's, which writes no tokens.")
    tpot_ratio: Estimate | None = None
    throughput_ratio: Estimate

    def named(self) -> dict[str, Estimate]:
        """The ratios by what they are of: ttft_ms, tpot_ms, throughput."""
        of = {"ttft_ms": self.ttft_ratio, "tpot_ms": self.tpot_ratio, "throughput": self.throughput_ratio}
        return {name: ratio for name, ratio in of.items() if ratio}


class SpeedSummary(BaseModel, frozen=True, extra="forbid"):
    """All subjects, the original among them under the name "original"."""

    subjects: dict[str, SubjectSpeed]
    failed: dict[str, str] = Field(
        {}, description="Subjects that crashed, hung or could not be loaded, and why, in a sentence; none is measured."
    )
    control: Control
    noisy: bool
    noise: str = Field(description="What the control says about the machine, in a sentence.")
    prompt_tokens: int
    new_tokens: int = Field(description="0: of encoders.")
    threads: int
    num_blocks: int
    num_groups: int
    elapsed_s: float
    machine: Machine | None = Field(None, description="What this machine can do at best, measured before the first.")
    conditions: Conditions | None = Field(None, description="What the machine did meanwhile.")
    energy: str = Field("", description="By which counters, or why it was not measured.")
    gpu_memory: str = Field("", description="By what it was measured, or why it was not.")
    detectable_percent: dict[str, float] = Field(
        {}, description="By metric, the smallest difference that blocks like the control's tell with probability 80 %."
    )

    def noise_factors(self) -> tuple[float, float]:
        """How far below and above 1 the original's ratio to itself may lie if the machine was noisy, else (1, 1)."""
        if not self.noisy:
            return 1.0, 1.0
        ratios = self.control.named().values()
        lows = [ratio.low for ratio in ratios if ratio.low is not None]
        highs = [ratio.high for ratio in ratios if ratio.high is not None]
        return min([1.0, *lows]), max([1.0, *highs])


@dataclass
class Timings:
    """What one subject did, block by block."""

    load_s: float
    size_bytes: int
    group: int
    peak_memory_mib: float = 0.0
    peak_gpu_memory_mib: float | None = None
    idle_s: float = 0.0
    idle_cpu_s: float = 0.0
    batches: dict[int, list[list[float]]] = field(default_factory=dict)
    """By batch size: for each block, seconds until each token was chosen, [new_tokens]."""
    joules: list[float] = field(default_factory=list)
    """Of each block at batch size 1; empty: not measured."""
    tokens_read: int = 0
    """Of each request, where it is an encoder's, whose one time is that of its answer; 0: it writes tokens."""

    def saw_gpu_memory(self, mib: float | None) -> None:
        """Keeps the most that was held; None: not known."""
        if mib is not None:
            self.peak_gpu_memory_mib = max(mib, self.peak_gpu_memory_mib or 0.0)

    def ttft_ms(self, batch_size: int = 1) -> NDArray[np.float64]:
        """[num_blocks, 1]."""
        return np.asarray(1000 * np.array(self.batches[batch_size])[:, :1], np.float64)

    def latency_ms(self, batch_size: int = 1) -> NDArray[np.float64]:
        """[num_blocks, 1]: until the last token."""
        return np.asarray(1000 * np.array(self.batches[batch_size])[:, -1:], np.float64)

    def joules_per_token(self) -> NDArray[np.float64]:
        """[num_blocks, 1]; empty: not measured, or by counters that stood still."""
        if not any(self.joules) or len(self.joules) < len(self.batches[1]):
            return np.empty((0, 1))
        return np.array(self.joules, np.float64)[:, None] / max(1, self.tokens_read or len(self.batches[1][0]))

    def tpot_ms(self, batch_size: int = 1) -> NDArray[np.float64]:
        """[num_blocks, 1]: (end - TTFT) / (new tokens - 1)."""
        chosen = 1000 * np.array(self.batches[batch_size])
        return np.asarray((chosen[:, -1:] - chosen[:, :1]) / (chosen.shape[1] - 1), np.float64)

    def inter_token_ms(self) -> NDArray[np.float64]:
        """[num_blocks, new_tokens - 1]."""
        return np.diff(1000 * np.array(self.batches[1]), axis=1)

    def tokens_per_s(self, batch_size: int) -> NDArray[np.float64]:
        """[num_blocks, 1]: of what is written; of an encoder, of what is read."""
        chosen = np.array(self.batches[batch_size])
        return np.asarray(batch_size * (self.tokens_read or chosen.shape[1]) / chosen[:, -1:], np.float64)


def measure_speed(
    *,
    subjects: list[Subject],
    original: Path,
    data: Path,
    options: Speed,
    threads: int,
    out: Path,
    report: Report = silent,
) -> SpeedSummary:
    """Latency, throughput, memory and size of every subject and of the original checkpoint in PyTorch.

    A subject that crashes, hangs or cannot be loaded is ended and named in the summary; the others are measured on.
    Writes repetitions.parquet: every timed batch with the seconds until each of its tokens.

    Raises:
        ValueError: the original cannot be loaded or cannot read prompts of this length.
        ChildProcessError: the original's process died.
        TimeoutError: the original did not answer in time.
    """
    started_at = time.monotonic()
    ends_at = started_at + 60 * options.max_minutes
    _check_names(subjects)
    prompts = Prompts(data, options)
    limits, before, meter, gpu_memory = machine(threads), snapshot(), Meter(), GpuMemory()
    groups: list[dict[str, Timings]] = []
    failed: dict[str, str] = {}
    waiting = list(subjects)
    while waiting or not groups:
        with ExitStack() as stack:
            running = _start_group(stack, waiting, original, prompts, options, threads, failed, group=len(groups))
            left = [subject for subject in waiting if subject.name not in running and subject.name not in failed]
            share = 1 - len(left) / max(1, len(waiting))
            now = time.monotonic()
            deadline = now + share * max(0.0, ends_at - now)
            _measure_blocks(
                running,
                prompts,
                options,
                deadline,
                failed,
                Meters(meter, gpu_memory),
                report,
                num_before=len(groups),
                more=bool(left),
            )
            for name, (worker, timing) in list(running.items()):
                with _noting_failure(worker, failed, is_needed=name in (ORIGINAL, CONTROL)):
                    _finish(worker, timing)
                if name in failed:
                    del running[name]
            groups.append({name: timing for name, (_, timing) in running.items()})
            waiting = left
    _write_repetitions(groups, out / "repetitions.parquet")
    elapsed_s = time.monotonic() - started_at
    while_measured = conditions(before, snapshot(), threads=threads)
    summary = summarize(groups, subjects, options, threads=threads, elapsed_s=elapsed_s)
    return summary.model_copy(
        update={
            "failed": failed,
            "machine": limits,
            "conditions": while_measured,
            "energy": _energy_said(meter, groups),
            "gpu_memory": gpu_memory.says,
            "noise": f"{summary.noise} {while_measured.sentence}",
        }
    )


def _energy_said(meter: Meter, groups: Sequence[dict[str, Timings]]) -> str:
    stood_still = meter.measures and not any(any(timing.joules) for group in groups for timing in group.values())
    return f"not measured: {meter.says} stood still" if stood_still else meter.says


class Meters(NamedTuple):
    """What is read beside the time."""

    energy: Meter
    gpu_memory: GpuMemory


Running = dict[str, tuple[LatencyWorker, Timings]]
"""Subjects that are loaded, by name."""


class Prompts:
    """Prompts of evaluation text, each from a place drawn anew, so that no prefix cache knows it."""

    def __init__(self, data: Path, options: Speed) -> None:
        from tasks.calibration.tokens import load_tokens

        self._tokens = load_tokens(data, "evaluation").reshape(-1).astype(np.int64)
        self._length = options.prompt_tokens
        self._rng = np.random.default_rng(options.seed)
        if len(self._tokens) < 2 * self._length:
            raise ValueError(
                f"Different prompts of {self._length} tokens need at least {2 * self._length} evaluation tokens; got "
                f"{len(self._tokens)}. Raise data.num_evaluation_windows, or lower speed.prompt_tokens."
            )

    def draw(self, batch_size: int) -> NDArray[np.int64]:
        """[batch_size, prompt_tokens] int64."""
        starts = self._rng.integers(0, len(self._tokens) - self._length + 1, batch_size)
        return np.asarray(self._tokens[starts[:, None] + np.arange(self._length)], np.int64)


def _check_names(subjects: Sequence[Subject]) -> None:
    names = [subject.name for subject in subjects]
    if {ORIGINAL, CONTROL} & set(names) or len(set(names)) < len(names):
        raise ValueError(f"Subjects need different names, none of them {ORIGINAL!r}; got {', '.join(names)}.")
    for subject in subjects:
        if subject.baseline is not None and subject.baseline not in names:
            raise ValueError(f"The baseline of {subject.name!r} must be a subject; got {subject.baseline!r}.")


def _start_group(
    stack: ExitStack,
    waiting: Sequence[Subject],
    original: Path,
    prompts: Prompts,
    options: Speed,
    threads: int,
    failed: dict[str, str],
    *,
    group: int,
) -> Running:
    """The original, its control, and as many waiting subjects as memory takes (at least one), loaded and warm.

    Args:
        failed: receives the subjects that cannot be loaded, or fail when they are warmed up, and why.
    """
    running: Running = {}
    memory_mib = 0.0
    twice = [(ORIGINAL, original, True), (CONTROL, original, True)]
    for name, path, is_original in [*twice, *((subject.name, subject.bundle, False) for subject in waiting)]:
        worker = stack.enter_context(closing(LatencyWorker(name, threads=threads, timeout_s=options.timeout_s)))
        load_s = 0.0
        with _noting_failure(worker, failed, is_needed=is_original):
            load_s = worker.load(path, original=is_original)
            _warm_up(worker, prompts, options)
            memory_mib += worker.memory_mib().now
        if name in failed:
            continue
        if memory_mib > options.max_memory_mib and len(running) > len(twice):
            worker.close()
            break
        timing = Timings(load_s=load_s, size_bytes=size_bytes(path), group=group, tokens_read=_tokens_read(options))
        running[name] = (worker, timing)
    return running


def _tokens_read(options: "Speed | SpeedSummary") -> int:
    return 0 if options.new_tokens else options.prompt_tokens


@contextmanager
def _noting_failure(worker: LatencyWorker, failed: dict[str, str], *, is_needed: bool) -> Iterator[None]:
    """Ends a subject that fails and writes down why; raises instead where the others cannot do without it."""
    try:
        yield
    except FAILURES as error:
        worker.close()
        if is_needed:
            raise
        failed[worker.name] = str(error)


def _warm_up(worker: LatencyWorker, prompts: Prompts, options: Speed) -> None:
    """One request of full length, and the beginning of one at each larger batch size: engines compile per shape."""
    if problem := options.misfit(worker.kind):
        raise ValueError(f"{worker.name!r} cannot be timed so: {problem}")
    needed = options.prompt_tokens + options.new_tokens - 1  # the last new token is not read back
    advice = "Lower them, or compile the engine with a larger max_length."
    if worker.kind != "decoder":  # source and text have positions of their own
        needed, advice = max(options.prompt_tokens, options.new_tokens), "Lower them."
    if worker.max_length is not None and worker.max_length < needed:
        raise ValueError(
            f"{worker.name!r} reads at most {worker.max_length} tokens; speed.prompt_tokens and speed.new_tokens need "
            f"{needed}. {advice}"
        )
    for batch_size in options.batch_sizes:
        worker.generate(prompts.draw(batch_size), options.new_tokens if batch_size == 1 else min(8, options.new_tokens))
    worker.idle_s = worker.idle_cpu_s = 0.0


def _measure_blocks(
    running: Running,
    prompts: Prompts,
    options: Speed,
    deadline: float,
    failed: dict[str, str],
    meters: Meters,
    report: Report,
    *,
    num_before: int,
    more: bool,
) -> None:
    """Fills the timings of a group, block by block, until all blocks are done or the deadline passed.

    Args:
        running: loses the subjects that fail.
        failed: receives them, and why.
        meters: of energy and of memory on GPUs.
        num_before: groups before this one.
        more: whether another group follows; how many do shows only when memory is full again.
    """
    rng = np.random.default_rng([options.seed, num_before])
    every = max(1, options.num_blocks // options.num_batch_blocks)
    needed = MIN_BLOCKS
    if len(options.batch_sizes) > 1:  # the larger ones need as many
        needed = max(needed, 1 + every * (min(MIN_BLOCKS, options.num_batch_blocks) - 1))
    for block in range(options.num_blocks):
        if block >= needed and time.monotonic() > deadline:
            break
        larger_too = block % every == 0 and block // every < options.num_batch_blocks
        for batch_size in options.batch_sizes if larger_too else (1,):
            input_ids = prompts.draw(batch_size)
            for name in rng.permutation([name for name in running if batch_size == 1 or name != CONTROL]):
                worker, timing = running[str(name)]
                time.sleep(SETTLE_S)
                with _noting_failure(worker, failed, is_needed=name in (ORIGINAL, CONTROL)):
                    joules = meters.energy.joules()
                    timing.batches.setdefault(batch_size, []).append(worker.generate(input_ids, options.new_tokens))
                    if meters.energy.measures and batch_size == 1:
                        timing.joules.append(meters.energy.joules() - joules)
                    timing.saw_gpu_memory(meters.gpu_memory.mib(worker.pid))
                if name in failed:
                    del running[str(name)]
        step = num_before * options.num_blocks + block + 1
        told = {
            f"tpot_ms.{name}" if options.new_tokens else f"latency_ms.{name}": float(
                (timing.tpot_ms() if options.new_tokens else timing.latency_ms())[-1, 0]
            )
            for name, (_, timing) in running.items()
        }
        report(step, (num_before + 1 + more) * options.num_blocks, told)


def _finish(worker: LatencyWorker, timing: Timings) -> None:
    timing.peak_memory_mib = worker.memory_mib().peak
    timing.idle_s, timing.idle_cpu_s = worker.idle_s, worker.idle_cpu_s


def size_bytes(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _write_repetitions(groups: Sequence[dict[str, Timings]], path: Path) -> None:
    import pandas as pd

    rows = [
        {
            "group": group,
            "subject": name,
            "batch_size": batch_size,
            "block": block,
            "chosen_after_s": chosen,
            "joules": timing.joules[block] if batch_size == 1 and block < len(timing.joules) else None,
        }
        for group, timings in enumerate(groups)
        for name, timing in timings.items()
        for batch_size, blocks in timing.batches.items()
        for block, chosen in enumerate(blocks)
    ]
    pd.DataFrame(rows).to_parquet(path, index=False)


def summarize(
    groups: Sequence[dict[str, Timings]],
    subjects: Sequence[Subject],
    options: Speed,
    *,
    threads: int,
    elapsed_s: float,
    confidence: float = CONFIDENCE,
) -> SpeedSummary:
    """Figures and intervals from raw timings.

    Args:
        groups: timings by subject; each group has the original and its control. All blocks of the original count for
            its own figures; a subject is compared with the blocks of the groups that it took part in.
        subjects: for their baselines.
        options: as measured.
        threads: of every engine.
        elapsed_s: of the whole measurement.
        confidence: of the intervals.
    """
    names = dict.fromkeys(name for timings in groups for name in timings)
    part_in = {name: [timings for timings in groups if name in timings] for name in names}
    everyone = {
        name: (_pool([timings[name] for timings in part]), _pool([timings[ORIGINAL] for timings in part]))
        for name, part in part_in.items()
        if name != CONTROL
    }
    how = _how(options, confidence)
    control = _control(everyone[ORIGINAL][0], _pool([timings[CONTROL] for timings in groups]), **how)
    baselines = {subject.name: subject.baseline for subject in subjects if subject.baseline}
    summaries = {}
    for name, (timing, original) in everyone.items():
        baseline = everyone.get(baselines.get(name, ""))
        together = baseline is not None and part_in[name] == part_in[baselines[name]]
        throughput, latencies = {}, {}
        for batch_size in options.batch_sizes:
            latencies[batch_size] = _latency(timing, original, batch_size, **how)
            rate, originals = timing.tokens_per_s(batch_size), original.tokens_per_s(batch_size)
            versus = None
            if baseline and together:
                versus = ratio_of_medians(rate, baseline[0].tokens_per_s(batch_size), **how)
            elif baseline:
                others = [t.tokens_per_s(batch_size) for t in baseline]
                versus = ratio_through_control(rate, originals, *others, **how)
            throughput[batch_size] = Throughput(
                num=rate.size,
                tokens_per_s=median(rate, **how),
                ratio_to_original=ratio_of_medians(rate, originals, **how),
                ratio_to_baseline=versus,
            )
        joules, originals_joules = timing.joules_per_token(), original.joules_per_token()
        paired = len(joules) == len(originals_joules) and joules.size and np.median(originals_joules) > 0
        of_writing: dict[str, Any] = {}
        if not timing.tokens_read:
            of_writing = {
                "inter_token_ms": percentiles(timing.inter_token_ms(), **how),
                "ttft_ratios_to_original": _ratios(timing.ttft_ms(), original.ttft_ms(), **how),
                "tpot_ratios_to_original": _ratios(timing.tpot_ms(), original.tpot_ms(), **how),
            }
        summaries[name] = SubjectSpeed(
            ttft_ms=latencies[1].ttft_ms,
            tpot_ms=latencies[1].tpot_ms,
            latency_ms=latencies[1].latency_ms,
            latency_ratios_to_original=latencies[1].latency_ratios_to_original,
            **of_writing,
            by_batch_size=latencies,
            energy_j_per_token=median(joules, **how) if joules.size else None,
            energy_ratio_to_original=ratio_of_medians(joules, originals_joules, **how) if paired else None,
            throughput=throughput,
            load_s=timing.load_s,
            peak_memory_mib=timing.peak_memory_mib,
            peak_gpu_memory_mib=timing.peak_gpu_memory_mib,
            size_bytes=timing.size_bytes,
            idle_cpu_percent=100 * timing.idle_cpu_s / max(timing.idle_s, 1e-9),
            group=timing.group,
        )
    noisy, noise = judge_noise(control)
    detectable = detectable_percent(control, confidence)
    return SpeedSummary(
        subjects=summaries,
        control=control,
        noisy=noisy,
        noise=noise + _smallest_difference(detectable),
        detectable_percent=detectable,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        threads=threads,
        num_blocks=min(len(timing.batches[1]) for timings in groups for timing in timings.values()),
        num_groups=len(groups),
        elapsed_s=elapsed_s,
    )


def _latency(timing: Timings, original: Timings, batch_size: int, **how: Any) -> BatchLatency:
    of_writing: dict[str, Any] = {}
    if not timing.tokens_read:
        times = {"ttft_ms": timing.ttft_ms(batch_size), "tpot_ms": timing.tpot_ms(batch_size)}
        of_writing = {name: percentiles(each, **how) for name, each in times.items()}
    its, ratios = timing.latency_ms(batch_size), {}
    if timing.tokens_read or batch_size == 1:  # what may be limited
        ratios = _ratios(its, original.latency_ms(batch_size), **how)
    return BatchLatency(latency_ms=percentiles(its, **how), latency_ratios_to_original=ratios, **of_writing)


def _how(options: Speed, confidence: float) -> dict[str, Any]:
    return {"seed": options.seed, "confidence": confidence}


def _ratios(its: Floats, others: Floats, **how: Any) -> dict[str, Estimate]:
    """The ratio of each percentile of observations in the same blocks."""
    ratios = {"p50": ratio_of_medians(its, others, **how)}
    for percentile in PERCENTILES[1:]:
        ratios[percentile] = ratio_of_percentiles(its, others, float(percentile[1:]), **how)
    return ratios


def _pool(timings: Sequence[Timings]) -> Timings:
    """One subject that took part in several groups: all its blocks, its first load, its highest memory."""
    batches: dict[int, list[list[float]]] = {}
    for timing in timings:
        for batch_size, blocks in timing.batches.items():
            batches.setdefault(batch_size, []).extend(blocks)
    on_gpus = [timing.peak_gpu_memory_mib for timing in timings if timing.peak_gpu_memory_mib is not None]
    return Timings(
        load_s=timings[0].load_s,
        size_bytes=timings[0].size_bytes,
        group=timings[0].group,
        peak_memory_mib=max(timing.peak_memory_mib for timing in timings),
        peak_gpu_memory_mib=max(on_gpus, default=None),
        idle_s=sum(timing.idle_s for timing in timings),
        idle_cpu_s=sum(timing.idle_cpu_s for timing in timings),
        batches=batches,
        joules=[joules for timing in timings for joules in timing.joules],
        tokens_read=timings[0].tokens_read,
    )


def _control(original: Timings, control: Timings, **how: Any) -> Control:
    of_writing = {}
    if not original.tokens_read:
        of_writing = {
            "ttft_ratio": ratio_of_medians(control.ttft_ms(), original.ttft_ms(), **how),
            "tpot_ratio": ratio_of_medians(control.tpot_ms(), original.tpot_ms(), **how),
        }
    return Control(
        throughput_ratio=ratio_of_medians(control.tokens_per_s(1), original.tokens_per_s(1), **how), **of_writing
    )


def judge_noise(control: Control) -> tuple[bool, str]:
    """Whether the machine was too noisy, and what the control shows, in a sentence."""
    titles = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "throughput": "throughput"}
    named = {titles[name]: ratio for name, ratio in control.named().items()}
    shown = ", ".join(f"{name} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for name, e in named.items())
    off = [n for n, e in named.items() if _low(e) > 1 + CONTROL_TOLERANCE or _high(e) < 1 - CONTROL_TOLERANCE]
    wide = [n for n, e in named.items() if (_high(e) - _low(e)) / 2 > CONTROL_MAX_HALF_WIDTH]
    if off:
        return True, f"Noisy: the original differs from itself ({shown}; ratios should be 1)."
    if wide:
        return True, f"Noisy: the original's ratio to itself is known only roughly ({shown}; should be 1)."
    return False, f"Quiet enough: the original beside itself gives ratios of {shown}; they should be 1."


def detectable_percent(control: Control, confidence: float = CONFIDENCE) -> dict[str, float]:
    """By metric, the difference that a comparison as noisy as the control's calls one with probability `POWER`.

    An interval leaves out 1 where the difference is above its half width h, and at a difference of h it does so in half
    of all runs. With h = z(0.975) standard errors, probability p needs z(p) standard errors more, which is
    h (1 + z(p) / z(0.975)); that is for a `confidence` of 95 %.
    """
    more = 1 + NormalDist().inv_cdf(POWER) / NormalDist().inv_cdf(0.5 + confidence / 2)
    return {name: 100 * more * (_high(e) - _low(e)) / 2 for name, e in control.named().items() if e.low is not None}


def _smallest_difference(detectable: dict[str, float]) -> str:
    shown = ", ".join(f"{percent:.1f} % in {name.removesuffix('_ms')}" for name, percent in detectable.items())
    return f" The smallest differences that this run would probably ({100 * POWER:.0f} %) have told: {shown}."


def read_groups(directory: Path, summary: SpeedSummary) -> list[dict[str, Timings]]:
    """The timings that a measurement wrote to `directory`, group by group, as `summarize` takes them."""
    import pandas as pd

    rows = pd.read_parquet(directory / "repetitions.parquet").sort_values(
        ["group", "batch_size", "block"], kind="stable"
    )
    groups: list[dict[str, Timings]] = [{} for _ in range(int(rows["group"].max()) + 1)]
    for (group, name, batch_size), its in rows.groupby(["group", "subject", "batch_size"], sort=False):
        about = summary.subjects.get(ORIGINAL if name == CONTROL else name)
        if about is None:  # it failed later
            continue
        timing = groups[group].setdefault(
            name,
            Timings(
                load_s=about.load_s,
                size_bytes=about.size_bytes,
                group=group,
                peak_memory_mib=about.peak_memory_mib,
                peak_gpu_memory_mib=about.peak_gpu_memory_mib,
                idle_s=1.0,
                idle_cpu_s=about.idle_cpu_percent / 100,
                tokens_read=_tokens_read(summary),
            ),
        )
        timing.batches[int(batch_size)] = [[float(second) for second in chosen] for chosen in its["chosen_after_s"]]
        timing.joules += [float(joules) for joules in its["joules"] if joules is not None and not math.isnan(joules)]
    return groups


def read_timings(directory: Path, summary: SpeedSummary) -> dict[str, Timings]:
    """The timings that a measurement wrote to `directory`, by subject: the blocks of all groups together."""
    groups = read_groups(directory, summary)
    names = dict.fromkeys(name for timings in groups for name in timings)
    return {name: _pool([timings[name] for timings in groups if name in timings]) for name in names}


def measured(summary: SpeedSummary, name: str) -> dict[str, Measured]:
    """What a summary says of each metric of a subject; empty of one that was not measured."""
    subject, original = summary.subjects.get(name), summary.subjects[ORIGINAL]
    if subject is None:
        return {}
    found = {
        "peak_memory_mib": beside(
            exactly(subject.peak_memory_mib),
            exactly(subject.peak_memory_mib / original.peak_memory_mib),
            original.peak_memory_mib,
            better="lower",
        )
    }
    if subject.peak_gpu_memory_mib is not None:
        found[GPU_MEMORY] = Measured(value=exactly(subject.peak_gpu_memory_mib))
    if joules := subject.energy_j_per_token:
        ratio, of_original = subject.energy_ratio_to_original, original.energy_j_per_token
        beside_it = beside(joules, ratio, of_original.value, better="lower") if ratio and of_original else None
        found[figure_name(ENERGY, batch_size=1)] = beside_it or Measured(value=joules)
    for metric in (*OF_WRITING, "latency_ms"):
        ratios = subject.ratios_to_original(metric)
        found |= _times(metric, 1, getattr(subject, metric), getattr(original, metric), ratios)
    if not summary.new_tokens:
        for batch_size, latency in subject.by_batch_size.items():
            others = original.by_batch_size[batch_size].latency_ms
            found |= _times("latency_ms", batch_size, latency.latency_ms, others, latency.latency_ratios_to_original)
    for batch_size, at in subject.throughput.items():
        rate = original.throughput[batch_size].tokens_per_s.value
        found[figure_name("throughput_tokens_per_s", batch_size=batch_size)] = beside(
            at.tokens_per_s, at.ratio_to_original, rate, better="higher"
        )
        if not summary.new_tokens:
            found[figure_name(SAMPLES, batch_size=batch_size)] = beside(
                scaled(at.tokens_per_s, 1 / summary.prompt_tokens),
                at.ratio_to_original,
                rate / summary.prompt_tokens,
                better="higher",
            )
        found[figure_name("speedup_over_original", batch_size=batch_size)] = Measured(value=at.ratio_to_original)
        if at.ratio_to_baseline:
            found[figure_name("speedup_over_unquantized", batch_size=batch_size)] = Measured(value=at.ratio_to_baseline)
    return found


def _times(
    metric: str,
    batch_size: int,
    its: Percentiles | None,
    others: Percentiles | None,
    ratios: dict[str, Estimate],
) -> dict[str, Measured]:
    """Every percentile of a latency beside the original's; empty where it was not measured."""
    if its is None or others is None:
        return {}
    return {
        figure_name(metric, percentile=percentile, batch_size=batch_size): beside(
            getattr(its, percentile),
            ratios[percentile],
            getattr(others, percentile).value,
            better="lower",
            too_few=its.too_few(percentile),
        )
        for percentile in PERCENTILES
    }


def _low(estimate: Estimate) -> float:
    return -np.inf if estimate.low is None else estimate.low


def _high(estimate: Estimate) -> float:
    return np.inf if estimate.high is None else estimate.high
