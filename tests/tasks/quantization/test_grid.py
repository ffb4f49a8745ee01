import numpy as np
import pytest
import torch

from tasks.quantization import grid

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def test_symmetric_example():
    """x = 0.75 on a grid of 0.25 is three steps."""
    assert grid.quantize(torch.tensor([0.75]), torch.tensor([0.25]), None, bits=8).tolist() == [3]


def test_real_offset_example_is_a_zero_point_of_minus_one():
    """round((x - z) / s) for x = 0.75, s = 0.25, z = 0.25 is 2; the ONNX form says it with z = -s * zero_point."""
    x, s, z = 0.75, 0.25, 0.25
    assert round((x - z) / s) == 2
    assert grid.quantize_from(torch.tensor([x]), torch.tensor([z]), torch.tensor([s]), bits=8).tolist() == [2]
    zero_point = torch.tensor([-z / s])
    assert zero_point.item() == -1
    assert (torch.round(torch.tensor([x]) / s) + zero_point).item() == 2


def test_asymmetric_example():
    """[-0.5, 1.5] on 8 bits: scale 2/255, zero point 64; zero is exact, the upper end saturates."""
    low, high = torch.tensor(-0.5), torch.tensor(1.5)
    scale = grid.asymmetric_scale(low, high, 8)
    zero_point = grid.asymmetric_zero_point(low, scale, 8)
    assert scale.item() == pytest.approx(2 / 255)
    assert zero_point.item() == 64
    integers = grid.quantize(torch.tensor([0.0, 1.5]), scale, zero_point, 8)
    assert integers.tolist() == [64, 255]
    assert grid.dequantize(integers, scale, zero_point).tolist() == [0.0, pytest.approx(1.49804, abs=1e-5)]


def test_eight_bits_are_four_times_smaller_than_float32():
    weight = torch.randn(16, 32)
    integers = grid.quantize(weight, torch.tensor(0.1), None, 8)
    assert weight.nbytes / integers.nbytes == 4


def test_halves_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert grid.quantize(x, torch.tensor(1.0), None, 8).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_the_definition_written_as_loops(bits, symmetric):
    torch.manual_seed(bits)
    x = torch.randn(3, 8)
    low, high = x.aminmax(dim=1)
    scale = grid.symmetric_scale(low, high, bits) if symmetric else grid.asymmetric_scale(low, high, bits)
    zero_point = None if symmetric else grid.asymmetric_zero_point(low, scale, bits)
    got = grid.quantize(x, scale[:, None], None if zero_point is None else zero_point[:, None], bits)
    for i in range(3):
        row = x[i].numpy()
        if symmetric:
            smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            s, z = np.float32(max(abs(row.min()), abs(row.max()))) / np.float32(largest), 0
        else:
            smallest, largest = 0, 2**bits - 1
            lo, hi = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
            s = (hi - lo) / np.float32(largest)
            z = int(min(max(np.rint(smallest - lo / s), smallest), largest))
        for j in range(8):
            expected = min(max(int(np.rint(row[j] / s)) + z, smallest), largest)
            assert got[i, j].item() == expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_step_and_zero_is_exact(bits, symmetric):
    torch.manual_seed(0)
    x = torch.randn(64, 32) * torch.logspace(-6, 2, 64)[:, None]
    x[:, 5] = 0
    low, high = x.aminmax(dim=1)
    scale = grid.storable((grid.symmetric_scale if symmetric else grid.asymmetric_scale)(low, high, bits))[:, None]
    zero_point = None if symmetric else grid.asymmetric_zero_point(low[:, None], scale, bits)
    integers = grid.quantize(x, scale, zero_point, bits)
    recovered = grid.dequantize(integers, scale, zero_point)
    assert ((recovered - x).abs() <= scale * (0.5 + 1e-5)).all()  # float32 rounding of x / scale
    assert (recovered[:, 5] == 0).all()
    assert torch.equal(grid.quantize(recovered, scale, zero_point, bits), integers)
    if symmetric:
        assert integers.min() >= -(2 ** (bits - 1)) + 1  # the restricted range


