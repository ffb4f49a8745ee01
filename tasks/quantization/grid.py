"""Uniform affine quantization in ONNX's form: q = saturate(round_half_to_even(x / scale) + zero_point).

x is recovered as (q - zero_point) * scale. The zero point is an integer of the quantized type, so that zero is exactly
representable: ONNX operator QuantizeLinear (opset 21), with which `quantize` agrees bit by bit.

Texts that write x_q = round((x - z) / s) with a real-valued offset z mean the same where z = -s * zero_point for an
integer zero point: for x = 0.75, s = 0.25 and z = 0.25 that is 2 = round(0.75 / 0.25) + (-1). With another z, zero is
not on the grid and QuantizeLinear cannot represent it: a weight of 0 comes back as up to scale / 2. `quantize_from`
computes that form. It suits weights, where zero is a value like others, and is the grid of GGUF's Q4_1 (offset = the
smallest weight of each 32, ggml's quantize_row_q4_1_ref): such a source is recovered to the last integer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest value of the quantized type: [-8, 7] for 4 bits, [0, 15] where asymmetric."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)


def symmetric_scale(minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """Scale that maps [-max(|minimum|, |maximum|), +...] onto the restricted range, [-127, 127] for 8 bits.

    The restricted range leaves out the type's smallest value; then negating a weight negates its integer.

    Args:
        minimum: float32, any shape; the smallest value to be represented.
        maximum: float32, same shape.
        bits: of the quantized type.

    Returns:
        float32, same shape, positive: 1 where the values are all zero.
    """
    largest = torch.maximum(minimum.abs(), maximum.abs())
    return _positive(largest / integer_range(bits, symmetric=True)[1])


def full_range_scale(minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """Scale that puts the value of largest magnitude onto the type's smallest integer, -8 for 4 bits.

    It has the other sign than that value, so that all 2 ** bits integers are of use; what lies on the other side may
    saturate by up to half a step. GGUF's Q4_0 has such scales (ggml's quantize_row_q4_0_ref).

    Args and Returns are those of `symmetric_scale`, but for the sign.
    """
    largest = torch.where(minimum.abs() >= maximum.abs(), minimum, maximum)
    return torch.where(largest == 0, 1.0, largest / integer_range(bits, symmetric=True)[0])


def asymmetric_scale(minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """Scale that spreads [minimum, maximum], widened to hold zero, over all of [0, 2 ** bits - 1].

    Args and Returns are those of `symmetric_scale`.
    """
    span = maximum.clamp(min=0) - minimum.clamp(max=0)
    return _positive(span / integer_range(bits, symmetric=False)[1])


def asymmetric_zero_point(minimum: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The integer that stands for zero, [0, 2 ** bits - 1], in float32."""
    smallest, largest = integer_range(bits, symmetric=False)
    return torch.round(smallest - minimum.clamp(max=0) / scale).clamp(smallest, largest)


