import itertools

import numpy as np
import pytest
import torch

from tasks.quantization import Grid
from tasks.quantization.ranges import covering, fit
from tasks.quantization.rtn import round_to_nearest


def error(weight, grid):
    return float((np.abs(round_to_nearest(weight, grid, "layer").dequantize() - weight.numpy()) ** 2.4).sum())


KINDS = {
    "symmetric": {},
    "full range": {"full_range": True},
    "asymmetric": {"symmetric": False},
    "real": {"symmetric": False, "zero_point": "real"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 4])
def test_a_narrowed_range_is_the_best_of_all_that_are_tried(bits, kind):
    torch.manual_seed(0)
    weight = torch.randn(5, 48)
    weight[1, 3] = 6.0
    grid = Grid(bits=bits, group_size=16, range="mse", **KINDS[kind])
    affine = fit(weight, grid, "layer")
    for row, group in itertools.product(range(5), range(3)):
        values = weight[row, 16 * group : 16 * group + 16]
        low, high = values.min(), values.max()
        middle = (low + high) / 2 if kind == "real" else torch.tensor(0.0)
        tried = {}
        for percent in range(80, 101):
            ends = [middle + percent / 100 * (end - middle) for end in (low, high)]
            one = covering(*ends, grid)
            tried[percent] = float((one.dequantize(one.quantize(values)) - values).abs().pow(2.4).sum())
        chosen = affine.each(lambda part, row=row, group=group: part[row, group])
        got = float((chosen.dequantize(chosen.quantize(values)) - values).abs().pow(2.4).sum())
        assert got == pytest.approx(min(tried.values()), rel=1e-4)


@pytest.mark.parametrize("seen", [False, True], ids=["unseen", "seen"])
@pytest.mark.parametrize(("symmetric", "zero_point"), [(True, "integer"), (False, "integer"), (False, "real")])
@pytest.mark.parametrize("group_size", [None, 16])
def test_a_search_in_pieces_finds_the_same_bits_as_one_of_all_weights(
    symmetric, zero_point, group_size, seen, monkeypatch
):
    torch.manual_seed(0)
    weight, importance = torch.randn(37, 48) ** 3, torch.rand(48) if seen else None
    grid = Grid(bits=3, symmetric=symmetric, group_size=group_size, zero_point=zero_point, range="mse")
    groups = weight.reshape(37, -1, group_size or 48)
    low, high = groups.aminmax(dim=2)
    middle = (low + high) / 2 if zero_point == "real" else torch.zeros_like(low)
    tried, errors = [(low, high)], []
    tried += [tuple(middle + p / 100 * (end - middle) for end in (low, high)) for p in range(99, 79, -1)]
    for ends in tried:
        affine = covering(*ends, grid).expanded()
        difference = (affine.dequantize(affine.quantize(groups)) - groups).abs()
        weighed = difference.pow(2.4) if not seen else difference.square() * importance.reshape(groups.shape[1:])
        errors.append(weighed.sum(dim=2))
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    expected = covering(*(torch.stack(ends).gather(0, best)[0] for ends in zip(*tried, strict=True)), grid)
    assert best.max() > 0
    for num_weights in (1, 5 * 48, 2**17):
        monkeypatch.setattr("tasks.quantization.ranges.WEIGHTS_AT_ONCE", num_weights)
        found = fit(weight, grid, "layer", importance)
        assert torch.equal(found.scale, expected.scale)
        for part in ("zero_point", "offset"):
            assert getattr(found, part) is getattr(expected, part) is None or torch.equal(
                getattr(found, part), getattr(expected, part)
            )


def test_large_inputs_decide_the_range():
    """Two outliers, one on an input that is always zero: only the other's range is kept."""
    weight = torch.tensor([[8.0] + [0.9, -1.1, 0.7] * 5, [8.0] + [0.9, -1.1, 0.7] * 5])
    grid = Grid(bits=3, range="mse")
    unseen = torch.ones(16)
    unseen[0] = 0
    seen = torch.ones(16)
    seen[0] = 1e4
    assert fit(weight, grid, "layer", importance=unseen).scale[0] < 0.9 * fit(weight, grid, "layer", seen).scale[0]
    assert fit(weight, grid, "layer", seen).scale[0] == fit(weight, Grid(bits=3), "layer").scale[0]


