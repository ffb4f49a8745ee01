import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.rtn import round_to_nearest


def test_hand_made_row():
    weight = round_to_nearest(torch.tensor([[0.5, -1.0, 0.25, 0.0]]), 4, True, None, "layer")
    # The scale is 1/7 rounded up to float16; the integers are the weights in steps of it.
    assert weight.scale.tolist() == [[pytest.approx(1 / 7, rel=2**-10)]]
    assert weight.integers.tolist() == [[3, -7, 2, 0]]


def test_every_group_has_its_own_scale():
    weight = torch.tensor([[1.0] * 8 + [100.0] * 8])
    quantized = round_to_nearest(weight, 4, True, 8, "layer")
    assert quantized.scale.shape == (1, 2)
    np.testing.assert_allclose(quantized.dequantize(), weight.numpy(), rtol=2**-9)


def test_constant_and_zero_rows_are_kept():
    weight = torch.stack([torch.zeros(16), torch.full((16,), 0.3), torch.full((16,), -0.3)])
    for symmetric in (True, False):
        quantized = round_to_nearest(weight, 8, symmetric, None, "layer")
        assert (quantized.dequantize()[0] == 0).all()
        np.testing.assert_allclose(quantized.dequantize(), weight.numpy(), rtol=2**-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(bad):
    weight = torch.zeros(4, 8)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"1 of 32 weights of up_proj are NaN or infinite"):
        round_to_nearest(weight, 8, True, None, "up_proj")


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_err_less(symmetric):
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    errors = [
        np.square(round_to_nearest(weight, bits, symmetric, 32, "layer").dequantize() - weight.numpy()).sum()
        for bits in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)


def test_bits_per_weight_count_scales_and_zero_points():
    weight = torch.randn(4, 64)
    assert round_to_nearest(weight, 4, False, 32, "layer").size_bits / weight.numel() == 4 + (16 + 4) / 32
    assert round_to_nearest(weight, 4, True, 32, "layer").size_bits / weight.numel() == 4 + 16 / 32
    assert round_to_nearest(weight, 8, True, None, "layer").size_bits / weight.numel() == 8 + 16 / 64


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"groupsize": 32}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        Grid(**options)


def test_wrong_method_tag_is_refused():
    with pytest.raises(ValidationError, match="rtn"):
        RoundToNearest.model_validate({"method": "gptq"})