def storable(scale: Tensor) -> Tensor:
    """`scale` with its magnitude rounded up to a value of float16, still float32.

    Integers are computed with the scale that is stored, so every engine and PyTorch recover the same weights, whether
    they hold scales as float16 or float32. Upwards, so that the largest weight does not saturate. It costs a range
    wider by at most one part in 1024, and saves half a bit per weight in groups of 32.

    Raises:
        ValueError: a scale exceeds the range of float16.
    """
    rounded = scale.half()
    larger = (rounded.view(torch.int16) + 1).view(torch.float16)
    rounded = torch.where(rounded.float().abs() < scale.abs(), larger, rounded)
    if torch.isinf(rounded).any():
        raise ValueError(
            f"Scales must fit into float16, at most 65504; got {scale.abs().max().item():.4g}. "
            "Leave this layer unquantized with `ignore`."
        )
    return rounded.float()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Integers that stand for `x`.

    Args:
        x: float32.
        scale: float32, broadcast over x.
        zero_point: integers in float32, broadcast over x; None: symmetric.
        bits: of the quantized type.

    Returns:
        int8 shaped like x where symmetric, uint8 where not. Saturates at the ends of the type, not of the restricted
        range: with a scale from `symmetric_scale` the smallest value does not occur.
    """
    smallest, largest = integer_range(bits, symmetric=zero_point is None)
    integers = torch.round(x / scale)  # half to even
    if zero_point is None:
        return integers.clamp(smallest, largest).to(torch.int8)
    return (integers + zero_point).clamp(smallest, largest).to(torch.uint8)


def nearest_half(values: Tensor) -> Tensor:
    """`values` rounded to the nearest float16, still float32.

    Raises:
        ValueError: a value exceeds the range of float16.
    """
    rounded = values.half()
    if torch.isinf(rounded).any():
        raise ValueError(
            f"Scales and offsets must fit into float16, at most 65504; got {values.abs().max().item():.4g}. "
            "Leave this layer unquantized with `ignore`."
        )
    return rounded.float()


def offset_scale(minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """Scale that spreads [minimum, maximum] as it is over [0, 2 ** bits - 1], rounded to float16.

    To the nearest: rounding up, as `storable` does, would move a scale that is a float16 already.

    Args and Returns are those of `symmetric_scale`.
    """
    return _positive(nearest_half((maximum - minimum) / integer_range(bits, symmetric=False)[1]))


def quantize_from(x: Tensor, offset: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integers that stand for `x` on the grid offset + scale * [0, 2 ** bits - 1].

    Args:
        x: float32.
        offset: float32, broadcast over x; any real value, what the integer 0 stands for.
        scale: float32, broadcast over x.
        bits: of the quantized type.

    Returns:
        uint8 shaped like x: saturate(round_half_to_even((x - offset) / scale)).
    """
    smallest, largest = integer_range(bits, symmetric=False)
    return torch.round((x - offset) / scale).clamp(smallest, largest).to(torch.uint8)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Values that `integers` stand for, float32."""
    values = integers.float() if zero_point is None else integers.float() - zero_point
    return values * scale


@dataclass(frozen=True, eq=False)
class Affine:
    """What the integers stand for: (integer - zero_point) * scale, or offset + integer * scale."""

    bits: int
    scale: Tensor  # float32, any shape that broadcasts over the weights
    zero_point: Tensor | None = None  # float32 integers of the same shape
    offset: Tensor | None = None  # float32 of the same shape; instead of a zero point

    def each(self, change: Callable[[Tensor], Tensor]) -> "Affine":
        """The same grids with `change` made to their scales, zero points and offsets alike."""
        zero_point = None if self.zero_point is None else change(self.zero_point)
        return Affine(self.bits, change(self.scale), zero_point, None if self.offset is None else change(self.offset))

    def expanded(self) -> "Affine":
        """With one more dimension, along which a group's weights lie."""
        return self.each(lambda part: part[..., None])

    def group(self, index: int) -> "Affine":
        """The grids of one column of groups, [out]."""
        return self.each(lambda part: part[:, index])

    def quantize(self, x: Tensor) -> Tensor:
        """Integers that stand for `x`, int8 where the grid is symmetric, else uint8."""
        if self.offset is not None:
            return quantize_from(x, self.offset, self.scale, self.bits)
        return quantize(x, self.scale, self.zero_point, self.bits)

    def dequantize(self, integers: Tensor) -> Tensor:
        """Values that `integers` stand for, float32."""
        if self.offset is not None:
            return integers.float() * self.scale + self.offset
        return dequantize(integers, self.scale, self.zero_point)

    @property
    def real_zero_point(self) -> Tensor | None:
        """The zero point, an integer or, for a grid with an offset, any number; None where symmetric."""
        return self.zero_point if self.offset is None else -self.offset / self.scale

    @property
    def zero(self) -> Tensor | None:
        """The integer that stands for exactly zero; None where there is none."""
        if self.offset is not None:
            return None
        return torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point


def in_groups(weight: Tensor, group_size: int | None, layer: str) -> Tensor:
    """`weight` [out, in] as [out, groups, group_size]; None makes one group of each row.

    Raises:
        ValueError: the group size does not divide the layer's width.
    """
    out_features, in_features = weight.shape
    size = group_size or in_features
    if in_features % size:
        sizes = [n for n in range(8, in_features + 1) if in_features % n == 0]
        multiples = [n for n in sizes if n % 8 == 0] or sizes
        raise ValueError(
            f"The group size must divide the inputs of every quantized layer; {layer} has {in_features} inputs, "
            f"got {size}. Use one of {', '.join(map(str, multiples))}, or null for one scale per row, "
            "or leave the layer out with `ignore`."
        )
    return weight.reshape(out_features, in_features // size, size)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