def test_a_full_range_uses_all_integers():
    """The largest value, 4, becomes -8 by a scale of -0.5, and -3.5 the largest integer, 7."""
    x = torch.tensor([4.0, -3.5, 0.5, -0.9])
    scale = grid.full_range_scale(x.min(), x.max(), 4)
    assert scale.item() == -0.5
    integers = grid.quantize(x, scale, None, 4)
    assert integers.tolist() == [-8, 7, -1, 2]
    assert grid.dequantize(integers, scale, None).tolist() == [4.0, -3.5, 0.5, -1.0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_full_range_is_exact_at_its_largest_value_and_errs_by_a_step_at_most(bits):
    torch.manual_seed(bits)
    x = torch.randn(64, 32)
    x[:, 5] = 0
    low, high = x.aminmax(dim=1, keepdim=True)
    scale = grid.storable(grid.full_range_scale(low, high, bits))
    assert ((scale < 0) == (high > -low)).all()
    recovered = grid.dequantize(integers := grid.quantize(x, scale, None, bits), scale, None)
    largest = x.abs().argmax(dim=1, keepdim=True)
    assert (integers.gather(1, largest) == -(2 ** (bits - 1))).all()
    # One side ends a step below the other; float16 scales are up to 2 ** -10 wider.
    assert ((recovered - x).abs() <= scale.abs() * (1 + 2.0**-10 * 2 ** (bits - 1))).all()
    assert (recovered[:, 5] == 0).all()
    assert torch.equal(grid.quantize(recovered, scale, None, bits), integers)


def test_rows_of_zeros_keep_a_scale_of_one():
    zeros = torch.zeros(2)
    for scale_of in (grid.symmetric_scale, grid.full_range_scale, grid.asymmetric_scale):
        assert scale_of(zeros, zeros, 8).tolist() == [1, 1]


def test_storable_scales_are_float16_values_never_smaller():
    scale = torch.cat([torch.rand(1000), torch.logspace(-12, 4, 100)])
    stored = grid.storable(scale)
    assert torch.equal(stored.half().float(), stored)
    assert (stored >= scale).all()
    assert torch.equal(grid.storable(-scale), -stored)
    normal = scale > 6.2e-5
    assert (stored[normal] <= scale[normal] * (1 + 2**-10)).all()


def test_storable_refuses_scales_beyond_float16():
    with pytest.raises(ValueError, match=r"at most 65504; got 7e\+04"):
        grid.storable(torch.tensor([1.0, 7e4]))


def test_group_size_that_does_not_divide_names_layer_and_alternatives():
    with pytest.raises(ValueError, match=r"up_proj has 96 inputs, got 64\. Use one of 8, 16, 24, 32, 48, 96,"):
        grid.in_groups(torch.zeros(2, 96), 64, "up_proj")


@pytest.mark.parametrize("group_size", [None, 16, 1])
@pytest.mark.parametrize(
    ("kind", "full_range"),
    [("INT8", False), ("INT8", True), ("UINT8", False), ("INT4", False), ("INT4", True), ("UINT4", False)],
)
def test_bit_exact_with_onnx_runtime(kind, full_range, group_size):
    torch.manual_seed(1)
    x = torch.randn(24, 64) * torch.logspace(-3, 1, 24)[:, None]
    x[0, :4] = torch.tensor([0.5, 1.5, 2.5, -2.5])  # ties
    x[2], x[3], x[4] = 0, 0.3, -7.0  # constants
    bits, symmetric = int(kind.removeprefix("U").removeprefix("INT")), kind.startswith("INT")
    groups = grid.in_groups(x, group_size, "x")
    low, high = groups.aminmax(dim=2)
    symmetric_scale = grid.full_range_scale if full_range else grid.symmetric_scale
    scale = grid.storable((symmetric_scale if symmetric else grid.asymmetric_scale)(low, high, bits))
    scale[0] = 1
    scale[1] /= 2  # saturates
    zero_point = None if symmetric else grid.asymmetric_zero_point(low, scale, bits)
    points = torch.zeros_like(scale) if zero_point is None else zero_point
    # In groups of one element, ONNX Runtime 1.31 turns infinities into the smallest 4-bit integer; else it saturates.
    beyond = 1e4 if bits == 4 and group_size == 1 else float("inf")
    x[5, 1], x[5, 2] = beyond, -beyond

    integers = grid.quantize(groups, scale[..., None], None if symmetric else points[..., None], bits)
    recovered = grid.dequantize(integers, scale[..., None], None if symmetric else points[..., None])

    if group_size is None:
        scale, points, layout = scale[:, 0], points[:, 0], {"axis": 0}
    else:
        layout = {"axis": 1, "block_size": group_size}
    got_integers, got = _onnx_runtime(x, scale, points, getattr(onnx.TensorProto, kind), layout)
    assert np.array_equal(got_integers, integers.reshape(x.shape).numpy().astype(np.int32))
    assert np.array_equal(got, recovered.reshape(x.shape).numpy())


def _onnx_runtime(x, scale, points, kind, layout):
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"], **layout),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["y"], **layout),
        helper.make_node("Cast", ["q"], ["integers"], to=TensorProto.INT32),
    ]
    graph = helper.make_graph(
        nodes,
        "grid",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [
            helper.make_tensor_value_info("integers", TensorProto.INT32, list(x.shape)),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, list(x.shape)),
        ],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, scale.shape, scale.flatten().tolist()),
            helper.make_tensor("zero_point", kind, points.shape, points.int().flatten().tolist()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})
