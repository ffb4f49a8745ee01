import numpy as np
import pytest

from tasks.engines import OnnxRuntime, OpenVino
from tasks.engines.operators import read_operators
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint

PROMPT = np.arange(8, dtype=np.int64)[None]
NUM_PRODUCTS = 4 * 4 + 1  # of each block qkv, o, gate and up, down; and the LM head


@pytest.fixture(scope="module")
def four_bits(tiny_checkpoint, tmp_path_factory):
    out, data = tmp_path_factory.mktemp("w4"), tmp_path_factory.mktemp("calibration")
    np.save(data / "calibration.npy", np.zeros((1, 32), np.int32))
    method = RoundToNearest(weights=Grid(bits=4, group_size=32), embeddings=Grid(bits=8))
    quantize_checkpoint(checkpoint=tiny_checkpoint, data=data, method=method, out=out)
    return out


def test_onnxruntime_multiplies_floats_of_a_float_checkpoint(tiny_checkpoint, tmp_path):
    engine = OnnxRuntime(precision="float32")
    engine.compile(tiny_checkpoint, tmp_path)
    found = read_operators(tmp_path, engine, PROMPT, threads=1)
    assert found.count("float product") == NUM_PRODUCTS
    assert found.count("integer product", "weights to floats", "rounding") == 0
    assert found.count("attention") == 4
    assert found.elapsed_ms > 0
    assert found.share("float product") < 1


@pytest.mark.parametrize(("activations", "role"), [("int8", "integer product"), ("float32", "float product")])
def test_onnxruntime_multiplies_integers_where_asked(four_bits, tmp_path, activations, role):
    engine = OnnxRuntime(precision="float32", activations=activations)
    engine.compile(four_bits, tmp_path)
    found = read_operators(tmp_path, engine, PROMPT, threads=1)
    assert sum(group.num for group in found.groups if group.kind == "MatMulNBits" and group.role == role) >= 16
    assert found.count("weights to floats") == 0


def test_openvino_says_what_its_products_compute_in(four_bits, tmp_path):
    engine = OpenVino(precision="float32")
    engine.compile(four_bits, tmp_path)
    found = read_operators(tmp_path, engine, PROMPT, threads=1)
    products = [group for group in found.groups if "product" in group.role]
    assert sum(group.num for group in products) >= NUM_PRODUCTS
    assert any(group.kind.startswith("FullyConnectedCompressed (") for group in products)
    assert found.count("attention") == 4
