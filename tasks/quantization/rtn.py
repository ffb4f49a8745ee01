"""Round to nearest: every weight to the closest value of its grid, without data; the baseline of every other method.

Scales come from the smallest and largest weight of each row or group, as in Jacob et al., Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, arXiv:1712.05877, section 3 (eq. 12 and 13),
but with the restricted range for symmetric grids and scales rounded up to float16.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, model_validator

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.quantization.checkpoint_format import QuantizedWeight


class Grid(BaseModel, frozen=True, extra="forbid"):
    """Which integers stand for which weights."""

    bits: int = Field(8, ge=2, le=8, description="Bits per weight; the engines take 4 and 8.")
    symmetric: bool = Field(True, description="Zero is the integer 0; otherwise a zero point is stored too.")
    group_size: int | None = Field(
        None, ge=8, description="Consecutive inputs that share a scale; null: one scale per row (per channel)."
    )
    zero_point: Literal["integer", "real"] = Field(
        "integer",
        description="Of asymmetric grids. integer: ONNX's form, zero stays zero. real: the grid begins at the smallest "
        "weight, whatever it is; GGUF's Q4_1 is such a grid (4 bits, groups of 32), and is recovered without loss.",
    )

    @model_validator(mode="after")
    def _only_asymmetric_grids_have_zero_points(self) -> "Grid":
        if self.symmetric and self.zero_point == "real":
            raise ValueError("a symmetric grid has no zero point; set `symmetric: false`, or drop `zero_point`.")
        return self


class RoundToNearest(BaseModel, frozen=True, extra="forbid"):
    """Round every weight to the nearest value of its grid; needs no data."""

    method: Literal["rtn"] = "rtn"
    weights: Grid = Field(Grid(), description="Grid of the linear layers of every block.")
    embeddings: Grid | None = Field(
        Grid(), description="Grid of the embedding and the LM head; tied ones share their integers. null: float32."
    )
    ignore: tuple[str, ...] = Field(
        (), description="Layers to leave alone: names with wildcards, such as model.layers.0.* or *.down_proj."
    )

    @model_validator(mode="after")
    def _tables_have_integer_zero_points(self) -> "RoundToNearest":
        if self.embeddings and self.embeddings.zero_point == "real":
            raise ValueError("embeddings are looked up by integer kernels: their `zero_point` must be integer.")
        return self

    def quantize(self, weight: "Tensor", grid: Grid, layer: str) -> "QuantizedWeight":
        """`weight` [out, in] float32 on `grid`; `layer` names it in errors."""
        return round_to_nearest(weight, grid, layer)


def round_to_nearest(weight: "Tensor", options: Grid, layer: str) -> "QuantizedWeight":
    """The closest values of a min-max grid, per row or per group of consecutive inputs.

    Args:
        weight: [out_features, in_features] float32, finite; not modified.
        options: which grid; its group size divides in_features.
        layer: the layer's name, for errors.

    Raises:
        ValueError: the weight is not finite, or the group size does not divide its width.
    """
    from tasks.quantization import grid
    from tasks.quantization.checkpoint_format import QuantizedWeight

    bits = options.bits
    groups = grid.in_groups(weight, options.group_size, layer)
    minimum, maximum = groups.aminmax(dim=2)
    if not (minimum.isfinite().all() and maximum.isfinite().all()):
        num_bad = int((~weight.isfinite()).sum())
        raise ValueError(
            f"Weights must be finite; {num_bad} of {weight.numel()} weights of {layer} are NaN or infinite. "
            "The checkpoint is damaged or its training diverged: use another."
        )
    zero_point = None
    if options.zero_point == "real":
        scale, offset = grid.offset_scale(minimum, maximum, bits), grid.nearest_half(minimum)
        integers = grid.quantize_from(groups, offset[:, :, None], scale[:, :, None], bits)
        zero_point = (-offset / scale).numpy()
    elif options.symmetric:
        scale = grid.storable(grid.symmetric_scale(minimum, maximum, bits))
        integers = grid.quantize(groups, scale[:, :, None], None, bits)
    else:
        scale = grid.storable(grid.asymmetric_scale(minimum, maximum, bits))
        whole = grid.asymmetric_zero_point(minimum, scale, bits)
        integers = grid.quantize(groups, scale[:, :, None], whole[:, :, None], bits)
        zero_point = whole.byte().numpy()
    return QuantizedWeight(
        integers=integers.reshape(weight.shape).numpy(),
        scale=scale.numpy(),
        zero_point=zero_point,
        bits=bits,
        group_size=options.group_size,
    )
