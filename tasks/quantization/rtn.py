"""Round to nearest: every weight to the closest value of its grid, without data; the baseline of every other method.

Scales come from the smallest and largest weight of each row or group, as in Jacob et al., Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, arXiv:1712.05877, section 3 (eq. 12 and 13),
but with the restricted range for symmetric grids and scales rounded up to float16; `ranges.py` can narrow them.
"""

from operator import itemgetter
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tasks.calibration.tensor_files import refuse_not_finite
from tasks.quantization.mixed import Weights
from tasks.quantization.ranges import Grid, fit
from tasks.quantization.targets import Targets

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.quantization.checkpoint_format import QuantizedWeight
    from tasks.quantization.grid import Affine

ROWS_AT_ONCE = 2048
"""So that an embedding needs little more memory than itself."""


class RoundToNearest(Targets, frozen=True, extra="forbid"):
    """Round every weight to the nearest value of its grid; needs no data."""

    method: Literal["rtn"] = "rtn"
    weights: Weights = Field(
        Grid(), description="Grid of the linear layers of every block, or `choices` of grids and a budget."
    )

    def quantize(self, weight: "Tensor", grid: Grid, layer: str) -> "QuantizedWeight":
        """`weight` [out, in] float32 on `grid`; `layer` names it in errors."""
        if grid.format == "float8_e4m3":
            return nearest_float8(weight, layer)
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
    import torch

    from tasks.quantization.grid import in_groups

    affine = fit(weight, options, layer)
    groups, grids = in_groups(weight, options.group_size, layer), affine.expanded()
    integers = torch.empty(groups.shape, dtype=torch.int8 if options.symmetric else torch.uint8)
    for start in range(0, len(groups), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        integers[rows] = grids.each(itemgetter(rows)).quantize(groups[rows])
    return stored(integers.reshape(weight.shape), affine, options.group_size)


def nearest_float8(weight: "Tensor", layer: str) -> "QuantizedWeight":
    """`weight` [out, in] float32, finite, as the nearest values of FP8 times one scale per row: max / 448.

    Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433, section 3 (E4M3: 448 is the largest).
    """
    import torch

    from tasks.quantization.activations import LARGEST_FLOAT8
    from tasks.quantization.checkpoint_format import QuantizedWeight
    from tasks.quantization.grid import storable

    largest = weight.abs().amax(dim=1, keepdim=True)
    if not largest.isfinite().all():
        refuse_not_finite(weight, layer)
    scale = storable(torch.where(largest > 0, largest / LARGEST_FLOAT8, 1.0))
    values = (weight / scale).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn)
    return QuantizedWeight(
        integers=values.view(torch.uint8).numpy(),
        scale=scale.numpy(),
        zero_point=None,
        bits=8,
        group_size=None,
        format="float8_e4m3",
    )


def stored(integers: "Tensor", affine: "Affine", group_size: int | None) -> "QuantizedWeight":
    """Integers [out, in] and their grids [out, groups] as checkpoints hold them."""
    from tasks.quantization.checkpoint_format import QuantizedWeight

    zero_point = affine.real_zero_point
    if zero_point is not None:
        zero_point = zero_point if affine.offset is not None else zero_point.byte()
    return QuantizedWeight(
        integers=integers.numpy(),
        scale=affine.scale.numpy(),
        zero_point=None if zero_point is None else zero_point.numpy(),
        bits=affine.bits,
        group_size=group_size,
    )
