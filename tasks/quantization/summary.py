"""What quantization made of a checkpoint, layer by layer and as a whole."""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from tasks.quantization.activations import Inputs
from tasks.quantization.checkpoint_format import QuantizedWeight, Scheme
from tasks.quantization.input_scales import Calibrated
from tasks.quantization.mixed import Allocation, counts
from tasks.quantization.rtn import ROWS_AT_ONCE

NUM_WORST_CHANNELS = 3


class QuantizedLayer(BaseModel, frozen=True):
    """What quantization made of one layer."""

    name: str
    method: str  # in words: rounded to nearest, GPTQ
    num_weights: int
    bits: int
    symmetric: bool
    group_size: int | None
    bits_per_weight: float  # with scales (float16) and zero points
    relative_error: float  # ||W - W'|| / ||W||, Frobenius norms
    max_error: float  # largest |w - w'|
    sqnr_db: float | None  # 20 log10(||W|| / ||W - W'||); None where nothing was lost
    worst_channels: tuple[
        int, ...
    ]  # rows with the largest relative errors, the worst first; none where nothing was lost
    output_error: float | None  # ||(W - W') X|| / ||W X|| on the calibration tokens; None: a method that reads none
    note: str  # what the method had to do; empty: nothing unusual
    inputs: Literal["float", "static", "per token"] = "float"  # how the layer's inputs are rounded
    input_range: tuple[float, float] | None = None  # of static ones: what was covered
    input_relative_error: float | None = None  # of static ones: ||x - x'|| / ||x|| on the calibration tokens


class Choice(BaseModel, frozen=True):
    """What mixed precision has chosen."""

    layers: str  # how many on which grid
    bits_per_weight: float  # of all weights it chose for
    predicted_kl: float  # nats per token; the sum over the parts, each rounded to nearest alone
    predicted_tpot_ms: float | None  # where the budget was one of time
    measured_kl: float | None  # of the whole model on the same tokens, where the budget was one of divergence
    num_attempts: int


class QuantizationSummary(BaseModel, frozen=True):
    """What quantization made of a checkpoint."""

    num_parameters: int  # tied ones once
    num_quantized: int
    bits_per_weight: float  # of the quantized weights, with scales (float16) and zero points
    bits_per_parameter: float  # of the whole checkpoint's tensors
    size_bytes_before: int  # the tensors as float32
    size_bytes: int  # the safetensors files
    relative_error: float  # over all quantized weights together
    worst_layer: str  # the one with the largest relative error
    worst_relative_error: float
    resumed_from_block: int | None  # the first that this run computed, going on after an interruption
    mixed: Choice | None = None
    layers: list[QuantizedLayer]
    left_float: dict[str, str]  # layers that could have been quantized and were not, and why
    notes: list[str]


class Measured(BaseModel, frozen=True):
    """A quantized layer's figures, what sums over layers need beside them, and how it is stored."""

    layer: QuantizedLayer
    error_squared: float
    norm_squared: float
    scheme: Scheme


def measure(
    name: str,
    values: NDArray[np.float32],
    weight: QuantizedWeight,
    scheme: Scheme,
    method: str,
    output_error: float | None = None,
    note: str = "",
) -> Measured:
    """The figures of a layer.

    Args:
        name: the layer's.
        values: [out, in] float32, its weight before.
        weight: and after.
        scheme: how that is stored.
        method: what has made it, in words.
        output_error: on the calibration tokens, where the method has seen some.
        note: what the method had to do.
    """
    dequantized = weight.dequantize()
    max_error = 0.0
    errors, norms = (np.empty(len(values)) for _ in range(2))  # squared, of each row
    for start in range(0, len(values), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        error = values[rows] - dequantized[rows]
        errors[rows] = np.square(error, dtype=np.float64).sum(axis=1)
        norms[rows] = np.square(values[rows], dtype=np.float64).sum(axis=1)
        max_error = max(max_error, float(np.abs(error).max()))
    error_squared, norm_squared = float(errors.sum()), float(norms.sum())
    relative = errors / np.where(norms > 0, norms, 1)
    worst = [int(row) for row in np.argsort(-relative, kind="stable")[:NUM_WORST_CHANNELS] if relative[row] > 0]
    layer = QuantizedLayer(
        name=name,
        method=method,
        num_weights=values.size,
        bits=weight.bits,
        symmetric=weight.zero_point is None,
        group_size=weight.group_size,
        bits_per_weight=weight.size_bits / values.size,
        relative_error=(error_squared / norm_squared) ** 0.5 if norm_squared else 0.0,
        max_error=max_error,
        sqnr_db=10 * math.log10(norm_squared / error_squared) if error_squared and norm_squared else None,
        worst_channels=tuple(worst),
        output_error=output_error,
        note=note,
    )
    return Measured(layer=layer, error_squared=error_squared, norm_squared=norm_squared, scheme=scheme)


def with_inputs(measured: Measured, inputs: Inputs | None, found: Calibrated | None) -> Measured:
    """The layer's figures, with what calibration found for its inputs."""
    if inputs is None:
        return measured
    about: dict[str, object] = {"inputs": "per token"}
    if found:
        about = {"inputs": "static", "input_range": found.range, "input_relative_error": found.relative_error}
    return measured.model_copy(update={"layer": measured.layer.model_copy(update=about)})


def summarize(
    measured: list[Measured],
    *,
    num_parameters: int,
    size_bytes: int,
    left_float: dict[str, str],
    resumed_from_block: int | None,
    notes: list[str],
) -> QuantizationSummary:
    """The figures of all layers together; `notes` come before those on single layers."""
    layers = [each.layer for each in measured]
    num_quantized = sum(layer.num_weights for layer in layers)
    error_squared = sum(each.error_squared for each in measured)
    norm_squared = sum(each.norm_squared for each in measured)
    worst = max(layers, key=lambda layer: layer.relative_error)
    return QuantizationSummary(
        num_parameters=num_parameters,
        num_quantized=num_quantized,
        bits_per_weight=sum(layer.bits_per_weight * layer.num_weights for layer in layers) / num_quantized,
        bits_per_parameter=size_bytes * 8 / num_parameters,
        size_bytes_before=num_parameters * 4,
        size_bytes=size_bytes,
        relative_error=(error_squared / norm_squared) ** 0.5 if norm_squared else 0.0,
        worst_layer=worst.name,
        worst_relative_error=worst.relative_error,
        resumed_from_block=resumed_from_block,
        layers=layers,
        left_float=left_float,
        notes=[*notes, *(f"{layer.name}: {layer.note}" for layer in layers if layer.note)],
    )


def describe(allocation: Allocation, *, measured_kl: float | None = None, num_attempts: int = 1) -> Choice:
    """What was chosen, for the summary."""
    return Choice(
        layers=counts(allocation.grids),
        bits_per_weight=allocation.bits_per_weight,
        predicted_kl=allocation.predicted_kl,
        predicted_tpot_ms=allocation.predicted_tpot_ms,
        measured_kl=measured_kl,
        num_attempts=num_attempts,
    )
