import pytest

from tasks.validation.latency import Control, Speed, SpeedSummary, SubjectSpeed, Throughput
from tasks.validation.latency import measured as measured_speed
from tasks.validation.limits import Limits
from tasks.validation.load import Load
from tasks.validation.measured import PERCENTILES, Measured
from tasks.validation.metrics import SIZE_METRICS, by_name, measured_size
from tasks.validation.quality import Quality, QualitySummary
from tasks.validation.quality import measured as measured_quality
from tasks.validation.statistics import Estimate, Percentiles, exactly
from tasks.validation.verdicts import QUIET, Judgement, conclude, failed, judge

METRICS = by_name([*Quality().metrics(), *Speed(num_blocks=1000).metrics(), *SIZE_METRICS])


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high)


HALF_A_PERCENT = exactly(0.5)
NO_CHANGE = exactly(1.0)


def quality(increase: Estimate = HALF_A_PERCENT) -> QualitySummary:
    return QualitySummary(
        perplexity=exactly(32.1),
        perplexity_increase=exactly(0.32 * increase.value),
        perplexity_increase_percent=increase,
        original_perplexity=32.0,
        bits_per_byte=exactly(1.0),
        bits_per_byte_increase=exactly(0.0),
        original_bits_per_byte=1.0,
        top1_agreement=estimate(0.97, 0.965, 0.975),
        top5_agreement=estimate(0.97, 0.965, 0.975),
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
        return Percentiles(num=num, p50=near, p90=near, p95=near, p99=near, p99_supported=num >= 1000)

    ratios = {1: NO_CHANGE} | ratios
    subject = SubjectSpeed(
        ttft_ms=times(100.0),
        tpot_ms=times(10.0),
        inter_token_ms=times(10.0),
        ttft_ratios_to_original=dict.fromkeys(PERCENTILES, exactly(0.7)),
        tpot_ratios_to_original=dict.fromkeys(PERCENTILES, estimate(0.4, 0.38, 0.42)),
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
        subjects={"int8": subject, "original": subject},
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


def verdict_on(
    limits: dict, *, quality: QualitySummary | None = None, speed: SpeedSummary | None = None, size: int | None = None
) -> Judgement:
    figures = {
        **(measured_quality(quality) if quality else {}),
        **(measured_speed(speed, "int8") if speed else {}),
        **(measured_size(size, 4 * size) if size else {}),
    }
    noise = speed.noise_factors() if speed else QUIET
    return judge(Limits.model_validate(limits), figures, METRICS, noise=noise)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.9, "ACCEPT"), (0.1, 1.0, "ACCEPT"), (0.5, 1.5, "INCONCLUSIVE"), (1.1, 1.5, "REJECT")],
)
def test_only_a_whole_interval_on_one_side_decides(low, high, verdict):
    increase = estimate((low + high) / 2, low, high)
    judgement = verdict_on({"perplexity": {"max_degradation_percent": 1.0}}, quality=quality(increase))
    assert judgement.verdict == verdict
    (check,) = judgement.checks
    assert (check.limit, check.low, check.high) == (1.0, low, high)
    assert check.sentence.startswith("Perplexity increase of")


@pytest.mark.parametrize(("minimum", "verdict"), [(0.96, "ACCEPT"), (0.97, "INCONCLUSIVE"), (0.98, "REJECT")])
def test_lower_bounds_are_judged_the_other_way_round(minimum, verdict):
    assert verdict_on({"top1_agreement": {"min": minimum}}, quality=quality()).verdict == verdict


@pytest.mark.parametrize(("minimum", "verdict"), [(2.0, "ACCEPT"), (2.1, "INCONCLUSIVE")])
def test_an_interval_that_is_open_above_proves_what_its_lower_end_does(minimum, verdict):
    goodput = {"goodput_requests_per_s": Measured(value=Estimate(value=4.0, low=2.0, high=None))}
    limits = Limits.model_validate({"goodput_requests_per_s": {"min": minimum}})
    (check,) = judge(limits, goodput, by_name(Load(within={"ttft_ms": 1}).metrics())).checks
    assert check.verdict == verdict
    assert "(95 % [2, ∞))" in check.sentence


