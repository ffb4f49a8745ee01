"""Which values a grid covers: the options of a grid, and scales and zero points that fit a weight.

`min-max` covers every weight. `mse` gives up the outermost ones of a group where that makes the others more exact: of
ranges narrowed in steps of one percent, the one with the smallest sum of |w - w'|^2.4 (the exponent and the search of
GPTQ's code, arXiv:2210.17323, and of llm-compressor's MSE observer). Where a method has seen a layer's inputs x, it is
the one with the smallest sum of x^2 (w - w')^2, the error of the outputs if inputs were uncorrelated.

`half-quadratic` moves the offset of a grid with a real one, so that most weights are exact and outliers may err: the
smallest sum of |w - w'|^0.7, by the half-quadratic splitting of Badri and Shaji, Half-Quadratic Quantization of Large
Machine Learning Models, 2023 (https://mobiusml.github.io/hqq_blog). Deviation: each group keeps the best offset it has
seen, where their code stops all groups together.
"""

from operator import itemgetter
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, model_validator

from tasks.calibration.tensor_files import refuse_not_finite

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.quantization.grid import Affine

NARROWEST = 0.8
"""Fraction of a group's range; llm-compressor narrows as far by default."""
EXPONENT = 2.4
NORM, BETA, GROWTH, ITERATIONS = 0.7, 10.0, 1.01, 20
"""p, the first beta and its factor in every step of the half-quadratic splitting: those of HQQ's code."""
ROWS_PER_SEARCH = 2048
"""Rows searched at once, so that an embedding's search needs no more memory than a layer's."""
WEIGHTS_AT_ONCE = 2**17
"""Rounded at once in a search: what is made of these stays in a core's cache."""


class Grid(BaseModel, frozen=True, extra="forbid"):
    """Which integers stand for which weights."""

    format: Literal["integer", "float8_e4m3"] = Field(
        "integer", description="float8_e4m3: FP8 with one scale per row, for GPUs; 8 bits, no other option applies."
    )
    bits: int = Field(8, ge=2, le=8, description="Bits per weight; the engines take 4 and 8.")
    symmetric: bool = Field(True, description="Zero is the integer 0; otherwise a zero point is stored too.")
    full_range: bool = Field(
        False,
        description="Of symmetric grids: all integers are used, [-8, 7] with 4 bits, and scales have a sign; otherwise "
        "the smallest is left out. Better with few bits; TensorRT takes it with up to 4.",
    )
    group_size: int | None = Field(
        None, ge=8, description="Consecutive inputs that share a scale; null: one scale per row (per channel)."
    )
    per_tensor: bool = Field(
        False, description="One scale for the whole weight; coarse, and seldom better for an engine than one per row."
    )
    zero_point: Literal["integer", "real"] = Field(
        "integer",
        description="Of asymmetric grids. integer: ONNX's form, zero stays zero. real: the grid begins at the smallest "
        "weight, whatever it is; GGUF's Q4_1 is such a grid (4 bits, groups of 32), and is recovered without loss.",
    )
    range: Literal["min-max", "mse", "half-quadratic"] = Field(
        "min-max",
        description="Which weights the grid covers. min-max: all. mse: as many as give the smallest error, outliers "
        "saturating. half-quadratic: all in width, moved so that most are exact; needs `zero_point: real`.",
    )

    @model_validator(mode="after")
    def _float8_has_no_options(self) -> "Grid":
        others = self.model_copy(update={"format": "integer"})
        if self.format == "float8_e4m3" and others != Grid():
            raise ValueError(
                "FP8 has 8 bits, one scale per row, no zero point and covers every weight; drop the other options."
            )
        return self

    @model_validator(mode="after")
    def _one_granularity(self) -> "Grid":
        if self.per_tensor and self.group_size:
            raise ValueError(f"`per_tensor` leaves no groups; drop it, or `group_size` ({self.group_size}).")
        return self

    @model_validator(mode="after")
    def _half_quadratic_moves_an_offset(self) -> "Grid":
        if self.range == "half-quadratic" and self.zero_point != "real":
            raise ValueError("`range: half-quadratic` moves real offsets; set `zero_point: real`, or use `range: mse`.")
        return self

    @model_validator(mode="after")
    def _only_asymmetric_grids_have_zero_points(self) -> "Grid":
        if self.symmetric and self.zero_point == "real":
            raise ValueError("a symmetric grid has no zero point; set `symmetric: false`, or drop `zero_point`.")
        if self.full_range and not self.symmetric:
            raise ValueError("an asymmetric grid uses all integers anyway; drop `full_range`, or `symmetric: false`.")
        return self


