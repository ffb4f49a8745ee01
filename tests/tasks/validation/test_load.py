import pandas as pd
import pytest
from pydantic import ValidationError

from tasks.validation import load
from tasks.validation.arrivals import Fixed, Served
from tasks.validation.latency import Subject
from tasks.validation.load import (
    Level,
    Load,
    Requests,
    Sweep,
    Within,
    goodput,
    measure_load,
    measured,
    summarize,
    summarize_level,
)
from tasks.validation.load_worker import LoadWorker
from tasks.validation.statistics import Estimate, exactly

OPTIONS = Load(
    users=(2,),
    requests_per_s=(2.0,),
    prompt_tokens=Fixed(tokens=8),
    new_tokens=Fixed(tokens=3),
    seconds_per_level=10,
    max_concurrent=2,
    within=Within(latency_ms=500, fraction=0.75),
)


def served(due_s: float, first_s: float, end_s: float, *, finished: bool = True) -> Served:
    chosen = [first_s, (first_s + end_s) / 2, end_s] if finished else [first_s]
    return Served(due_s, 3, started_s=due_s, chosen_s=chosen, ended_s=end_s)


def test_figures_of_a_level_count_from_when_requests_were_due():
    requests = [served(k, k + 0.1, k + 0.3) for k in range(8)] + [
        served(8, 8.7, 9),
        served(9, 10.2, 20, finished=False),
    ]
    level = summarize_level(requests, OPTIONS, users=None, rate=1.0)
    assert (level.num_requests, level.num_unfinished, level.num_given_up) == (10, 1, 1)
    assert level.requests_per_s.value == pytest.approx(0.9)
    assert level.tokens_per_s.value == pytest.approx(2.7)
    assert level.ttft_ms.num == 9  # without the first tenth
    assert level.ttft_ms.p50.value == pytest.approx(100)
    assert level.tpot_ms.p50.value == pytest.approx(100)
    assert level.latency_ms.p50.value == pytest.approx(300)
    assert level.latency_ms.p99.value > 9000  # what was given up counts with the time until then
    assert level.fraction_within.value == pytest.approx(7 / 9)
    assert level.goodput_requests_per_s == pytest.approx(0.8)
    assert level.queue_growth_per_s == pytest.approx(0.1)
    assert not level.saturated


def test_a_level_is_saturated_when_it_ends_with_a_queue():
    in_time = [served(0, 0.1, 0.3)] * 17
    late = [served(9, 11, 12)]
    assert not summarize_level(
        [*in_time, *late * 2], OPTIONS, users=None, rate=2.0
    ).saturated  # two are served at a time
    assert summarize_level([*in_time, *late * 3], OPTIONS, users=None, rate=2.0).saturated
    assert not summarize_level(in_time + late * 3, OPTIONS, users=20, rate=None).saturated


def test_a_level_without_requests_has_no_percentiles():
    level = summarize_level([], OPTIONS, users=None, rate=0.01)
    assert level.latency_ms is level.fraction_within is None
    assert level.requests_per_s.value == 0


def at(
    rate: float | None, within: Estimate | None = None, *, saturated: bool = False, users: int | None = None
) -> Level:
    base = summarize_level([served(0, 0.1, 0.25)], OPTIONS, users=users, rate=rate)
    return base.model_copy(update={"fraction_within": within, "saturated": saturated})


def test_goodput_is_the_largest_rate_up_to_which_all_hold():
    levels = [
        at(4.0, Estimate(value=0.8, low=0.7, high=0.88)),
        at(1.0, Estimate(value=1.0, low=0.95, high=1.0)),
        at(2.0, Estimate(value=0.92, low=0.85, high=0.96)),
        at(8.0, Estimate(value=0.95, low=0.91, high=0.99)),  # chance: a smaller rate did not hold
        at(None, exactly(1.0), users=1),
    ]
    assert goodput(levels, 0.9) == Estimate(value=2.0, low=1.0, high=4.0, num=4)
    assert goodput(levels[1:2], 0.9).high is None
    assert goodput(levels[:1], 0.9).value == 0


