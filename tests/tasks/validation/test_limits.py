import pytest
from pydantic import ValidationError

from tasks.validation.latency import Speed
from tasks.validation.limits import Goal, Limits, unmeasurable
from tasks.validation.metrics import KNOWN, SIZE_METRICS, by_name
from tasks.validation.quality import Quality


def problems(limits: dict, *, speed: Speed | None = Speed()) -> list[str]:  # noqa: B008 it is frozen
    metrics = [*Quality().metrics(), *(speed.metrics() if speed else ()), *SIZE_METRICS]
    return unmeasurable(Limits.model_validate(limits), by_name(metrics))


def test_every_kind_of_goal_is_read_and_one_metric_may_have_several():
    limits = Limits.model_validate(
        {
            "perplexity": {"max_degradation_percent": 3},
            "throughput_tokens_per_s": [{"min": 50}, {"min": 200, "batch_size": 8}],
            "never_slower_than": ["original"],
        }
    )
    assert list(limits.goals()) == [
        ("perplexity", Goal(max_degradation_percent=3)),
        ("throughput_tokens_per_s", Goal(min=50)),
        ("throughput_tokens_per_s", Goal(min=200, batch_size=8)),
    ]
    assert limits.metrics() == ("perplexity", "throughput_tokens_per_s", "speedup_over_original")
    assert Limits.model_validate_json(limits.model_dump_json()) == limits
    assert Limits().metrics() == ()


def test_each_metric_that_is_measured_can_be_limited_and_only_those():
    for name, metric in KNOWN.items():
        if "*" in name:
            continue  # of a task, whose name the recipe gives
        bound = "max" if metric.better == "lower" else "min"
        if any(word in metric.option for word in ("load", "price", "encoder")):  # what these options do not ask for
            assert f"limits.{name} needs {metric.option}" in problems({name: {bound: 0.5}})[0]
            continue
        assert problems({name: {bound: 0.5}}) == []
        without_speed = problems({name: {bound: 0.5}}, speed=None)
        assert bool(without_speed) == (metric.option.startswith("validation.speed")), name


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"throughput_tokens_per_s": {"min": 1, "batch_size": 4}}, "got 4, and those of validation.speed are 1, 8"),
        ({"tpot_ms": {"max": 1, "percentile": "p99"}}, "p99: needs at least 1000 requests; speed.num_blocks is 8"),
        ({"tpot_ms": {"max": 1, "percentile": "p90"}}, "p90: needs at least 36 requests; speed.num_blocks is 8"),
        ({"tpot_ms": {"min": 1}}, "lower is better, so bound it by `max`, not by `min`"),
        ({"top1_agreement": {"min": 95}}, "must lie in 0..1; got 95"),
        ({"top1_agreement": {"max_degradation": 0.1}}, "the original has no top-1 agreement to compare with"),
        ({"size_mib": {"max": 1, "batch_size": 8}}, "size_mib does not depend on a batch size"),
        ({"perplexity": {"max": 1, "percentile": "p90"}}, "perplexity has no percentiles"),
        ({"size_mib": {"max": 1, "max_gain_percent": 8}}, "`max_gain_percent` is of quality"),
        ({"perplexity": []}, "limits.perplexity lists no limit"),
        ({"energy_j_per_token": {"min": 1}}, "lower is better, so bound it by `max`"),
        ({"energy_j_per_token": {"max": 1, "batch_size": 8}}, "got 8, and those of validation.speed are 1"),
        ({"peak_gpu_memory_mib": {"max_degradation": 1}}, "the original has no peak GPU memory to compare with"),
    ],
)
def test_what_means_nothing_for_a_metric_is_refused_in_a_sentence(limits, message):
    (problem,) = problems(limits)
    assert message in problem


def test_enough_requests_allow_the_percentile():
    assert problems({"tpot_ms": {"max": 1, "percentile": "p90"}}, speed=Speed(num_blocks=36)) == []


def test_a_limit_without_a_bound_or_with_an_unknown_one_is_refused():
    with pytest.raises(ValidationError, match="a limit needs a bound: max, min, max_degradation"):
        Limits.model_validate({"perplexity": {}})
    with pytest.raises(ValidationError, match="max_increase_percent"):
        Limits.model_validate({"perplexity": {"max_increase_percent": 1}})
