"""Integers in exported graphs: which they are, how they are multiplied, and what the engines make of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tasks.engines.encoder import EncoderSession, PyTorchEncoder, compare_encoders
from tasks.engines.encoder_decoder import EncoderDecoderSession, Greedy, compare_with_pytorch
from tasks.engines.exported import load_exported, write_graphs
from tasks.engines.exported_weights import with_integers
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.exported import quantize_exported
from tasks.quantization.exported_checkpoint import ExportedCheckpoint, read_checkpoint

GRIDS = {
    "int8": Grid(bits=8),
    "uint8": Grid(bits=8, symmetric=False),
    "int8 in groups": Grid(bits=8, group_size=16),
    "int4": Grid(bits=4, group_size=16),
    "uint4": Grid(bits=4, group_size=16, symmetric=False),
    "int4 per channel": Grid(bits=4),
}
ENGINES = ("onnxruntime", "openvino")
EXACT = 2e-5  # answers of BERT are below 10
ROUNDED = 0.1  # inputs of 8 bits are off by 0.4 % of the largest at most; two blocks add up
START = Greedy(decoder_start_token_id=0, eos_token_ids=(1,), pad_token_id=0)


@pytest.fixture(scope="module")
def quantized(
    transformer_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], ExportedCheckpoint]:
    found: dict[tuple[str, str], ExportedCheckpoint] = {}

    def read(model: str, grid: str) -> ExportedCheckpoint:
        if (model, grid) not in found:
            out = tmp_path_factory.mktemp("quantized")
            method = RoundToNearest(weights=GRIDS[grid])
            quantize_exported(checkpoint=transformer_checkpoint(model), method=method, out=out)
            found[model, grid] = read_checkpoint(out)
        return found[model, grid]

    return read


@pytest.fixture
def compiled(
    exported: Callable[..., Any], quantized: Callable[[str, str], ExportedCheckpoint], tmp_path: Path
) -> Callable[..., Any]:
    """A session of the graph of a class with the integers of a grid, and the checkpoint that holds them."""

    def compile_and_load(model: str, grid: str, engine: Any, **options: Any) -> Any:
        source = quantized(model, grid)
        greedy = None if source.is_encoder else START
        write_graphs(exported(model).graphs, source, engine, tmp_path, greedy=greedy, **options)
        return load_exported(tmp_path, engine, 1), source

    return compile_and_load


def batch() -> tuple[np.ndarray, np.ndarray]:
    input_ids = np.random.default_rng(0).integers(3, 90, (3, 24))
    return input_ids, (np.arange(24) < np.array([[24], [17], [1]])).astype(np.int64)


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grid", GRIDS)
def test_encoder_computes_with_the_integers_of_its_checkpoint(
    grid: str, engine: str, activations: str, compiled: Callable[..., tuple[EncoderSession, ExportedCheckpoint]]
) -> None:
    session, source = compiled("BertForMaskedLM", grid, engine, activations=activations)
    parity = compare_encoders(session, PyTorchEncoder(source, None), *batch())
    assert parity.max_abs_error < (EXACT if activations == "float32" else ROUNDED)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", ["T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"])
@pytest.mark.parametrize("grid", ["int8", "uint4"])
def test_encoder_decoder_computes_with_the_integers_of_its_checkpoint(
    grid: str, model: str, engine: str, compiled: Callable[..., tuple[EncoderDecoderSession, ExportedCheckpoint]]
) -> None:
    session, source = compiled(model, grid, engine, activations="float32")
    parity = compare_with_pytorch(session, source, *batch(), num_tokens=18)
    assert parity.max_abs_error < 5e-4  # T5's logits are up to 30
    assert parity.top1_agreement == 1


def test_inputs_of_16_bits_change_next_to_nothing(
    compiled: Callable[..., tuple[EncoderDecoderSession, ExportedCheckpoint]],
) -> None:
    session, source = compiled("MarianMTModel", "int8", "onnxruntime", activations="int8")
    parity = compare_with_pytorch(session, source, *batch(), num_tokens=18)
    assert parity.max_abs_error < 5e-3
    assert parity.top1_agreement == 1


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("grid", GRIDS)
def test_the_file_holds_every_integer_and_no_float_weight(
    grid: str, exported: Callable[..., Any], quantized: Callable[[str, str], ExportedCheckpoint]
) -> None:
    source = quantized("BertForMaskedLM", grid)
    found = initializers(with_integers(exported("BertForMaskedLM").graphs["encoder"], source.quantized, "float32"))
    assert len(source.quantized) == 13
    for module, weight in source.quantized.items():
        stored = found[f"model.{module}.weight.integers"].astype(np.int16)
        expected = weight.integers if module.endswith("embeddings") else weight.integers.T
        np.testing.assert_array_equal(stored, expected)
        assert f"model.{module}.weight" not in found
    floats = {
        name for name, value in found.items() if value.dtype == np.float32 and value.ndim == 2 and value.size > 96
    }
    floats -= {name for name in floats if name.endswith(".scale")}
    assert floats == {
        "model.bert.embeddings.position_embeddings.weight",
        "model.cls.predictions.transform.dense.weight",
    }


def test_tied_float_weight_is_held_once(exported: Callable[..., Any]) -> None:
    model = with_integers(exported("BertForMaskedLM").graphs["encoder"], {}, "float32")
    tables = [name for name, value in initializers(model).items() if set(value.shape) == {96, 32}]
    assert tables == ["model.bert.embeddings.word_embeddings.weight"]


@pytest.mark.parametrize("inputs", ["int8", "int16"])
def test_product_of_integers_by_hand(inputs: Any) -> None:
    """x = [4, -2, 1] @ [[1, 0], [2, 0], [0, 3]] with scales 0.5 and 2."""
    import onnxruntime

    from tasks.engines.exported_graph import ExportedGraph
    from tasks.quantization.checkpoint_format import QuantizedWeight

    integers = np.array([[1, 2, 0], [0, 0, 3]], dtype=np.int8)
    weight = QuantizedWeight(integers, np.array([[0.5], [2]], dtype=np.float32), None, 8, None)
    helper = onnx.helper
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "model.layer.weight"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", floats, ["batch", "length", 3])],
        [helper.make_tensor_value_info("y", floats, ["batch", "length", 2])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.dequantize().T), "model.layer.weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    exported = ExportedGraph(model, {"layer": "model.layer.weight"}, ("layer",), {}, ("y",))
    session = onnxruntime.InferenceSession(with_integers(exported, {"layer": weight}, inputs).SerializeToString())
    x = np.array([[[4, -2, 1], [0, 0, 0]]], dtype=np.float32)
    [found] = session.run(None, {"x": x})
    tolerance = {"int8": 4 / 255 / 2 * 7, "int16": 4 / 64516 * 7}[inputs]  # half a step of x times the weights' sum
    np.testing.assert_allclose(found[0], [[0, 6], [0, 0]], atol=tolerance)
    assert [tensor.name for tensor in model.graph.initializer] == ["model.layer.weight"], "the argument was changed"


@pytest.mark.parametrize("engine", ENGINES)
def test_files_shrink_to_the_size_of_the_integers(
    engine: str, exported: Callable[..., Any], quantized: Callable[[str, str], ExportedCheckpoint], tmp_path: Path
) -> None:
    found = exported("BertForMaskedLM")
    sizes = {}
    for name, source in {"float": found.source, "int8": quantized("BertForMaskedLM", "int8")}.items():
        (tmp_path / name).mkdir()
        write_graphs(found.graphs, source, engine, tmp_path / name)
        [file] = [*(tmp_path / name).glob("*.data"), *(tmp_path / name).glob("*.bin")]
        sizes[name] = file.stat().st_size
    num_quantized = sum(weight.integers.size for weight in quantized("BertForMaskedLM", "int8").quantized.values())
    assert sizes["float"] - sizes["int8"] > 2.7 * num_quantized  # 3 bytes less of each, scales more