def test_a_sweep_raises_the_rate_until_the_engine_is_saturated_and_then_steps_back():
    options = OPTIONS.model_copy(update={"users": (), "requests_per_s": Sweep(factor=2, max_levels=5)})
    taken, asked = [], []
    for users, rate in load._levels(options, taken):
        asked.append((users, rate))
        taken.append(at(rate, users=users, saturated=rate is not None and rate > 7))
    # alone, a request takes 0.25 s: half of 4 requests/s
    assert asked[:4] == [(1, None), (None, pytest.approx(2)), (None, pytest.approx(4)), (None, pytest.approx(8))]
    assert asked[4:] == [(None, pytest.approx(4 * 2**0.5))]
    never = []
    for users, rate in load._levels(options, never):
        never.append(at(rate, users=users))
    assert [level.offered_requests_per_s for level in never[1:]] == pytest.approx([2, 4, 8, 16])


def test_what_all_levels_say_together():
    levels = [at(1.0, exactly(1.0)), at(2.0, exactly(0.5), saturated=True), at(4.0, exactly(0.1), saturated=True)]
    found = summarize(levels, OPTIONS, load_s=1.0, peak_memory_mib=2.0)
    assert found.saturated_at_requests_per_s == 2.0
    assert found.goodput_requests_per_s.value == 1.0
    assert found.capacity_requests_per_s.value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": [4, 1]}, "users must be above 0 and ascend; got \\[4, 1\\]"),
        ({"requests_per_s": [0, 1]}, "requests_per_s must be above 0"),
        ({"users": [], "requests_per_s": []}, "needs users or requests_per_s"),
        ({"requests_per_s": [], "within": {"ttft_ms": 1}}, "`within` is for an open loop"),
        ({"within": {"fraction": 0.5}}, "needs ttft_ms, tpot_ms or latency_ms"),
    ],
)
def test_options_that_say_nothing_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Load.model_validate(options)


def test_engines_are_asked_the_same(small_data):
    source = Requests(small_data, OPTIONS)
    assert source.draw(3, [1, 2]) == source.draw(3, [1, 2])
    assert source.draw(3, [1, 2]) != source.draw(3, [1, 3])
    assert {len(request.prompt) for request in source.draw(9, [0])} == {8}
    with pytest.raises(ValueError, match="need at least 600 evaluation tokens; got 288"):
        Requests(small_data, OPTIONS.model_copy(update={"prompt_tokens": Fixed(tokens=300)}))


@pytest.mark.slow
def test_engines_are_put_under_load_and_one_that_dies_is_named(tiny_bundle, small_data, tmp_path, monkeypatch):
    class Dying(LoadWorker):
        def run(self, *arguments: object, **options: object) -> list[Served]:
            if self.name == "dies" and options["users"] is None and options["window_s"]:
                self._process.kill()
            return super().run(*arguments, **options)

    monkeypatch.setattr(load, "LoadWorker", Dying)
    told = []
    options = OPTIONS.model_copy(update={"seconds_per_level": 2.0, "requests_per_s": (4.0,)})
    summary = measure_load(
        subjects=[Subject(name=name, bundle=tiny_bundle) for name in ("good", "dies")],
        data=small_data,
        options=options,
        threads=1,
        out=tmp_path,
        report=lambda *args: told.append(args),
    )
    assert "SIGKILL" in summary.failed["dies"]
    closed, opened = summary.subjects["good"].levels
    assert (closed.users, opened.offered_requests_per_s) == (2, 4.0)
    assert closed.requests_per_s.value > 0
    assert closed.tokens_per_s.value == pytest.approx(3 * closed.requests_per_s.value, rel=0.2)
    assert opened.num_given_up == 0
    assert opened.latency_ms.p50.value >= opened.ttft_ms.p50.value > 0
    assert summary.subjects["good"].peak_memory_mib > 20
    assert measured(summary, "good").keys() == {
        "capacity_requests_per_s",
        "capacity_tokens_per_s",
        "goodput_requests_per_s",
    }
    assert measured(summary, "dies") == {}
    rows = pd.read_parquet(tmp_path / "requests.parquet")
    assert set(rows.subject) == {"good", "dies"}
    assert (rows[rows.level == 1].chosen_s.map(len) == 3).all()
    assert told[-1][0] == told[-1][1]