def test_one_broken_limit_rejects_whatever_else_is_kept_or_open():
    limits = {
        "perplexity": {"max_degradation_percent": 1},
        "top1_agreement": {"min": 0.97},
        "size_mib": {"max": 100},
    }
    judgement = verdict_on(limits, quality=quality(), size=140 * 2**20)
    assert [check.verdict for check in judgement.checks] == ["ACCEPT", "INCONCLUSIVE", "REJECT"]
    assert judgement.verdict == "REJECT"
    assert "140 MiB breaks the limit of at most 100 MiB" in judgement.sentence


def test_never_slower_is_checked_at_every_batch_size():
    measured = speed(ratios={1: estimate(2.4, 2.2, 2.6), 8: estimate(0.8, 0.75, 0.85)})
    judgement = verdict_on({"never_slower_than": ["original"]}, speed=measured)
    assert [check.verdict for check in judgement.checks] == ["ACCEPT", "REJECT"]
    assert "batch size 8 of 0.8×" in judgement.sentence


def test_never_slower_than_an_engine_that_was_not_measured_is_inconclusive():
    measured = speed(ratios={1: estimate(2.4, 2.2, 2.6)})
    judgement = verdict_on({"never_slower_than": ["unquantized"]}, speed=measured)
    assert judgement.verdict == "INCONCLUSIVE"
    assert "was not measured" in judgement.sentence


def test_a_noisy_machine_widens_the_intervals_of_speed_alone():
    limits = {"never_slower_than": ["original"]}
    ratios = {1: estimate(1.1, 1.05, 1.15)}
    quiet = verdict_on(limits, speed=speed(ratios=ratios))
    loud = speed(ratios=ratios, noisy=True, control=estimate(0.9, 0.85, 0.95))
    noisy = verdict_on(limits, speed=loud)
    assert (quiet.checks[0].verdict, noisy.checks[0].verdict) == ("ACCEPT", "INCONCLUSIVE")
    assert noisy.checks[0].low == pytest.approx(1.05 * 0.85)
    assert "because the machine was noisy" in noisy.sentence
    memory = verdict_on({"peak_memory_mib": {"max": 512}}, speed=loud)
    assert memory.checks[0].high == 512


def test_noise_widens_a_loss_as_it_does_the_ratio_that_the_loss_stands_for():
    loud = speed(ratios={}, noisy=True, control=estimate(1.0, 0.9, 1.2))
    (check,) = verdict_on({"tpot_ms": {"min_improvement_percent": 50}}, speed=loud).checks
    assert check.metric == "TPOT p50 at batch size 1 decrease"
    assert (check.measured, check.low, check.high) == pytest.approx(
        (60, 100 * (1 - 0.42 * 1.2), 100 * (1 - 0.38 * 0.9))
    )


def test_a_p99_of_few_requests_is_never_judged():
    limits = {"tpot_ms": {"max": 1.0, "percentile": "p99"}}
    few = verdict_on(limits, speed=speed(ratios={}))
    many = verdict_on(limits, speed=speed(ratios={}, num=1000))
    assert (few.verdict, many.verdict) == ("INCONCLUSIVE", "REJECT")
    assert "1000 requests; 10 were timed" in few.sentence


def test_latency_throughput_and_memory_are_judged_where_they_were_measured():
    limits = {
        "ttft_ms": {"max": 106},
        "tpot_ms": {"max": 10.2},
        "throughput_tokens_per_s": {"min": 91, "batch_size": 8},
        "peak_memory_mib": {"max": 512},
        "size_bytes": {"max": 5},
    }
    judgement = verdict_on(limits, speed=speed(ratios={8: exactly(1.0)}), size=4)
    verdicts = [check.verdict for check in judgement.checks]
    assert verdicts == ["ACCEPT", "INCONCLUSIVE", "REJECT", "ACCEPT", "ACCEPT"]


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        ({"min_improvement_percent": 75}, "ACCEPT"),
        ({"min_improvement_percent": 76}, "REJECT"),
        ({"min_improvement": 3}, "ACCEPT"),
        ({"min_improvement": 3.1}, "REJECT"),
        ({"max_degradation": 0}, "ACCEPT"),
    ],
)
def test_improvements_are_required_in_percent_or_in_the_unit(goal, verdict):
    assert verdict_on({"size_mib": goal}, size=2**20).verdict == verdict  # 1 MiB, of 4


