"""Activation quantization: options, scales of a layer's inputs, and what rounding them gives (W8A8).

Rounded inputs are x' = (saturate(round(x / scale + zero_point)) - zero_point) * scale. A static scale was calibrated
and holds for the whole input; one per token comes from that token: scale = max |x| / 127.5, as compressed-tensors has
it (full range; the largest value saturates by half a step). FP8 (float8_e4m3fn) instead rounds x / scale to the nearest
of its values, scale = max |x| / 448. Stock transformers computes all of this alike, bit by bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, model_validator

from tasks.quantization.calibrators import PERCENTILE, Calibrator, calibrated

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.calibration.statistics import Histogram

Format = Literal["int8", "float8_e4m3"]
LARGEST_FLOAT8 = 448.0


class Activations(BaseModel, frozen=True, extra="forbid"):
    """How the inputs of the blocks' linear layers are rounded."""

    format: Format = Field("int8", description="As the weights: 8-bit integers, or FP8 (e4m3) for GPUs.")
    static: tuple[str, ...] = Field(
        (),
        description='Layers, as in `ignore`, whose inputs have one calibrated scale; ["*"]: all. The others have one '
        "per token.",
    )
    ignore: tuple[str, ...] = Field((), description="Layers, as in `static`, whose inputs stay as they are.")
    symmetric: bool = Field(True, description="Static scales without a zero point; scales per token never have one.")
    range: Calibrator | None = Field(
        None, description="Of static scales: how much of the seen values they cover. null: min-max."
    )
    percentile: float | None = Field(
        None, gt=50, le=100, description=f"Of `range: percentile`: % of the values covered. null: {PERCENTILE}."
    )
    smooth: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="SmoothQuant's alpha (0.5 in the paper): how much of the inputs' outliers weights take over.",
    )

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "Activations":
        if not self.static and self.range:
            raise ValueError('`range` is of static scales; name layers in `static` (["*"]: all), or drop `range`.')
        if self.percentile and self.range != "percentile":
            raise ValueError("`percentile` is of `range: percentile`; set that, or drop `percentile`.")
        if not self.symmetric and not self.static:
            raise ValueError("scales per token have no zero points; name layers in `static`, or drop `symmetric`.")
        if not self.symmetric and self.format == "float8_e4m3":
            raise ValueError("FP8 has no zero points; drop `symmetric: false`, or use `format: int8`.")
        if self.format == "float8_e4m3" and self.range in ("entropy", "mse"):
            raise ValueError(
                f"`range: {self.range}` weighs outliers against the steps of integers; FP8's grow with the value. Use "
                "min-max, moving-average or percentile."
            )
        return self


@dataclass(frozen=True)
class Inputs:
    """How a quantized layer's inputs are rounded."""

    format: Format
    scale: float | None = None  # None: one per token
    zero_point: int = 0  # [-128, 127]
    symmetric: bool = True  # whether no zero point is stored

    @property
    def arguments(self) -> Mapping[str, object]:
        """`input_activations` of compressed-tensors."""
        return {
            "num_bits": 8,
            "type": "int" if self.format == "int8" else "float",
            "symmetric": self.symmetric,
            "strategy": "token" if self.scale is None else "tensor",
            "dynamic": self.scale is None,
        }

    def rounded(self, x: "Tensor") -> "Tensor":
        """`x` [..., features] as the grid gives it back, computed in float32."""
        if self.scale is None:
            return per_token(x.float(), self.format).to(x.dtype)
        return static(x.float(), self.scale, self.zero_point, self.format).to(x.dtype)


def fitted(histogram: "Histogram", options: Activations) -> Inputs:
    """The static grid of a layer whose inputs `histogram` has counted; its scale is a float16, as those of weights."""
    import torch

    from tasks.quantization import grid

    low, high = calibrated(
        histogram,
        options.range or "min-max",
        symmetric=options.symmetric,
        percentile=options.percentile or PERCENTILE,
    )
    minimum, maximum = torch.tensor(low), torch.tensor(high)
    if options.format == "float8_e4m3":
        largest = max(abs(low), abs(high))
        return Inputs(options.format, float(grid.storable(torch.tensor(largest / LARGEST_FLOAT8 or 1.0))))
    if options.symmetric:
        return Inputs(options.format, float(grid.storable(grid.symmetric_scale(minimum, maximum, 8))))
    scale = grid.storable(grid.asymmetric_scale(minimum, maximum, 8))
    return Inputs(
        options.format, float(scale), int(grid.asymmetric_zero_point(minimum, scale, 8)) - 128, symmetric=False
    )


def covered(inputs: Inputs) -> tuple[float, float]:
    """The smallest and largest value on a static grid."""
    assert inputs.scale is not None
    largest = largest_of(inputs.format)
    smallest = -largest if inputs.symmetric else -128
    return (smallest - inputs.zero_point) * inputs.scale, (largest - inputs.zero_point) * inputs.scale


def largest_of(format: Format) -> float:
    """The largest value before it is scaled."""
    return LARGEST_FLOAT8 if format == "float8_e4m3" else 127.0


def static(x: "Tensor", scale: "float | Tensor", zero_point: int, format: Format) -> "Tensor":
    """`x` float32 as the grid of one scale, or of scales that broadcast over it, gives it back."""
    import torch

    scaled = x / scale
    if format == "float8_e4m3":
        return scaled.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).float() * scale
    return ((scaled + zero_point).round().clamp(-128, 127) - zero_point) * scale


def per_token(x: "Tensor", format: Format) -> "Tensor":
    """`x` [..., features] float32, every row on the grid of its own scale."""
    import torch

    largest = x.abs().amax(dim=-1, keepdim=True)
    scale = largest / (127.5 if format == "int8" else LARGEST_FLOAT8)
    return static(x, torch.where(scale > 0, scale, torch.ones_like(scale)), 0, format)


def relative_error(histogram: "Histogram", inputs: Inputs) -> float:
    """||x - x'|| / ||x|| of the inputs that `histogram` has counted, on a static grid; as if in the middles of bins."""
    import torch

    half = len(histogram.counts) // 2
    values = ((torch.arange(-half, half) + 0.5) * histogram.width).float()
    weights = histogram.counts.double()
    squared = float((weights * values.double().square()).sum())
    return (
        float((weights * (inputs.rounded(values) - values).double().square()).sum() / squared) ** 0.5
        if squared
        else 0.0
    )
