"""Speeds that no machine could reach: something else was timed than what was meant."""

from tasks.validation.machine import Machine
from tasks.validation.statistics import Percentiles

TOLERANCE = 0.8
"""Of the measured bandwidth's bound. The probe's own figures differ by a tenth from run to run."""


def implausibly_fast(tpot_ms: Percentiles, weight_bytes: int, machine: Machine) -> str | None:
    """A sentence if tokens come faster than `machine` can read the weights that each of them needs; else None.

    At batch size 1 every token reads all weights once, so the time per token is at least bytes / bandwidth. Judged is
    the upper end of the median's interval. Weights that fit into the caches below the smallest size that was read are
    not judged: nothing is known of these.

    Args:
        tpot_ms: at batch size 1.
        weight_bytes: that a token reads at least.
        machine: measured with as many threads as the engine has.
    """
    if weight_bytes < min(machine.read_bytes_per_s) or tpot_ms.p50.high is None:
        return None
    bandwidth = machine.bandwidth(weight_bytes)
    least_ms = 1000 * weight_bytes / bandwidth
    if tpot_ms.p50.high >= TOLERANCE * least_ms:
        return None
    return (
        f"A token every {tpot_ms.p50.value:.3g} ms is faster than this machine reads {weight_bytes / 1e6:.3g} MB of "
        f"weights: {least_ms:.3g} ms at {bandwidth / 1e9:.3g} GB/s. Something else was timed than the whole model."
    )