def test_what_could_not_run_here_is_inconclusive_not_accepted():
    judgement = verdict_on({"kl_nats": {"max": 1}, "ttft_ms": {"max": 1e6}, "size_mib": {"max": 1000}}, size=1)
    assert judgement.verdict == "INCONCLUSIVE"
    assert [check.verdict for check in judgement.checks] == ["INCONCLUSIVE", "INCONCLUSIVE", "ACCEPT"]


@pytest.mark.parametrize(
    "goal", [{"max": 1e9}, {"max_degradation_percent": 900}, {"max_degradation": 1e9}, {"min_improvement_percent": 1}]
)
def test_a_limit_on_energy_that_the_machine_did_not_tell_is_never_kept(goal):
    (check,) = verdict_on({"energy_j_per_token": goal}, speed=speed(ratios={})).checks
    assert check.verdict == "INCONCLUSIVE"
    assert "was not measured" in check.sentence
    assert not check.can_be_settled


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        ({"max": 2.2}, "ACCEPT"),
        ({"max": 1.8}, "REJECT"),
        ({"max_degradation_percent": 0}, "ACCEPT"),
        ({"min_improvement_percent": 50}, "INCONCLUSIVE"),
        ({"min_improvement": 3}, "REJECT"),
    ],
)
def test_energy_is_judged_where_it_was_measured(goal, verdict):
    told = speed(ratios={})
    its = told.subjects["int8"].model_copy(
        update={"energy_j_per_token": estimate(2, 1.9, 2.1), "energy_ratio_to_original": estimate(0.5, 0.48, 0.52)}
    )
    original = its.model_copy(update={"energy_j_per_token": exactly(4.0)})
    told = told.model_copy(update={"subjects": {"int8": its, "original": original}})
    assert verdict_on({"energy_j_per_token": goal}, speed=told).verdict == verdict


def test_a_figure_that_is_no_number_is_rejected_in_words():
    broken = quality().model_copy(update={"kl_nats": exactly(float("nan"))})
    judgement = verdict_on({"kl_nats": {"max": 1}}, quality=broken)
    assert judgement.verdict == "REJECT"
    assert "KL from the original is nan, no number to judge" in judgement.sentence


@pytest.mark.parametrize(
    ("goal", "high", "verdict"),
    [
        ({"max_degradation_percent": 2}, -2.1, "ANOMALOUS"),
        ({"max_degradation_percent": 2}, -1.9, "ACCEPT"),
        ({"max_degradation_percent": 2, "max_gain_percent": 10}, -2.1, "ACCEPT"),
        ([{"max_degradation_percent": 2, "max_gain_percent": 10}, {"max": 100}], -5.1, "ACCEPT"),
        ([{"max": 100, "max_gain_percent": 10}, {"max_degradation_percent": 2}], -2.1, "ACCEPT"),
        ({"max_degradation_percent": 0}, -2.1, "ACCEPT"),  # no margin is stated, so it is 5 %
        ({"max": 100}, -5.1, "ANOMALOUS"),
        ({"max": 1}, -5.1, "REJECT"),
    ],
)
def test_quality_better_by_more_than_the_margin_is_anomalous(goal, high, verdict):
    judgement = verdict_on({"perplexity": goal}, quality=quality(estimate(high - 1, high - 2, high)))
    assert judgement.verdict == verdict
    assert bool(judgement.anomalies) == (verdict in ("ANOMALOUS", "REJECT"))
    if verdict == "ANOMALOUS":
        assert "set limits.perplexity.max_gain_percent" in judgement.sentence


def test_a_gain_of_unlimited_quality_is_anomalous_too():
    judgement = verdict_on({"size_mib": {"max": 9}}, quality=quality(estimate(-9, -10, -8)), size=2**20)
    assert judgement.verdict == "ANOMALOUS"
    assert "more than 5 % is implausible" in judgement.sentence


def test_a_failure_is_a_rejection_that_says_why():
    judgement = failed("the engine died with SIGSEGV.")
    assert (judgement.verdict, judgement.failure) == ("REJECT", "the engine died with SIGSEGV.")


def test_without_limits_nothing_is_accepted():
    assert conclude([]).verdict == "INCONCLUSIVE"
    assert "No limits were set" in conclude([]).sentence
