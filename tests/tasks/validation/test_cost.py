import pytest

from tasks.validation.cost import Price, measured
from tasks.validation.latency import Speed
from tasks.validation.measured import Measured
from tasks.validation.statistics import Estimate, exactly

PRICE = Price(amount=3.6, currency="EUR")


def test_cost_is_price_by_tokens():
    throughput = Measured(
        value=Estimate(value=100, low=80, high=125),
        original=50.0,
        degradation_percent=Estimate(value=-100, low=-150, high=-60),  # twice as many tokens, 1.6 to 2.5 times
    )
    found = measured(PRICE, {"throughput_tokens_per_s.batch_8": throughput, "tpot_ms.p50.batch_1": throughput})
    assert found.keys() == {"cost_per_million_tokens.batch_8"}
    cost = found["cost_per_million_tokens.batch_8"]
    # 3.6 an hour are 0.001 a second, for 100 tokens
    assert (cost.value.low, cost.value.value, cost.value.high) == pytest.approx((8.0, 10.0, 12.5))
    assert cost.original == pytest.approx(20)
    percent, absolute = cost.degradation_percent, cost.degradation
    assert (percent.low, percent.value, percent.high) == pytest.approx((-60, -50, -37.5))
    assert (absolute.low, absolute.value, absolute.high) == pytest.approx((-12, -10, -7.5))


def test_the_confidence_of_a_cost_is_that_of_the_throughput_it_follows_from():
    throughput = Measured(value=exactly(100), confidence=0.975)
    compared = throughput.model_copy(update={"original": 50.0, "degradation_percent": exactly(-100)})
    found = measured(PRICE, {"capacity_tokens_per_s": throughput, "throughput_tokens_per_s.batch_1": compared})
    assert [cost.confidence for cost in found.values()] == [0.975, 0.975]


def test_cost_under_load_has_no_original():
    found = measured(PRICE, {"capacity_tokens_per_s": Measured(value=exactly(1000))})
    assert found["cost_per_million_tokens_under_load"].value == exactly(1.0)
    assert found["cost_per_million_tokens_under_load"].degradation_percent is None


def test_a_throughput_that_may_be_zero_has_no_upper_cost():
    found = measured(PRICE, {"capacity_tokens_per_s": Measured(value=Estimate(value=10, low=0, high=20))})
    assert found["cost_per_million_tokens_under_load"].value.high is None


def test_cost_is_measured_at_the_batch_sizes_of_throughput_in_the_currency_of_the_price():
    metrics = PRICE.metrics({metric.name: metric for metric in Speed(batch_sizes=(1, 4)).metrics()})
    assert [(metric.name, metric.unit, metric.batch_sizes) for metric in metrics] == [
        ("cost_per_million_tokens", "EUR per 10⁶ tokens", (1, 4))
    ]