def fit(weight: "Tensor", options: Grid, layer: str, importance: "Tensor | None" = None) -> "Affine":
    """The grid of every row or group of a weight.

    Args:
        weight: [out_features, in_features] float32, finite; not modified.
        options: which kind of grid; its group size divides in_features.
        layer: the layer's name, for errors.
        importance: [in_features] float32, mean squares of the inputs, which weigh errors in the search of `mse`.

    Returns:
        [out_features, groups] scales and zero points; of one value where the grid is per tensor.

    Raises:
        ValueError: the weight is not finite, or the group size does not divide its width.
    """
    import torch

    from tasks.quantization import grid

    if options.per_tensor:
        every = None if importance is None else importance.repeat(len(weight))
        one = fit(weight.reshape(1, -1), options.model_copy(update={"per_tensor": False}), layer, every)
        return one.each(lambda part: part.expand(len(weight), 1).contiguous())
    groups = grid.in_groups(weight, options.group_size, layer)
    minimum, maximum = groups.aminmax(dim=2)
    if not (minimum.isfinite().all() and maximum.isfinite().all()):
        refuse_not_finite(weight, layer)
    if options.range == "min-max":
        return covering(minimum, maximum, options)
    if importance is not None:
        importance = importance.reshape(groups.shape[1:])
    pieces = [slice(start, start + ROWS_PER_SEARCH) for start in range(0, len(groups), ROWS_PER_SEARCH)]
    if options.range == "half-quadratic":
        affine = covering(minimum, maximum, options)
        offset = torch.cat([_moved_offset(groups[rows], affine.each(itemgetter(rows))) for rows in pieces])
        return grid.Affine(affine.bits, affine.scale, offset=offset)
    parts = []
    for rows in pieces:
        parts.append(_least_error(groups[rows], minimum[rows], maximum[rows], options, importance))
    low, high = (torch.cat(ends) for ends in zip(*parts, strict=True))
    return covering(low, high, options)


def covering(minimum: "Tensor", maximum: "Tensor", options: Grid) -> "Affine":
    """The grid from `minimum` to `maximum`, float32 of one shape, widened to hold zero unless its offset is real."""
    from tasks.quantization import grid

    bits = options.bits
    if options.zero_point == "real":
        scale = grid.offset_scale(minimum, maximum, bits)
        return grid.Affine(bits, scale, offset=grid.nearest_half(minimum))
    if options.symmetric:
        scale_of = grid.full_range_scale if options.full_range else grid.symmetric_scale
        return grid.Affine(bits, grid.storable(scale_of(minimum, maximum, bits)))
    scale = grid.storable(grid.asymmetric_scale(minimum, maximum, bits))
    return grid.Affine(bits, scale, zero_point=grid.asymmetric_zero_point(minimum, scale, bits))


def _moved_offset(groups: "Tensor", affine: "Affine") -> "Tensor":
    """The offset of each of [rows, groups, group_size] with nearly the least sum of |w - w'|^p; [rows, groups] float32.

    Alternately, e = shrink(w - w') holds what outliers may err, |x| - |x|^(p - 1) / beta where positive, and the offset
    is the mean of what is left, w - e - q s; beta grows.
    """
    import torch

    from tasks.quantization import grid

    best = affine.offset
    assert best is not None
    offset, least, beta = best, torch.full_like(best, torch.inf), BETA
    for _ in range(ITERATIONS):
        moved = grid.Affine(affine.bits, affine.scale, offset=grid.nearest_half(offset)).expanded()
        integers = moved.quantize(groups)
        difference = groups - moved.dequantize(integers)
        size = difference.abs()
        error = size.pow(NORM).sum(dim=2)
        better = error < least
        assert moved.offset is not None
        least, best = torch.where(better, error, least), torch.where(better, moved.offset[..., 0], best)
        allowed = (size - size.clamp(min=1e-12).pow(NORM - 1) / beta).clamp(min=0) * difference.sign()
        offset = (groups - allowed - integers.float() * moved.scale).mean(dim=2)
        beta *= GROWTH
    return best


def _least_error(
    groups: "Tensor", minimum: "Tensor", maximum: "Tensor", options: Grid, importance: "Tensor | None"
) -> "tuple[Tensor, Tensor]":
    """The ends of the range with the least error, for each group of [rows, groups, group_size]; each [rows, groups].

    Ranges shrink towards zero, or towards their middle where the grid need not hold zero.
    """
    import torch

    middle = (minimum + maximum) / 2 if options.zero_point == "real" else torch.zeros_like(minimum)
    num_rows = max(1, WEIGHTS_AT_ONCE // groups[0].numel())
    pieces = [slice(start, start + num_rows) for start in range(0, len(groups), num_rows)]
    best_low, best_high = minimum, maximum
    least = torch.full_like(minimum, torch.inf)
    error = torch.empty_like(minimum)
    for percent in range(100, round(100 * NARROWEST) - 1, -1):
        low, high = (middle + percent / 100 * (end - middle) for end in (minimum, maximum))
        if percent == 100:
            low, high = minimum, maximum  # to the last bit
        affine = covering(low, high, options).expanded()
        for rows in pieces:
            part = affine.each(itemgetter(rows))
            difference = part.dequantize(part.quantize(groups[rows])).sub_(groups[rows])
            if importance is None:
                error[rows] = difference.abs_().pow_(EXPONENT).sum(dim=2)
            else:
                error[rows] = difference.square_().mul_(importance).sum(dim=2)
        better = error < least
        least = torch.where(better, error, least)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    return best_low, best_high
