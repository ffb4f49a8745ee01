"""How many requests an engine serves, and how long they wait, when many come at a time.

Latency alone says little about a service: below its capacity an engine answers about as fast as alone, near it
requests wait for each other, beyond it the queue grows without end. So every engine is put under levels of load, as
`slimline serve` would be: some users who ask again and again (closed loop), and Poisson arrivals at rates that are
given, or raised until the engine is saturated (open loop; arrivals.py). Levels are taken in turn by all engines, so
that a machine that slows down for minutes does not slow down one of them alone.

A level is saturated if at its end more than a tenth of its requests, and more than are served at a time, are not
complete.
Goodput (Zhong et al., DistServe, OSDI 2024, arXiv:2401.09670) is the largest rate of an open loop at which a stated
fraction of requests is answered within a stated time.
"""

import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from tasks.calibration.progress import Report, silent
from tasks.validation.arrivals import (
    Length,
    LogNormal,
    Request,
    Served,
    batch_means,
    draw_lengths,
    poisson_arrivals,
)
from tasks.validation.latency import Subject
from tasks.validation.load_worker import LoadWorker
from tasks.validation.measured import Measured, Metric
from tasks.validation.statistics import Estimate, Percentiles, bootstrap_ratio_of_sums, percentiles, wilson
from tasks.validation.worker import FAILURES

SATURATED_FRACTION = 0.1
"""Of a level's requests; more than these are left at its end, and it was saturated."""
RAMP_UP_FRACTION = 0.1
"""Of a level's requests: the first find a queue that is emptier than it will be, and do not count in percentiles."""
NUM_SLICES = 10
"""Of a level's time, for the interval of its throughput."""
WARM_UP_REQUESTS = 2
_LOAD: dict[str, Any] = {"aspect": "speed", "option": "validation.load", "compared": False}
GOODPUT = Metric(
    name="goodput_requests_per_s",
    title="goodput",
    unit="requests/s",
    better="higher",
    **_LOAD | {"option": "validation.load.within"},
)
CAPACITY_REQUESTS = Metric(
    name="capacity_requests_per_s",
    title="requests served under load",
    unit="requests/s",
    better="higher",
    **_LOAD,
)
CAPACITY_TOKENS = Metric(
    name="capacity_tokens_per_s",
    title="tokens served under load",
    unit="tokens/s",
    better="higher",
    **_LOAD,
)
METRICS = (GOODPUT, CAPACITY_REQUESTS, CAPACITY_TOKENS)


class Sweep(BaseModel, frozen=True, extra="forbid"):
    """Rates from half of what one user at a time is served, each `factor` times the last, until one is saturated.

    The last step is between the largest rate that is not and the smallest that is.
    """

    factor: float = Field(1.5, gt=1, le=4)
    max_levels: int = Field(8, ge=2, le=50)


class Within(BaseModel, frozen=True, extra="forbid"):
    """What counts as answered in time; goodput is measured by it."""

    ttft_ms: float | None = Field(None, gt=0, description="From when the request was due to its first token.")
    tpot_ms: float | None = Field(None, gt=0, description="Mean time per token after the first.")
    latency_ms: float | None = Field(None, gt=0, description="From when the request was due to its last token.")
    fraction: float = Field(0.9, gt=0, lt=1, description="Of the requests, that have to be.")

    @model_validator(mode="after")
    def _limits_something(self) -> "Within":
        if self.ttft_ms is None and self.tpot_ms is None and self.latency_ms is None:
            raise ValueError("`within` needs ttft_ms, tpot_ms or latency_ms; got none.")
        return self


