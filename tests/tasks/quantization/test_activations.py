import pytest
import torch
from pydantic import ValidationError

from tasks.calibration.statistics import Histogram
from tasks.quantization import Activations, Gptq, Grid, RoundToNearest
from tasks.quantization.activations import Inputs, covered, fitted, per_token, relative_error, static

INT8 = {"num_bits": 8, "type": "int"}
FP8 = {"num_bits": 8, "type": "float"}


def counted(values):
    histogram = Histogram()
    histogram.update(values)
    return histogram


def library(x, arguments, scale=None, zero_point=None):
    """What the compressed-tensors library gives back, which is what stock transformers computes."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(**arguments)
    if scale is None:
        scale, zero_point = compute_dynamic_scales_and_zp(x, args, None)
    return fake_quantize(x, torch.as_tensor(scale), zero_point, args)


def test_static_inputs_saturate_and_round_half_to_even():
    x = torch.tensor([0.0, 0.24, 0.25, 0.75, -0.75, 100.0, -100.0])
    assert static(x, 0.5, 0, "int8").tolist() == [0.0, 0.0, 0.0, 1.0, -1.0, 63.5, -64.0]
    assert static(x, 0.5, -100, "int8").tolist() == [0.0, 0.0, 0.0, 1.0, -1.0, 100.0, -14.0]


def test_tokens_do_not_share_a_scale():
    x = torch.tensor([[127.5, 1.0, -0.4], [0.0, 0.0, 0.0], [0.001275, 0.0, 1e-6]])
    rounded = per_token(x, "int8")
    assert rounded[0].tolist() == [127.0, 1.0, 0.0]  # the scale is 1; the largest saturates by half a step
    assert rounded[1].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(rounded[2], torch.tensor([0.00127, 0.0, 0.0]))


@pytest.mark.parametrize(("format", "kind"), [("int8", INT8), ("float8_e4m3", FP8)])
def test_rounding_is_that_of_compressed_tensors_to_the_last_bit(format, kind):
    torch.manual_seed(0)
    x = torch.randn(3, 50, 64) * torch.logspace(-3, 3, 50)[:, None]
    per = library(x, kind | {"strategy": "token", "dynamic": True, "symmetric": True})
    assert torch.equal(per_token(x, format), per)
    fixed = library(x, kind | {"strategy": "tensor", "symmetric": True}, scale=0.123)
    assert torch.equal(static(x, torch.tensor(0.123), 0, format), fixed)


def test_asymmetric_rounding_is_that_of_compressed_tensors():
    torch.manual_seed(0)
    x = torch.randn(3, 50, 64)
    shifted = library(x, INT8 | {"strategy": "tensor", "symmetric": False}, 0.02, torch.tensor([-37]))
    assert torch.equal(static(x, torch.tensor(0.02), -37, "int8"), shifted)


def test_float8_keeps_its_own_values_and_rounds_others_to_the_nearest():
    values = torch.tensor([0.0, 2.0**-9, 0.015625, 1.0, 1.125, 240.0, 448.0, -448.0])
    assert torch.equal(static(values, 1.0, 0, "float8_e4m3"), values)
    x = torch.tensor([1.06, 1.07, 500.0])  # between 1 and 1.125; beyond the largest
    assert static(x, 1.0, 0, "float8_e4m3").tolist() == [1.0, 1.125, 448.0]
    assert static(x * 0.5, 0.5, 0, "float8_e4m3").tolist() == [0.5, 0.5625, 224.0]


@pytest.mark.parametrize(
    ("options", "zero_point"),
    [
        (Activations(static=("*",)), 0),
        (Activations(static=("*",), symmetric=False), -64),
        (Activations(format="float8_e4m3", static=("*",)), 0),
    ],
)
def test_static_grid_covers_the_calibrated_range_with_a_float16_scale(options, zero_point):
    inputs = fitted(counted(torch.linspace(-0.5, 1.5, 1000).view(1, 10, 100)), options)
    low, high = covered(inputs)
    half_step = 0 if options.symmetric else 0.004  # the zero point is rounded
    assert inputs.zero_point == zero_point
    assert low <= (-1.5 if options.symmetric else -0.5) + half_step
    assert 1.5 - half_step <= high <= 1.5 * (1 + 2 / 1024) + half_step
    assert torch.tensor(inputs.scale).half().float() == inputs.scale


def test_relative_error_is_that_of_the_inputs():
    torch.manual_seed(0)
    x = torch.randn(4, 50, 64)
    for inputs in (Inputs("int8", 0.02), Inputs("int8", 0.03, 5, symmetric=False)):
        exact = float((inputs.rounded(x) - x).norm() / x.norm())
        assert relative_error(counted(x), inputs) == pytest.approx(exact, rel=0.02)  # values count as middles of bins


def test_constant_zero_inputs_have_a_scale():
    for options in (Activations(static=("*",)), Activations(format="float8_e4m3", static=("*",))):
        assert fitted(counted(torch.zeros(1, 4, 8)), options).scale == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range": "mse"}, "`range` is of static scales"),
        ({"static": ["*"], "percentile": 99.9}, "`percentile` is of `range: percentile`"),
        ({"symmetric": False}, "scales per token have no zero points"),
        ({"format": "float8_e4m3", "static": ["*"], "symmetric": False}, "FP8 has no zero points"),
        ({"format": "float8_e4m3", "static": ["*"], "range": "entropy"}, "`range: entropy` weighs outliers"),
        ({"static": ["*"], "range": "percentile", "percentile": 101}, "less than or equal to 100"),
        ({"smooth": 1.0}, "less than 1"),
    ],
)
def test_an_option_that_would_be_ignored_is_an_error(options, message):
    with pytest.raises(ValidationError, match=message):
        Activations.model_validate(options)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"weights": {"bits": 4, "group_size": 32}}, "got 4 bits, group_size 32, symmetric True"),
        ({"weights": {"symmetric": False}}, "symmetric False"),
        ({"weights": {"format": "float8_e4m3"}}, "must both be integers or both FP8"),
        ({"activations": {"format": "float8_e4m3"}}, "must both be integers or both FP8"),
        ({"weights": {"format": "float8_e4m3", "bits": 4}}, "FP8 has 8 bits, one scale per row"),
        ({"embeddings": {"format": "float8_e4m3"}}, "embeddings are integers or float32"),
    ],
)
def test_activations_need_weights_that_integer_products_take(method, message):
    with pytest.raises(ValidationError, match=message):
        RoundToNearest.model_validate({"activations": {}} | method)


def test_inputs_are_scaled_by_one_method_only():
    with pytest.raises(ValidationError, match=r"`awq` and `activations\.smooth` scale the same inputs"):
        Gptq(weights=Grid(), awq=True, activations=Activations(smooth=0.5))


def test_gptq_is_of_integers():
    with pytest.raises(ValidationError, match="GPTQ rounds to integers; use `method: rtn`"):
        Gptq(weights=Grid(format="float8_e4m3"))


def test_float8_weights_are_the_nearest_values_of_their_rows_scale():
    torch.manual_seed(0)
    weight = torch.randn(5, 32) * torch.logspace(-2, 2, 5)[:, None]
    weight[3] = 0
    stored = RoundToNearest().quantize(weight, Grid(format="float8_e4m3"), "x")
    scale = torch.from_numpy(stored.scale)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()]
    assert (weight.abs().amax(1) <= 448 * scale[:, 0]).all()
    for row in range(5):
        nearest = (weight[row][:, None] / scale[row] - values).abs().amin(1)
        error = (torch.from_numpy(stored.dequantize())[row] - weight[row]).abs() / scale[row]
        torch.testing.assert_close(error, nearest, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="1 of 160 weights of x are NaN"):
        RoundToNearest().quantize(
            weight.index_fill(0, torch.tensor(2), 0).flatten().index_fill(0, torch.tensor(7), float("nan")).view(5, 32),
            Grid(format="float8_e4m3"),
            "x",
        )
