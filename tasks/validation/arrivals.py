"""Requests as users make them: how long they are, when they come, and how they reach an engine.

Closed loop: a number of users, each of whom asks again when the last answer is complete, so that the engine sets the
pace. Open loop: requests come at random (a Poisson process) whether or not the engine keeps up, as they do from many
users who do not know of each other. Every time is counted from when a request was *due*, not from when it was taken: an
engine that falls behind is charged for those that wait (no coordinated omission; Tene, How NOT to Measure Latency,
2013).
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator


class Fixed(BaseModel, frozen=True, extra="forbid"):
    """The same length for all."""

    distribution: Literal["fixed"] = "fixed"
    tokens: int = Field(ge=1)

    @property
    def longest(self) -> int:
        """Most tokens that are drawn."""
        return self.tokens


class LogNormal(BaseModel, frozen=True, extra="forbid"):
    """Lengths as those of chats: few are many times the median."""

    distribution: Literal["lognormal"] = "lognormal"
    median: int = Field(ge=1, description="Tokens.")
    sigma: float = Field(0.6, gt=0, le=3, description="Standard deviation of the logarithm; 68 % within e^±sigma.")
    max: int = Field(ge=1, description="Longer ones are cut to this.")

    @model_validator(mode="after")
    def _median_is_not_cut(self) -> "LogNormal":
        if self.max < self.median:
            raise ValueError(f"max must be at least the median; got {self.max} and {self.median}.")
        return self

    @property
    def longest(self) -> int:
        """Most tokens that are drawn."""
        return self.max


Length = Annotated[Fixed | LogNormal, Field(discriminator="distribution")]


def draw_lengths(length: Fixed | LogNormal, num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[num] int64, at least 1."""
    if isinstance(length, Fixed):
        return np.full(num, length.tokens, np.int64)
    drawn = length.median * np.exp(length.sigma * rng.standard_normal(num))
    return np.asarray(np.clip(np.rint(drawn), 1, length.max), np.int64)


def poisson_arrivals(requests_per_s: float, window_s: float, rng: np.random.Generator) -> list[float]:
    """Seconds in [0, window_s), ascending, with exponential gaps of mean 1 / requests_per_s."""
    arrivals: list[float] = []
    at_s = float(rng.exponential(1 / requests_per_s))
    while at_s < window_s:
        arrivals.append(at_s)
        at_s += float(rng.exponential(1 / requests_per_s))
    return arrivals


@dataclass(frozen=True)
class Request:
    """One prompt, and how many tokens are generated after it."""

    prompt: Sequence[int]
    new_tokens: int


@dataclass
class Served:
    """What became of one request; seconds since the level began."""

    due_s: float
    new_tokens: int
    """As asked for."""
    started_s: float = 0.0
    chosen_s: list[float] = field(default_factory=list)
    """When each token came."""
    ended_s: float = 0.0
    """Completed, or given up."""

    @property
    def finished(self) -> bool:
        """Whether all tokens came."""
        return len(self.chosen_s) == self.new_tokens


Serve = Callable[[Sequence[int], int, Callable[[], bool]], None]
"""serve(prompt, new_tokens, on_token): generates, calls `on_token` for each token, and ends early when that is True."""


def open_loop(
    serve: Serve, requests: Sequence[tuple[float, Request]], *, window_s: float, drain_s: float, max_concurrent: int
) -> list[Served]:
    """What became of requests that are due at given times.

    Args:
        serve: may be called from several threads.
        requests: seconds since the start at which each is due, ascending, and the request.
        window_s: in which they are due.
        drain_s: what is not complete so long after the window is given up.
        max_concurrent: requests that are served at a time; others wait in the order they came.
    """
    desk = _Desk(serve, max_concurrent)
    for due_s, request in requests:
        desk.sleep_until(due_s)
        desk.submit(due_s, request)
    desk.sleep_until(window_s)
    return desk.close(window_s + drain_s)


def closed_loop(
    serve: Serve, requests: Iterator[Request], *, users: int, window_s: float, drain_s: float, max_concurrent: int
) -> list[Served]:
    """What became of the requests of users who ask again as soon as they are answered, until the window ends.

    Args:
        serve: may be called from several threads.
        requests: as many as are needed.
        users: that ask at a time.
        window_s: no request begins after it.
        drain_s: what is not complete so long after the window is given up.
        max_concurrent: requests that are served at a time; others wait in the order they came.
    """
    desk = _Desk(serve, max_concurrent)
    desk.next_request = lambda: next(requests)
    for _ in range(users):
        desk.submit(0.0, next(requests))
    desk.sleep_until(window_s)
    return desk.close(window_s + drain_s)


class _Desk:
    """Takes requests in the order they come, and has so many of them served at a time."""

    def __init__(self, serve: Serve, max_concurrent: int) -> None:
        self.next_request: Callable[[], Request] | None = None
        self._serve = serve
        self._waiting: SimpleQueue[tuple[float, Request] | None] = SimpleQueue()
        self._served: list[Served] = []
        self._abandoned = threading.Event()
        self._errors: list[Exception] = []
        self._lock = threading.Lock()
        self._closing = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(max_concurrent)]
        self._began_at = time.perf_counter()
        for thread in self._threads:
            thread.start()

    def now_s(self) -> float:
        return time.perf_counter() - self._began_at

    def sleep_until(self, at_s: float) -> None:
        """Or until a request failed."""
        self._abandoned.wait(max(0.0, at_s - self.now_s()))

    def submit(self, due_s: float, request: Request) -> None:
        self._waiting.put((due_s, request))

    def close(self, give_up_at_s: float) -> list[Served]:
        """What became of all requests, by when they were due, once none is left."""
        with self._lock:
            self._closing = True
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(max(0.0, give_up_at_s - self.now_s()))
        self._abandoned.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return sorted(self._served, key=lambda served: served.due_s)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            due_s, request = item
            served = Served(due_s, request.new_tokens, started_s=self.now_s())
            if not self._abandoned.is_set():
                self._serve_one(request, served)
            served.ended_s = served.chosen_s[-1] if served.finished else self.now_s()
            self._served.append(served)
            with self._lock:
                if self.next_request and not self._closing:
                    self.submit(self.now_s(), self.next_request())

    def _serve_one(self, request: Request, served: Served) -> None:
        def on_token() -> bool:
            served.chosen_s.append(self.now_s())
            return self._abandoned.is_set()

        try:
            self._serve(request.prompt, request.new_tokens, on_token)
        except Exception as error:  # noqa: BLE001  raised again by `close`
            self._errors.append(error)
            self._abandoned.set()


def batch_means(values: Sequence[float], num_batches: int = 10) -> NDArray[np.float64]:
    """[num_batches, n] of values in order of time, as blocks to resample, the remainder at the start left out.

    Requests that follow each other wait in the same queue, so they are resampled together (batch means; Law, Simulation
    Modeling and Analysis, section 9.5.3). Fewer than two for each batch: every value is a block.
    """
    per_batch = len(values) // num_batches
    if per_batch < 2:
        return np.asarray(values, np.float64)[:, None]
    kept = list(values)[len(values) - num_batches * per_batch :]
    return np.asarray(kept, np.float64).reshape(num_batches, per_batch)
