import pytest
from pydantic import ValidationError

from tasks.validation.latency import Control, Speed, SpeedSummary, SubjectSpeed, Throughput
from tasks.validation.limits import Limits, conclude, judge, unmeasurable
from tasks.validation.quality import QualitySummary
from tasks.validation.statistics import Estimate, Percentiles, exactly


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high)


HALF_A_PERCENT = exactly(0.5)
NO_CHANGE = exactly(1.0)


def quality(increase: Estimate = HALF_A_PERCENT) -> QualitySummary:
    return QualitySummary(
        perplexity=exactly(32.1),
        perplexity_increase_percent=increase,
        original_perplexity=32.0,
        bits_per_byte=exactly(1.0),
        top1_agreement=estimate(0.97, 0.965, 0.975),
        kl_nats=estimate(0.004, 0.003, 0.005),
        window=512,
        num_windows=40,
        num_documents=20,
        num_tokens=20440,
        num_kl_positions=512,
    )


def speed(
    *, ratios: dict[int, Estimate], num: int = 10, noisy: bool = False, control: Estimate = NO_CHANGE
) -> SpeedSummary:
    def times(value: float) -> Percentiles:
        near = estimate(value, 0.95 * value, 1.05 * value)
        return Percentiles(num=num, p50=near, p90=near, p99=near, p99_supported=num >= 1000)

    subject = SubjectSpeed(
        ttft_ms=times(100.0),
        tpot_ms=times(10.0),
        inter_token_ms=times(10.0),
        ttft_ratio_to_original=exactly(0.7),
        tpot_ratio_to_original=exactly(0.4),
        throughput={
            size: Throughput(num=num, tokens_per_s=exactly(90.0), ratio_to_original=ratio)
            for size, ratio in ratios.items()
        },
        load_s=1.0,
        peak_memory_mib=512.0,
        size_bytes=140 * 2**20,
        idle_cpu_percent=0.1,
        group=0,
    )
    return SpeedSummary(
        subjects={"int8": subject},
        control=Control(ttft_ratio=exactly(1.0), tpot_ratio=control, throughput_ratio=exactly(1.0)),
        noisy=noisy,
        noise="",
        prompt_tokens=128,
        new_tokens=64,
        threads=2,
        num_blocks=num,
        num_groups=1,
        elapsed_s=1.0,
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.9, "ACCEPT"), (0.1, 1.0, "ACCEPT"), (0.5, 1.5, "INCONCLUSIVE"), (1.1, 1.5, "REJECT")],
)
def test_only_a_whole_interval_on_one_side_decides(low, high, verdict):
    limits = Limits.model_validate({"perplexity": {"max_increase_percent": 1.0}})
    increase = estimate((low + high) / 2, low, high)
    judgement = judge(limits, "int8", quality=quality(increase), speed=None, size_bytes=None)
    assert judgement.verdict == verdict
    (check,) = judgement.checks
    assert (check.limit, check.low, check.high) == (1.0, low, high)


@pytest.mark.parametrize(("minimum", "verdict"), [(0.96, "ACCEPT"), (0.97, "INCONCLUSIVE"), (0.98, "REJECT")])
def test_lower_bounds_are_judged_the_other_way_round(minimum, verdict):
    limits = Limits.model_validate({"top1_agreement": {"min": minimum}})
    assert judge(limits, "int8", quality=quality(), speed=None, size_bytes=None).verdict == verdict


def test_one_broken_limit_rejects_whatever_else_is_kept_or_open():
    limits = Limits.model_validate(
        {"perplexity": {"max_increase_percent": 1}, "top1_agreement": {"min": 0.97}, "size_mib": {"max": 100}}
    )
    judgement = judge(limits, "int8", quality=quality(), speed=None, size_bytes=140 * 2**20)
    assert [check.verdict for check in judgement.checks] == ["ACCEPT", "INCONCLUSIVE", "REJECT"]
    assert judgement.verdict == "REJECT"
    assert "140 MiB breaks the limit of at most 100 MiB" in judgement.sentence


def test_never_slower_is_checked_at_every_batch_size():
    limits = Limits(never_slower_than="original")
    measured = speed(ratios={1: estimate(2.4, 2.2, 2.6), 8: estimate(0.8, 0.75, 0.85)})
    judgement = judge(limits, "int8", quality=None, speed=measured, size_bytes=None)
    assert [check.verdict for check in judgement.checks] == ["ACCEPT", "REJECT"]
    assert "batch size 8 of 0.8×" in judgement.sentence


