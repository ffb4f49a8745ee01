"""The settings with which a bundle is fastest on this machine, found by measuring and kept in its manifest.

One setting after the other: all its values are measured in interleaved rounds, so that a noisy machine slows all alike,
and the fastest is kept if it gains more than the noise. Values that change the arithmetic are kept only if the answers
stay within the engine's tolerance of those before.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from tasks.calibration.progress import Report, silent
from tasks.engines.generation import generate_timed
from tasks.engines.naming import alternatives
from tasks.engines.parity import ROUNDED, compare

if TYPE_CHECKING:
    from tasks.engines import Engine
    from tasks.engines.generation import Ids, Session

SETTINGS = {"onnxruntime": ("graph_optimization",), "openvino": ("kv_cache", "precision")}
"""What is tried per engine, besides the number of threads; options of the engine that apply when it is loaded."""

MIN_GAIN = 0.03
"""A setting must be faster by this fraction: rounds of the same setting differ by about as much."""


class Tuning(BaseModel, frozen=True, extra="forbid"):
    """How settings are searched: as in a request of this shape, every value in so many interleaved rounds."""

    prompt_tokens: int = Field(128, ge=1, description="Tokens read.")
    new_tokens: int = Field(32, ge=2, description="Tokens written and timed; they count as many times as are read.")
    num_rounds: int = Field(
        7, ge=3, description="Rounds in which every value of a setting is timed; one more warms up."
    )


class Trial(BaseModel, frozen=True, extra="forbid"):
    """One value of one setting."""

    setting: str
    value: str | int
    ttft_ms: float = Field(description="Of a prompt at batch size 1, median over rounds.")
    tpot_ms: float
    refused: str | None = Field(
        None, description="Why it was not taken however fast it is; None where no such reason was met, or needed."
    )


class Tuned(BaseModel, frozen=True, extra="forbid"):
    """What was found, on which processor and with what."""

    processor: str
    num_cores: int = Field(description="That the process could use.")
    threads: int
    options: dict[str, str] = Field(description="Options of the engine that differ from those it was compiled with.")
    prompt_tokens: int
    new_tokens: int
    trials: tuple[Trial, ...]

    @property
    def words(self) -> str:
        """The settings, for people."""
        return ", ".join([f"threads {self.threads}", *(f"{name} {value}" for name, value in self.options.items())])


class _Timing(NamedTuple):
    ttft_ms: float
    tpot_ms: float


def tune(
    bundle: Path,
    engine: "Engine",
    options: Tuning,
    *,
    windows: "Ids",
    max_threads: int,
    num_cores: int,
    processor: str,
    report: Report = silent,
) -> Tuned:
    """Searches threads and the engine's settings for the least time of a request that writes as much as it reads.

    Args:
        options: how long and how often.
        windows: [num_windows, length] token ids of text, on which answers are compared.
        max_threads: the most to try.
        num_cores: that this process may use, to be kept with what is found.
        processor: its name, likewise.

    Raises:
        ValueError: the engine has no settings to try, or the model is too short for such a request.
    """
    if engine.engine not in SETTINGS:
        raise ValueError(
            f"Settings are searched for the engines {', '.join(SETTINGS)}; got {engine.engine!r}, whose compiler "
            "searches its kernels itself."
        )
    best, threads = engine, max_threads
    trials: list[Trial] = []
    counts = sorted({1, *(n for n in (2, 4, 8, 16, 32, 64) if n < max_threads), max_threads}, reverse=True)
    steps = [("threads", counts), *((name, _runnable(engine, name)) for name in SETTINGS[engine.engine])]
    for number, (setting, values) in enumerate(steps):
        first = threads if setting == "threads" else getattr(best, setting)
        ordered: list[Any] = [first, *(value for value in values if value != first)]
        choices = [
            (best, value) if setting == "threads" else (best.model_copy(update={setting: value}), threads)
            for value in ordered
        ]
        with _sessions(bundle, choices) as sessions:
            timings = _time_interleaved(sessions, options)
            times = [t.ttft_ms + (options.prompt_tokens - 1) * t.tpot_ms for t in timings]
            winner, refused = _fastest(sessions, times, windows)
        trials += [
            Trial(setting=setting, value=value, ttft_ms=t.ttft_ms, tpot_ms=t.tpot_ms, refused=refused.get(index))
            for index, (value, t) in enumerate(zip(ordered, timings, strict=True))
        ]
        best, threads = choices[winner]
        report(number + 1, len(steps), {})
    changed = {name: str(getattr(best, name)) for name in SETTINGS[engine.engine]}
    return Tuned(
        processor=processor,
        num_cores=num_cores,
        threads=threads,
        options={name: value for name, value in changed.items() if value != getattr(engine, name)},
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        trials=tuple(trials),
    )


def _runnable(engine: "Engine", option: str) -> tuple[str, ...]:
    """The values of an option that this machine can run; another would be timed as something else, then refused."""
    values = alternatives(engine, option)
    return tuple(value for value in values if engine.model_copy(update={option: value}).cannot_run() is None)


def _fastest(sessions: "list[Session]", times: list[float], windows: "Ids") -> tuple[int, dict[int, str]]:
    """The fastest whose answers are those of the first, which stays unless another gains more than noise; and why not.

    Answers take longer to compare than times to measure, so only those are that would win.
    """
    refused: dict[int, str] = {}
    for index in np.argsort(times).tolist():
        if index == 0 or times[index] >= (1 - MIN_GAIN) * times[0]:
            break
        why = _refusal(sessions[index], sessions[0], windows)
        if why is None:
            return index, refused
        refused[index] = why
    return 0, refused


@contextmanager
def _sessions(bundle: Path, choices: "list[tuple[Engine, int]]") -> "Iterator[list[Session]]":
    with ExitStack() as stack:
        sessions: list[Session] = []
        for engine, threads in choices:
            sessions.append(engine.load(bundle, threads=threads))
            stack.callback(sessions[-1].close)
        yield sessions


def _time_interleaved(sessions: "list[Session]", options: Tuning) -> list[_Timing]:
    """Medians over rounds; every round has its own prompt, and the first warms up."""
    prompt_tokens, new_tokens = options.prompt_tokens, options.new_tokens
    longest = min(session.max_length for session in sessions)
    if prompt_tokens + new_tokens > longest:
        raise ValueError(
            f"Tuning reads {prompt_tokens} tokens and writes {new_tokens}; the model takes {longest} in all. Ask for "
            "fewer."
        )
    random = np.random.default_rng(0)
    found: list[list[_Timing]] = [[] for _ in sessions]
    for round_number in range(options.num_rounds + 1):
        prompt = random.integers(0, sessions[0].vocab_size, (1, prompt_tokens))
        for session, timings in zip(sessions, found, strict=True):
            timing = _time(session, prompt, new_tokens)
            if round_number:
                timings.append(timing)
    return [_Timing(median(t.ttft_ms for t in each), median(t.tpot_ms for t in each)) for each in found]


def _time(session: "Session", prompt: "Ids", new_tokens: int) -> _Timing:
    first_s, *_, last_s = generate_timed(session, prompt, new_tokens)
    return _Timing(1000 * first_s, 1000 * (last_s - first_s) / (new_tokens - 1))


def _refusal(session: "Session", original: "Session", windows: "Ids") -> str | None:
    """Why a session's answers are not those of the original."""
    return ROUNDED.broken_by(compare(session, original, windows))