class Load(BaseModel, frozen=True, extra="forbid"):
    """Which loads every engine is put under; each is a level."""

    users: tuple[int, ...] = Field((1, 4), description="Closed loop: so many users at a time, a level each.")
    requests_per_s: tuple[float, ...] | Sweep = Field(
        Sweep(), description="Open loop: these rates, a level each, or a sweep; []: none."
    )
    prompt_tokens: Length = LogNormal(median=128, sigma=0.6, max=512)
    new_tokens: Length = LogNormal(median=48, sigma=0.6, max=192)
    seconds_per_level: float = Field(30.0, gt=0, description="In which requests come.")
    max_concurrent: int = Field(8, ge=1, description="Requests served at a time, as `slimline serve` limits them.")
    within: Within | None = Field(None, description="What counts as answered in time. null: no goodput.")
    max_memory_mib: int = Field(
        6000, ge=1, description="Engines that would exceed this together are measured in groups."
    )
    timeout_s: float = Field(
        300.0, gt=0, description="An engine that takes so much longer than a level's time is ended; the others go on."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of arrivals, lengths and prompts.")

    @model_validator(mode="after")
    def _levels_ascend(self) -> "Load":
        rates = () if isinstance(self.requests_per_s, Sweep) else self.requests_per_s
        for name, levels in (("users", self.users), ("requests_per_s", rates)):
            if any(level <= 0 for level in levels) or any(a >= b for a, b in pairwise(levels)):
                raise ValueError(f"{name} must be above 0 and ascend; got {list(levels)}.")
        if not self.users and self.requests_per_s == ():
            raise ValueError("load needs users or requests_per_s; got neither.")
        if self.within and self.requests_per_s == ():
            raise ValueError("`within` is for an open loop; give requests_per_s, or drop `within`.")
        return self

    def metrics(self) -> tuple[Metric, ...]:
        """What these options measure."""
        return METRICS if self.within else METRICS[1:]


class Level(BaseModel, frozen=True, extra="forbid"):
    """One engine under one load. Times count from when each request was due; intervals are 95 %, by batch means."""

    loop: Literal["closed", "open"]
    users: int | None = Field(description="Of a closed loop.")
    offered_requests_per_s: float | None = Field(description="Of an open loop.")
    window_s: float = Field(description="In which requests came.")
    num_requests: int
    num_unfinished: int = Field(description="When the window ended.")
    num_given_up: int = Field(description="As long again after it; they count with the time until then.")
    requests_per_s: Estimate = Field(description="Completed within the window; a request is one sample.")
    tokens_per_s: Estimate = Field(description="Output tokens that came within the window.")
    queue_growth_per_s: float = Field(description="Unfinished requests at the window's end / its seconds.")
    saturated: bool
    ttft_ms: Percentiles | None = Field(description="None: no request had a token.")
    tpot_ms: Percentiles | None
    latency_ms: Percentiles | None
    fraction_within: Estimate | None = Field(
        description="Of requests answered in time, with Wilson's interval, as if they did not wait for each other."
    )
    goodput_requests_per_s: float | None = Field(description="Requests answered in time / the window's seconds.")


class SubjectLoad(BaseModel, frozen=True, extra="forbid"):
    """One engine under all its loads."""

    levels: tuple[Level, ...] = Field(description="In the order they were measured.")
    capacity_requests_per_s: Estimate = Field(description="Of the level with the most.")
    capacity_tokens_per_s: Estimate
    saturated_at_requests_per_s: float | None = Field(description="Smallest offered rate that was; None: none was.")
    goodput_requests_per_s: Estimate | None = Field(
        description="Largest offered rate that held `within`; the interval is of the rates whose own interval decides."
    )
    load_s: float
    peak_memory_mib: float


class LoadSummary(BaseModel, frozen=True, extra="forbid"):
    """All engines."""

    subjects: dict[str, SubjectLoad]
    failed: dict[str, str] = Field({}, description="Engines that crashed or hung, and why, in a sentence.")
    options: Load
    threads: int
    elapsed_s: float


def measure_load(
    *, subjects: list[Subject], data: Path, options: Load, threads: int, out: Path, report: Report = silent
) -> LoadSummary:
    """Every engine bundle under load, served as `slimline serve` does.

    Writes requests.parquet: every request of every level with the times of its tokens.

    Raises:
        ValueError: the evaluation text is too short for the longest prompt.
    """
    started_at = time.monotonic()
    source = Requests(data, options)
    failed: dict[str, str] = {}
    measured: dict[str, SubjectLoad] = {}
    rows: list[dict[str, Any]] = []
    waiting = list(subjects)
    while waiting:
        with ExitStack() as stack:
            running = _start(stack, waiting, source, options, threads, failed)
            waiting = [s for s in waiting if s.name not in running and s.name not in failed]
            taken: dict[str, list[Level]] = {name: [] for name in running}
            peaks: dict[str, float] = {}
            steps = {name: _levels(options, taken[name]) for name in running}
            while steps:
                for name in np.random.default_rng([options.seed, len(rows)]).permutation(list(steps)):
                    _take_step(str(name), running, steps, taken, peaks, source, options, rows, failed)
                done, left = sum(map(len, taken.values())), len(steps)
                report(
                    done,
                    done + left,
                    {f"requests_per_s.{n}": found[-1].requests_per_s.value for n, found in taken.items() if found},
                )
            for name, (_, load_s) in running.items():
                if name not in failed:
                    measured[name] = summarize(taken[name], options, load_s, peaks[name])
    _write(rows, out / "requests.parquet")
    elapsed_s = time.monotonic() - started_at
    return LoadSummary(subjects=measured, failed=failed, options=options, threads=threads, elapsed_s=elapsed_s)


Step = tuple[int | None, float | None]
"""Users of a closed loop, or rate of an open one."""


def _levels(options: Load, taken: Sequence[Level]) -> Generator[Step, None, None]:
    """The loads of one engine in turn; reads from `taken` what came of those before."""
    for users in options.users:
        yield users, None
    if not isinstance(options.requests_per_s, Sweep):
        for rate in options.requests_per_s:
            yield None, rate
        return
    if 1 not in options.users:
        yield 1, None
    alone = next(level for level in taken if level.users == 1)
    assert alone.latency_ms
    rate, held = 500 / alone.latency_ms.p50.value, 0.0
    for _ in range(options.requests_per_s.max_levels - 1):
        yield None, rate
        if taken[-1].saturated:
            break
        held, rate = rate, rate * options.requests_per_s.factor
    if taken[-1].saturated and held:
        yield None, (held * rate) ** 0.5


class Requests:
    """Prompts of evaluation text, each from a place drawn anew, with lengths from the options' distributions."""

    def __init__(self, data: Path, options: Load) -> None:
        from tasks.calibration.tokens import load_tokens

        self._tokens: NDArray[np.int64] = load_tokens(data, "evaluation").reshape(-1).astype(np.int64)
        self._options = options
        if len(self._tokens) < 2 * options.prompt_tokens.longest:
            raise ValueError(
                f"Different prompts of {options.prompt_tokens.longest} tokens need at least "
                f"{2 * options.prompt_tokens.longest} evaluation tokens; got {len(self._tokens)}. "
                "Raise data.num_evaluation_windows, or lower load.prompt_tokens."
            )

    def draw(self, num: int, seed: Sequence[int]) -> list[Request]:
        """So many requests; equal for equal seeds, so that engines are asked the same at the same step."""
        rng = np.random.default_rng([self._options.seed, *seed])
        prompt_lengths = draw_lengths(self._options.prompt_tokens, num, rng)
        new_tokens = draw_lengths(self._options.new_tokens, num, rng)
        starts = rng.integers(0, len(self._tokens) - prompt_lengths + 1)
        return [
            Request(self._tokens[start : start + length].tolist(), int(new))
            for start, length, new in zip(starts, prompt_lengths, new_tokens, strict=True)
        ]


def _start(
    stack: ExitStack,
    waiting: Iterable[Subject],
    source: Requests,
    options: Load,
    threads: int,
    failed: dict[str, str],
) -> dict[str, tuple[LoadWorker, float]]:
    """As many engines as memory takes (at least one), loaded and warm, with the seconds that loading took."""
    running: dict[str, tuple[LoadWorker, float]] = {}
    memory_mib = 0.0
    longest = options.prompt_tokens.longest + options.new_tokens.longest - 1  # the last new token is not read back
    for subject in waiting:
        worker = stack.enter_context(closing(LoadWorker(subject.name, threads=threads, timeout_s=options.timeout_s)))
        try:
            load_s = worker.load(subject.bundle)
            if worker.max_length < longest:
                raise ValueError(
                    f"{subject.name!r} reads at most {worker.max_length} tokens; load.prompt_tokens and "
                    f"load.new_tokens need {longest}. Lower them, or compile the engine with a larger max_length."
                )
            requests = source.draw(WARM_UP_REQUESTS, [0])
            worker.run(
                requests,
                due_s=[0.0] * len(requests),
                users=None,
                window_s=0.0,
                drain_s=options.timeout_s,
                max_concurrent=options.max_concurrent,
            )
            memory_mib += worker.memory_mib().now
        except FAILURES as error:
            worker.close()
            failed[subject.name] = str(error)
            continue
        if memory_mib > options.max_memory_mib and running:
            worker.close()
            break
        running[subject.name] = worker, load_s
    return running


def _take_step(
    name: str,
    running: dict[str, tuple[LoadWorker, float]],
    steps: dict[str, Generator[Step, None, None]],
    taken: dict[str, list[Level]],
    peaks: dict[str, float],
    source: Requests,
    options: Load,
    rows: list[dict[str, Any]],
    failed: dict[str, str],
) -> None:
    """The next level of one engine, if there is one; an engine that fails takes no more."""
    step = next(steps[name], None)
    if step is None:
        del steps[name]
        return
    users, rate = step
    index = len(taken[name])
    window_s = options.seconds_per_level
    if rate is None:
        due_s, num = None, 256
    else:
        due_s = poisson_arrivals(rate, window_s, np.random.default_rng([options.seed, index]))
        num = len(due_s)
    try:
        served = running[name][0].run(
            source.draw(num, [1, index]),
            due_s=due_s,
            users=users,
            window_s=window_s,
            drain_s=window_s,
            max_concurrent=options.max_concurrent,
        )
        peaks[name] = running[name][0].memory_mib().peak
    except FAILURES as error:
        running[name][0].close()
        failed[name] = str(error)
        del steps[name]
        return
    taken[name].append(summarize_level(served, options, users=users, rate=rate))
    rows += [
        {"subject": name, "level": index, "users": users, "offered_requests_per_s": rate, **vars(each)}
        for each in served
    ]


def summarize_level(served: Sequence[Served], options: Load, *, users: int | None, rate: float | None) -> Level:
    """Figures of one level.

    Args:
        served: every request, by when it was due.
        options: as measured.
        users: of a closed loop.
        rate: of an open loop.
    """
    window_s = options.seconds_per_level
    unfinished = sum(not each.finished or each.ended_s > window_s for each in served)
    counted = served[int(RAMP_UP_FRACTION * len(served)) :]
    in_time = [_in_time(each, options.within) for each in counted] if options.within else []
    completed_at = [each.ended_s for each in served if each.finished]
    token_at = [at_s for each in served for at_s in each.chosen_s]
    closed_and_empty = users is not None  # users always wait for something at the end
    return Level(
        loop="open" if users is None else "closed",
        users=users,
        offered_requests_per_s=rate,
        window_s=window_s,
        num_requests=len(served),
        num_unfinished=unfinished,
        num_given_up=sum(not each.finished for each in served),
        requests_per_s=_rate(completed_at, window_s, options.seed),
        tokens_per_s=_rate(token_at, window_s, options.seed),
        queue_growth_per_s=0.0 if closed_and_empty else unfinished / window_s,
        saturated=not closed_and_empty and unfinished > max(SATURATED_FRACTION * len(served), options.max_concurrent),
        ttft_ms=_percentiles([(_first_s(each) - each.due_s) for each in counted], options.seed),
        tpot_ms=_percentiles([tpot for each in counted if (tpot := _tpot_s(each)) is not None], options.seed),
        latency_ms=_percentiles([each.ended_s - each.due_s for each in counted], options.seed),
        fraction_within=_fraction(sum(in_time), len(in_time)) if in_time else None,
        goodput_requests_per_s=sum(_in_time(each, options.within) for each in served) / window_s
        if options.within and rate is not None
        else None,
    )


def _first_s(served: Served) -> float:
    return served.chosen_s[0] if served.chosen_s else served.ended_s


def _tpot_s(served: Served) -> float | None:
    if len(served.chosen_s) < 2:
        return None
    return (served.chosen_s[-1] - served.chosen_s[0]) / (len(served.chosen_s) - 1)


def _in_time(served: Served, within: Within) -> bool:
    tpot_s = _tpot_s(served)
    measured = (
        (within.ttft_ms, _first_s(served) - served.due_s),
        (within.tpot_ms, tpot_s),
        (within.latency_ms, served.ended_s - served.due_s),
    )
    return served.finished and all(limit is None or s is None or 1000 * s <= limit for limit, s in measured)


def _percentiles(seconds: Sequence[float], seed: int) -> Percentiles | None:
    return percentiles(1000 * batch_means(seconds), seed=seed) if seconds else None


def _rate(at_s: Sequence[float], window_s: float, seed: int) -> Estimate:
    """Events per second of the window, with an interval from resampled slices of it."""
    counts, _ = np.histogram(at_s, bins=NUM_SLICES, range=(0, window_s))
    seconds = np.full(NUM_SLICES, window_s / NUM_SLICES)
    return bootstrap_ratio_of_sums(counts, seconds, np.arange(NUM_SLICES), seed=seed)


def _fraction(num_right: int, num: int) -> Estimate:
    low, high = wilson(num_right, num)
    return Estimate(value=num_right / num, low=low, high=high, num=num)


def summarize(levels: Sequence[Level], options: Load, load_s: float, peak_memory_mib: float) -> SubjectLoad:
    """What all levels of one engine say together."""
    saturated = [level.offered_requests_per_s for level in levels if level.saturated]
    return SubjectLoad(
        levels=tuple(levels),
        capacity_requests_per_s=max((level.requests_per_s for level in levels), key=lambda rate: rate.value),
        capacity_tokens_per_s=max((level.tokens_per_s for level in levels), key=lambda rate: rate.value),
        saturated_at_requests_per_s=min((rate for rate in saturated if rate), default=None),
        goodput_requests_per_s=goodput(levels, options.within.fraction) if options.within else None,
        load_s=load_s,
        peak_memory_mib=peak_memory_mib,
    )


def goodput(levels: Sequence[Level], fraction: float) -> Estimate:
    """The largest offered rate up to which every level answered `fraction` of its requests in time; 0 if none did.

    Its lower end is the same of the levels' lower ends. Its upper end is the smallest rate whose upper end is below
    `fraction`; there is none where no level failed so clearly, since a higher rate might have been held.
    """
    found = sorted(
        (level.offered_requests_per_s, level.fraction_within)
        for level in levels
        if level.offered_requests_per_s and level.fraction_within
    )
    value = low = 0.0
    high: float | None = None
    held = surely_held = True
    for rate, within in found:
        held = held and within.value >= fraction
        surely_held = surely_held and within.low is not None and within.low >= fraction
        value, low = rate if held else value, rate if surely_held else low
        if high is None and within.high is not None and within.high < fraction:
            high = rate
    return Estimate(value=value, low=low, high=high, num=len(found))


def measured(summary: LoadSummary, name: str) -> dict[str, Measured]:
    """What a summary says of each metric of an engine; empty of one that was not measured."""
    subject = summary.subjects.get(name)
    if subject is None:
        return {}
    found = {
        CAPACITY_REQUESTS.name: Measured(value=subject.capacity_requests_per_s),
        CAPACITY_TOKENS.name: Measured(value=subject.capacity_tokens_per_s),
    }
    if subject.goodput_requests_per_s:
        found[GOODPUT.name] = Measured(value=subject.goodput_requests_per_s)
    return found


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    import pandas as pd

    pd.DataFrame(rows).to_parquet(path, index=False)