def test_never_slower_than_an_engine_that_was_not_measured_is_inconclusive():
    limits = Limits(never_slower_than="unquantized")
    measured = speed(ratios={1: estimate(2.4, 2.2, 2.6)})
    judgement = judge(limits, "int8", quality=None, speed=measured, size_bytes=None)
    assert judgement.verdict == "INCONCLUSIVE"
    assert "was not measured" in judgement.sentence


def test_a_noisy_machine_widens_the_intervals_of_speed():
    limits = Limits(never_slower_than="original")
    ratios = {1: estimate(1.1, 1.05, 1.15)}
    quiet = judge(limits, "int8", quality=None, speed=speed(ratios=ratios), size_bytes=None)
    loud = speed(ratios=ratios, noisy=True, control=estimate(0.9, 0.85, 0.95))
    noisy = judge(limits, "int8", quality=None, speed=loud, size_bytes=None)
    assert (quiet.verdict, noisy.verdict) == ("ACCEPT", "INCONCLUSIVE")
    assert noisy.checks[0].low == pytest.approx(1.05 * 0.85)
    assert "because the machine was noisy" in noisy.sentence


def test_a_p99_of_few_requests_is_never_judged():
    limits = Limits.model_validate({"tpot_ms": {"max": 1.0, "percentile": "p99"}})
    few = judge(limits, "int8", quality=None, speed=speed(ratios={}), size_bytes=None)
    many = judge(limits, "int8", quality=None, speed=speed(ratios={}, num=1000), size_bytes=None)
    assert (few.verdict, many.verdict) == ("INCONCLUSIVE", "REJECT")
    assert "1000 requests; 10 were timed" in few.sentence


def test_latency_throughput_and_memory_are_judged_where_they_were_measured():
    limits = Limits.model_validate(
        {
            "ttft_ms": {"max": 106},
            "tpot_ms": {"max": 10.2},
            "throughput_tokens_per_s": {"min": 91, "batch_size": 8},
            "peak_memory_mib": {"max": 512},
            "size_bytes": {"max": 5},
        }
    )
    judgement = judge(limits, "int8", quality=None, speed=speed(ratios={8: exactly(1.0)}), size_bytes=4)
    verdicts = [check.verdict for check in judgement.checks]
    assert verdicts == ["ACCEPT", "INCONCLUSIVE", "REJECT", "ACCEPT", "ACCEPT"]


def test_what_could_not_run_here_is_inconclusive_not_accepted():
    limits = Limits.model_validate({"kl": {"max": 1}, "ttft_ms": {"max": 1e6}, "size_mib": {"max": 1000}})
    judgement = judge(limits, "built, not run", quality=None, speed=None, size_bytes=1)
    assert judgement.verdict == "INCONCLUSIVE"
    assert [check.verdict for check in judgement.checks] == ["INCONCLUSIVE", "INCONCLUSIVE", "ACCEPT"]


def test_without_limits_nothing_is_accepted():
    assert conclude([]).verdict == "INCONCLUSIVE"
    assert "No limits were set" in conclude([]).sentence
    assert Limits().metrics() == ()


def test_limits_on_what_is_not_measured_are_named_before_anything_runs():
    limits = Limits.model_validate(
        {
            "perplexity": {"max_increase_percent": 1},
            "throughput_tokens_per_s": {"min": 1, "batch_size": 4},
            "tpot_ms": {"max": 1, "percentile": "p99"},
        }
    )
    assert limits.metrics() == ("perplexity", "tpot_ms", "throughput_tokens_per_s")
    without_speed = unmeasurable(limits, None)
    assert ["tpot_ms" in without_speed[0], "throughput" in without_speed[1]] == [True, True]
    p99, batch = sorted(unmeasurable(limits, Speed()), key=lambda sentence: "batch size" in sentence)
    assert f"speed.num_blocks is {Speed().num_blocks}" in p99
    assert "got 4, but speed.batch_sizes are 1, 8" in batch
    assert unmeasurable(Limits.model_validate({"perplexity": {"max_increase_percent": 1}}), None) == []


def test_every_limit_is_known_to_the_check_for_what_is_measured():
    values = {
        "never_slower_than": "original",
        "perplexity": {"max_increase_percent": 1},
        "top1_agreement": {"min": 0.5},
    }
    for name in Limits.model_fields:
        limit = values.get(name) or ({"min": 1} if name.startswith("throughput") else {"max": 1})
        limits = Limits.model_validate({name: limit})
        named = unmeasurable(limits, None, None)
        assert (named == []) == name.startswith("size"), name


def test_a_misspelt_limit_is_refused():
    with pytest.raises(ValidationError, match="perplexty"):
        Limits.model_validate({"perplexty": {"max": 1}})
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Limits.model_validate({"top1_agreement": {"min": 95}})
