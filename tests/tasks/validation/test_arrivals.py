import threading
import time
from itertools import repeat

import numpy as np
import pytest
from pydantic import ValidationError

from tasks.validation.arrivals import (
    Fixed,
    LogNormal,
    Request,
    batch_means,
    closed_loop,
    draw_lengths,
    open_loop,
    poisson_arrivals,
)
from tasks.validation.statistics import percentiles


class OneAfterTheOther:
    """An engine that takes the same time for every request, one at a time; remembers how long it really took."""

    def __init__(self, service_s: float) -> None:
        self.service_s, self.took_s = service_s, []
        self._lock = threading.Lock()

    def __call__(self, prompt, new_tokens, on_token) -> None:
        with self._lock:
            started_at = time.perf_counter()
            for _ in range(new_tokens):
                time.sleep(self.service_s / new_tokens)
                if on_token():
                    break
            self.took_s.append(time.perf_counter() - started_at)


def test_lengths_follow_their_distribution_and_their_seed():
    length = LogNormal(median=100, sigma=0.5, max=300)
    drawn = draw_lengths(length, 20_000, np.random.default_rng(0))
    assert np.median(drawn) == pytest.approx(100, rel=0.02)
    assert np.quantile(drawn, 0.8413) == pytest.approx(100 * np.exp(0.5), rel=0.03)  # one sigma above
    assert drawn.max() == 300
    assert drawn.min() >= 1
    assert (drawn == draw_lengths(length, 20_000, np.random.default_rng(0))).all()
    assert set(draw_lengths(Fixed(tokens=7), 5, np.random.default_rng(0))) == {7}
    with pytest.raises(ValidationError, match="at least the median; got 5 and 10"):
        LogNormal(median=10, max=5)


def test_arrivals_are_poisson():
    counts = [len(poisson_arrivals(4.0, 10.0, np.random.default_rng(seed))) for seed in range(2000)]
    assert np.mean(counts) == pytest.approx(40, rel=0.02)
    assert np.var(counts) == pytest.approx(40, rel=0.1)
    arrivals = poisson_arrivals(4.0, 1000.0, np.random.default_rng(0))
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] < 1000
    gaps = np.diff(arrivals)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1)  # as an exponential's


def test_a_constant_service_time_waits_as_an_m_d_1_queue_does():
    """Pollaczek and Khinchine: mean waiting is λ E[S²] / (2 (1 - λ E[S])), with the service times as they were."""
    rate, window_s = 35.0, 12.0
    serve = OneAfterTheOther(0.02)
    due = poisson_arrivals(rate, window_s, np.random.default_rng(1))
    served = open_loop(
        serve, [(at, Request((1,), 1)) for at in due], window_s=window_s, drain_s=10, max_concurrent=len(due)
    )
    assert len(served) == len(due)
    assert all(each.finished for each in served)
    service = np.array(serve.took_s)
    waiting = np.array([each.ended_s - each.due_s for each in served]) - service
    arrived_per_s = len(due) / window_s
    utilization = arrived_per_s * service.mean()
    assert 0.6 < utilization < 0.95
    expected = arrived_per_s * np.mean(service**2) / (2 * (1 - utilization))
    blocks = batch_means(list(waiting)).mean(axis=1)
    half_width = 2.262 * blocks.std(ddof=1) / np.sqrt(len(blocks))  # Student's t of nine degrees
    assert abs(blocks.mean() - expected) < half_width + 0.002  # what a thread needs to wake up


def test_what_an_engine_does_not_take_yet_counts_from_when_it_was_due():
    serve = OneAfterTheOther(0.05)
    served = open_loop(serve, [(0.0, Request((1,), 1))] * 4, window_s=0.01, drain_s=5, max_concurrent=1)
    latencies = [each.ended_s - each.due_s for each in served]
    assert latencies == sorted(latencies)
    assert latencies[3] >= 4 * 0.05
    assert served[3].started_s >= 3 * 0.05


def test_what_is_not_complete_in_time_is_given_up():
    started_at = time.perf_counter()
    serve = OneAfterTheOther(1.0)
    served = open_loop(serve, [(0.0, Request((1,), 20))] * 30, window_s=0.1, drain_s=0.2, max_concurrent=2)
    assert time.perf_counter() - started_at < 5
    assert len(served) == 30
    assert not any(each.finished for each in served)
    assert all(each.ended_s >= 0.3 for each in served)


def test_users_ask_again_when_they_are_answered():
    seen, most = set(), []

    def serve(prompt, new_tokens, on_token):
        seen.add(threading.get_ident())
        most.append(len(seen))
        time.sleep(0.02)
        on_token()
        seen.discard(threading.get_ident())

    served = closed_loop(serve, repeat(Request((1,), 1)), users=3, window_s=0.5, drain_s=5, max_concurrent=8)
    assert max(most) == 3
    assert all(each.finished for each in served)
    assert 9 <= len(served) <= 3 * 0.5 / 0.02 + 3
    assert max(each.due_s for each in served) <= 0.55


def test_an_engine_that_fails_ends_the_level():
    def serve(prompt, new_tokens, on_token):
        raise RuntimeError("broken graph")

    started_at = time.perf_counter()
    with pytest.raises(RuntimeError, match="broken graph"):
        closed_loop(serve, repeat(Request((1,), 1)), users=2, window_s=60, drain_s=60, max_concurrent=2)
    assert time.perf_counter() - started_at < 20


def test_requests_are_resampled_by_batches_in_order_of_time():
    assert batch_means(range(23), 10).tolist() == [[3 + 2 * k, 4 + 2 * k] for k in range(10)]
    assert batch_means([1, 2, 3]).shape == (3, 1)
    assert percentiles(batch_means(range(100)), seed=0).num == 100
