import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.rtn import round_to_nearest


def test_hand_made_row():
    weight = round_to_nearest(torch.tensor([[0.5, -1.0, 0.25, 0.0]]), Grid(bits=4), "layer")
    # The scale is 1/7 rounded up to float16; the integers are the weights in steps of it.
    assert weight.scale.tolist() == [[pytest.approx(1 / 7, rel=2**-10)]]
    assert weight.integers.tolist() == [[3, -7, 2, 0]]


def test_every_group_has_its_own_scale():
    weight = torch.tensor([[1.0] * 8 + [100.0] * 8])
    quantized = round_to_nearest(weight, Grid(bits=4, group_size=8), "layer")
    assert quantized.scale.shape == (1, 2)
    np.testing.assert_allclose(quantized.dequantize(), weight.numpy(), rtol=2**-9)


def test_constant_and_zero_rows_are_kept():
    weight = torch.stack([torch.zeros(16), torch.full((16,), 0.3), torch.full((16,), -0.3)])
    for symmetric in (True, False):
        quantized = round_to_nearest(weight, Grid(symmetric=symmetric), "layer")
        assert (quantized.dequantize()[0] == 0).all()
        np.testing.assert_allclose(quantized.dequantize(), weight.numpy(), rtol=2**-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(bad):
    weight = torch.zeros(4, 8)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"1 of 32 weights of up_proj are NaN or infinite"):
        round_to_nearest(weight, Grid(), "up_proj")


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_err_less(symmetric):
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    errors = [
        np.square(round_to_nearest(weight, grid, "layer").dequantize() - weight.numpy()).sum()
        for grid in (Grid(bits=bits, symmetric=symmetric, group_size=32) for bits in range(2, 9))
    ]
    assert errors == sorted(errors, reverse=True)


def test_bits_per_weight_count_scales_and_zero_points():
    weight = torch.randn(4, 64)

    def bits_per_weight(**options):
        return round_to_nearest(weight, Grid(**options), "layer").size_bits / weight.numel()

    assert bits_per_weight(bits=4, symmetric=False, group_size=32) == 4 + (16 + 4) / 32
    assert bits_per_weight(bits=4, symmetric=False, group_size=32, zero_point="real") == 4 + (16 + 16) / 32
    assert bits_per_weight(bits=4, group_size=32) == 4 + 16 / 32
    assert bits_per_weight(bits=8) == 8 + 16 / 64


def q4_1(weight, group_size=32):
    """ggml's quantize_row_q4_1_ref and its inverse, as loops; NumPy's float16 rounds as ggml's conversion does."""
    values = np.empty_like(weight)
    for row, out in zip(weight, values, strict=True):
        for start in range(0, len(row), group_size):
            block = row[start : start + group_size]
            low = block.min()
            d = np.float32((block.max() - low) / np.float32(15))
            inverse = np.float32(1) / d if d else np.float32(0)
            integers = np.minimum(15, np.floor((block - low) * inverse + np.float32(0.5)))
            out[start : start + group_size] = integers * np.float32(np.float16(d)) + np.float32(np.float16(low))
    return values


def test_a_q4_1_source_is_recovered_to_the_last_integer():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 256), np.float32) + rng.standard_normal((64, 1), np.float32)
    weight[3, :32] = 0.25
    weight[4] *= 1e-4
    source = q4_1(weight)
    grid = Grid(bits=4, symmetric=False, group_size=32, zero_point="real")
    quantized = round_to_nearest(torch.from_numpy(source), grid, "layer")
    np.testing.assert_allclose(quantized.dequantize(), source, rtol=0, atol=2e-6 * np.abs(source).max())
    blocks = quantized.integers.reshape(64, 8, 32).astype(np.float32)
    again = blocks * quantized.scale[:, :, None] + quantized.offset[:, :, None]
    assert np.array_equal(again.reshape(64, 256), source)  # with the offset itself there is not even a rounding error
    integer = round_to_nearest(torch.from_numpy(source), Grid(bits=4, symmetric=False, group_size=32), "layer")
    assert np.abs(integer.dequantize() - source).max() > 1e-2  # no integer stands for the source's minimum


def test_a_real_offset_errs_at_most_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(8, 64) + 3
    grid = Grid(bits=4, symmetric=False, group_size=16, zero_point="real")
    quantized = round_to_nearest(weight, grid, "layer")
    error = np.abs(quantized.dequantize() - weight.numpy()).reshape(8, 4, 16)
    # Scale and offset are rounded to float16: up to 15 steps times 2^-11, and 2^-11 of the offset.
    bound = quantized.scale[:, :, None] * (0.5 + 15 * 2**-11) + np.abs(quantized.offset[:, :, None]) * 2**-11
    assert (error <= bound).all()
    assert quantized.zero_point.dtype == np.float32


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"groupsize": 32}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        Grid(**options)


def test_a_zero_point_that_would_be_ignored_is_refused():
    with pytest.raises(ValidationError, match="a symmetric grid has no zero point"):
        Grid(zero_point="real")
    with pytest.raises(ValidationError, match="their `zero_point` must be integer"):
        RoundToNearest(embeddings=Grid(symmetric=False, zero_point="real"))


def test_wrong_method_tag_is_refused():
    with pytest.raises(ValidationError, match="rtn"):
        RoundToNearest.model_validate({"method": "gptq"})
