from tasks.validation.machine import Machine
from tasks.validation.plausibility import implausibly_fast
from tasks.validation.statistics import Estimate, Percentiles

MACHINE = Machine(
    threads=2,
    read_bytes_per_s={16_000_000: 40e9, 256_000_000: 20e9},
    operations_per_s={"float32": 1e11, "bfloat16": 1e11, "int8": 1e11},
)


def tpot(value: float, high: float) -> Percentiles:
    near = Estimate(value=value, low=value, high=high)
    return Percentiles(num=8, p50=near, p90=near, p95=near, p99=near, p99_supported=False)


def test_a_token_faster_than_its_weights_are_read_is_told_with_the_bound():
    # 256 MB at 20 GB/s take 12.8 ms; a tenth of that is impossible, 11 ms are the probe's own error
    said = implausibly_fast(tpot(1.3, 1.4), 256_000_000, MACHINE)
    assert "faster than this machine reads 256 MB of weights: 12.8 ms at 20 GB/s" in said
    assert implausibly_fast(tpot(11, 11.2), 256_000_000, MACHINE) is None


def test_only_the_upper_end_of_the_interval_convicts_and_caches_are_no_evidence():
    assert implausibly_fast(tpot(1.3, 12.0), 256_000_000, MACHINE) is None
    assert implausibly_fast(tpot(0.001, 0.001), 15_000_000, MACHINE) is None
