import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.fake import SPEED, QuantizedEmbedding, QuantizedLinear, TrainableWeight, fake_quantize
from tasks.quantization.grid import Affine, integer_range

GRIDS = {
    "symmetric": Grid(bits=4, group_size=8),
    "per channel": Grid(bits=3),
    "signed scales": Grid(bits=4, group_size=8, full_range=True),
    "asymmetric": Grid(bits=4, group_size=8, symmetric=False),
    "real zero points": Grid(bits=4, group_size=8, symmetric=False, zero_point="real"),
}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def rounded(grid, out_features=6, in_features=16, seed=0):
    values = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) + 0.2
    return RoundToNearest().quantize(values, grid, "layer")


def trainable(grid, *, latent, **shape):
    stored = rounded(grid, **shape)
    return TrainableWeight(stored, torch.nn.Parameter(torch.from_numpy(stored.dequantize())) if latent else None)


def moved(weight, seed=1):
    """The same with every parameter somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in weight.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return weight


def test_a_group_by_hand():
    """s = 0.5 and integers from -8 to 7: 0.6 rounds to 1, 0.75 to the even 2, and 9 saturates at 7."""
    weight = torch.tensor([0.6, 0.75, 9.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    values = fake_quantize(weight, Affine(4, scale))
    assert values.tolist() == [0.5, 1.0, 3.5]
    values.sum().backward()
    assert weight.grad.tolist() == [1, 1, 0]
    assert scale.grad.item() == pytest.approx((1 - 1.2) + (2 - 1.5) + 7)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "real zero points"])
def test_gradients_are_those_of_the_papers(kind):
    """The formulas in the module's head, weight by weight."""
    torch.manual_seed(0)
    weight = (2 * torch.randn(5, 8)).requires_grad_()
    scale = (0.2 + torch.rand(5, 1)).requires_grad_()
    upstream = torch.randn(5, 8)
    offset = torch.randn(5, 1, requires_grad=True) if kind == "real zero points" else None
    zero_point = torch.randint(0, 8, (5, 1)).float() if kind == "asymmetric" else None
    affine = Affine(3, scale, zero_point, offset)
    values = fake_quantize(weight, affine)
    (values * upstream).sum().backward()

    lowest, highest = integer_range(3, kind == "symmetric")
    scale_grad, offset_grad, num_outside = np.zeros(5), np.zeros(5), 0
    for i in range(5):
        s = scale[i].item()
        z = 0 if zero_point is None else zero_point[i].item()
        o = 0 if offset is None else offset[i].item()
        for j in range(8):
            v = (weight[i, j].item() - o) / s
            inside = lowest <= round(v) + z <= highest
            q = min(max(round(v) + z, lowest), highest)
            num_outside += not inside
            g = upstream[i, j].item()
            assert values[i, j].item() == pytest.approx(s * (q - z) + o, abs=1e-5)
            assert weight.grad[i, j].item() == (pytest.approx(g) if inside else 0)
            scale_grad[i] += g * (round(v) - v if inside else q - z)
            offset_grad[i] += 0 if inside else g
    assert 5 < num_outside < 35
    assert scale.grad[:, 0].tolist() == pytest.approx(scale_grad, abs=1e-4)
    if offset is not None:
        assert offset.grad[:, 0].tolist() == pytest.approx(offset_grad, abs=1e-4)