def test_narrowing_errs_less():
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    for options in ({"bits": 3}, {"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 32, "symmetric": False}):
        assert error(weight, Grid(**options, range="mse")) < error(weight, Grid(**options))


def test_a_range_that_loses_nothing_is_not_narrowed():
    rng = np.random.default_rng(0)
    integers = rng.integers(0, 16, (8, 64))
    integers[:, 0::32], integers[:, 1::32] = 0, 15
    weight = torch.from_numpy((integers * 0.125 - 0.5).astype(np.float32))
    grid = Grid(bits=4, symmetric=False, group_size=32, zero_point="real", range="mse")
    quantized = round_to_nearest(weight, grid, "layer")
    assert np.array_equal(quantized.integers, integers)
    assert np.array_equal(quantized.dequantize(), weight.numpy())


def test_many_rows_are_searched_in_parts(monkeypatch):
    torch.manual_seed(0)
    weight, grid = torch.randn(10, 32), Grid(bits=3, group_size=16, range="mse")
    whole = fit(weight, grid, "layer").scale
    monkeypatch.setattr("tasks.quantization.ranges.ROWS_PER_SEARCH", 3)
    assert torch.equal(fit(weight, grid, "layer").scale, whole)


def test_constant_groups_have_a_grid():
    weight = torch.stack([torch.zeros(16), torch.full((16,), 0.3), torch.full((16,), -0.3)])
    for symmetric in (True, False):
        grid = Grid(bits=4, symmetric=symmetric, range="mse")
        np.testing.assert_allclose(round_to_nearest(weight, grid, "layer").dequantize(), weight.numpy(), rtol=2**-9)


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 4, "range": "mse"}])
def test_one_scale_per_tensor_is_that_of_the_weight_as_one_row(options):
    torch.manual_seed(0)
    weight = torch.randn(6, 16)
    whole = fit(weight, Grid(**options, per_tensor=True), "layer")
    row = fit(weight.reshape(1, -1), Grid(**options), "layer")
    assert whole.scale.shape == (6, 1)
    assert (whole.scale == row.scale).all()
    if whole.zero_point is not None:
        assert (whole.zero_point == row.zero_point).all()


def test_groups_of_a_whole_tensor_are_refused():
    with pytest.raises(ValueError, match=r"drop it, or `group_size` \(32\)"):
        Grid(per_tensor=True, group_size=32)


HALF_QUADRATIC = Grid(bits=3, symmetric=False, group_size=16, zero_point="real", range="half-quadratic")


def norm_of_error(weight, grid):
    return np.abs(round_to_nearest(weight, grid, "layer").dequantize() - weight.numpy()) ** 0.7


def test_half_quadratic_offsets_are_those_of_the_splitting_written_as_loops():
    torch.manual_seed(0)
    weight = torch.randn(3, 32)
    affine = fit(weight, HALF_QUADRATIC, "layer")
    for row, group in itertools.product(range(3), range(2)):
        values = weight[row, 16 * group : 16 * group + 16].numpy().astype(np.float64)
        scale, offset, beta = float(affine.scale[row, group]), float(np.float16(values.min())), 10.0
        found = []
        for _ in range(20):
            offset = float(np.float16(offset))
            integers = [min(max(round((value - offset) / scale), 0), 7) for value in values]
            errors = [value - offset - q * scale for value, q in zip(values, integers, strict=True)]
            found.append((sum(abs(e) ** 0.7 for e in errors), offset))
            allowed = [np.sign(e) * max(abs(e) - max(abs(e), 1e-12) ** -0.3 / beta, 0) for e in errors]
            offset = sum(v - a - q * scale for v, a, q in zip(values, allowed, integers, strict=True)) / 16
            beta *= 1.01
        assert min(found)[1] == pytest.approx(float(affine.offset[row, group]), abs=scale / 50)


def test_half_quadratic_never_errs_more():
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    weight[:, ::16] *= 8
    before = norm_of_error(weight, HALF_QUADRATIC.model_copy(update={"range": "min-max"}))
    after = norm_of_error(weight, HALF_QUADRATIC)
    groups_before, groups_after = (errors.reshape(-1, 16).sum(axis=1) for errors in (before, after))
    assert (groups_after <= groups_before * (1 + 1e-5)).all()
    assert after.sum() < 0.97 * before.sum()


def test_half_quadratic_needs_a_real_offset():
    with pytest.raises(ValueError, match="set `zero_point: real`"):
        Grid(bits=4, symmetric=False, group_size=32, range="half-quadratic")