@grids
def test_scales_alone_have_the_gradient_of_finite_differences(grid):
    """Weights are linear in scales and offsets, but for the rounding to float16, which differences leave out."""
    weight = trainable(grid, latent=False)
    upstream = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    (weight.rows() * upstream).sum().backward()
    stored, i, j = weight.stored(), 3, weight.log_scale.shape[1] - 1
    group = slice(j * (16 // (j + 1)), 16)
    integers, scale = stored.integers[i, group].astype(float), float(stored.scale[i, j])
    zero_point = 0.0 if stored.zero_point is None else float(stored.zero_point[i, j])

    def value(log_scale=0.0, shift=0.0):
        s = scale * math.exp(SPEED * log_scale)
        offset = -zero_point * (scale if stored.has_real_zero_point else s) + scale * SPEED * shift
        return float((s * integers + offset) @ upstream[i, group].double().numpy())

    for name, parameter in weight.named_parameters():
        difference = (value(**{name: 1e-5}) - value(**{name: -1e-5})) / 2e-5
        assert parameter.grad[i, j].item() == pytest.approx(difference, rel=1e-4, abs=1e-4), name


@grids
@pytest.mark.parametrize("latent", [False, True])
def test_untrained_weights_are_the_ones_that_were_quantized(grid, latent):
    before, after = rounded(grid), trainable(grid, latent=latent).stored()
    for attribute in ("integers", "scale", "zero_point"):
        assert np.array_equal(getattr(after, attribute), getattr(before, attribute)), attribute
    assert (after.bits, after.group_size) == (before.bits, before.group_size)


@grids
@pytest.mark.parametrize("latent", [False, True])
def test_what_is_stored_is_what_was_computed(grid, latent):
    weight = moved(trainable(grid, latent=latent))
    stored = weight.stored()
    assert np.array_equal(stored.dequantize(), weight.rows().detach().numpy())
    assert np.array_equal(stored.scale, stored.scale.astype(np.float16).astype(np.float32))
    assert np.array_equal(np.sign(stored.scale), np.sign(weight.first_scale.numpy()))
    assert np.array_equal(stored.integers, rounded(grid).integers) == (not latent)
    if stored.zero_point is not None and not stored.has_real_zero_point:
        assert np.array_equal(stored.zero_point, rounded(grid).zero_point)


@grids
def test_latent_weights_begin_at_the_original_ones_where_these_round_to_the_same(grid):
    stored = rounded(grid)
    weight = trainable(grid, latent=True)
    original = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)) + 0.2  # those that were rounded
    original[2, 5] += 100
    weight.begin_at_(original)
    assert np.array_equal(weight.stored().integers, stored.integers)
    same = weight.latent == original
    assert same.sum() == 6 * 16 - (not same[2, 5])
    if stored.integers[2, 5] < stored.integers.max():
        assert weight.latent[2, 5] == stored.dequantize()[2, 5]


def test_scales_stay_within_float16():
    weight = trainable(GRIDS["symmetric"], latent=False)
    with torch.no_grad():
        weight.log_scale[0], weight.log_scale[1] = -100.0, 100.0
    scale = weight.stored().scale
    assert (scale[0] == 2.0**-24).all()
    assert (scale[1] == 65504).all()


def test_latent_weights_have_scales_with_the_gradient_scale_of_lsq():
    """g = 1 / sqrt(N Qp); with every weight outside, dw'/ds is Qp, and dw'/dt that times s SPEED."""
    weight = trainable(Grid(bits=4, group_size=8), latent=True)
    with torch.no_grad():
        weight.latent.fill_(100.0)
    weight.rows().sum().backward()
    expected = 8 * 7 * weight.first_scale / math.sqrt(8 * 7) * SPEED
    torch.testing.assert_close(weight.log_scale.grad, expected)
    assert (weight.latent.grad == 0).all()


@grids
@pytest.mark.parametrize("latent", [False, True])
def test_layers_compute_and_learn_as_plain_ones_on_the_same_weight(grid, latent):
    torch.manual_seed(0)
    x, ids, bias = (
        torch.randn(3, 16, requires_grad=True),
        torch.tensor([[1, 4], [1, 0]]),
        torch.nn.Parameter(torch.ones(6)),
    )
    weight = moved(trainable(grid, latent=latent))
    layer, table = QuantizedLinear(weight, bias), QuantizedEmbedding(weight)
    plain = weight.rows()
    assert torch.equal(layer.weight, plain)
    assert torch.equal(table(ids), F.embedding(ids, plain))
    assert torch.equal(layer(x), F.linear(x, plain, bias))
    parameters = [x, bias, *weight.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum() + table(ids).square().sum(), parameters)
    theirs = torch.autograd.grad(
        F.linear(x, plain, bias).square().sum() + F.embedding(ids, plain).square().sum(), parameters
    )
    for one, other in zip(ours, theirs, strict=True):  # sums in another order
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_no_float_weight_is_kept_for_the_backward_pass():
    weight = trainable(GRIDS["symmetric"], latent=False, out_features=64, in_features=64)
    x = torch.randn(2, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        QuantizedLinear(weight)(x)
    assert max(kept, default=0) < 64 * 64
