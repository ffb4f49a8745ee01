"""ONNX Runtime's MatMulNBits quantizer, on a graph of one product per linear layer; run by run.py in its environment.

These quantizers read weights alone, so a graph that only holds products shows what they make of a model. Embedding and
LM head are quantized as one weight, as ONNX Runtime GenAI's builder does with `shared_embeddings`; its choice of layers
for 8 bits ("mixed") is the builder's, too. Scales count as 16 bits, as in a float16 model, though CPUs' are float32.

Weights are read back from what MatMulNBits stores.
"""

from typing import Any

import numpy as np
import onnx
import torch
from contender import Contender, Floats, main
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

EMBEDDING = "model.embed_tokens.weight"
CONTENDERS: dict[str, dict[str, Any]] = {
    "onnxruntime-int8-sym-g32": {"algorithm": "default", "bits": 8, "symmetric": True, "block_size": 32},
    "onnxruntime-int4-sym-g32": {"algorithm": "default", "symmetric": True, "block_size": 32},
    "onnxruntime-int4-sym-g64": {"algorithm": "default", "symmetric": True, "block_size": 64},
    "onnxruntime-int4-sym-g128": {"algorithm": "default", "symmetric": True, "block_size": 128},
    "onnxruntime-int4-asym-g32": {"algorithm": "default", "symmetric": False, "block_size": 32},
    "onnxruntime-int4-asym-g64": {"algorithm": "default", "symmetric": False, "block_size": 64},
    "onnxruntime-int4-asym-g128": {"algorithm": "default", "symmetric": False, "block_size": 128},
    "onnxruntime-int4-hqq-g32": {"algorithm": "hqq", "block_size": 32},
    "onnxruntime-int4-hqq-g64": {"algorithm": "hqq", "block_size": 64},
    "onnxruntime-int4-kquant-g32": {"algorithm": "k_quant", "block_size": 32},
    "onnxruntime-int4-kquant-g32-head8": {"algorithm": "k_quant", "block_size": 32, "int8": "lm_head"},
    "onnxruntime-int4-kquant-g32-mixed": {"algorithm": "k_quant", "block_size": 32, "int8": "mixed"},
}


def quantize(contender: Contender) -> tuple[dict[str, Floats], float]:
    torch.set_num_threads(contender.threads)
    weights = contender.weights()
    linears = {name for name, values in weights.items() if values.ndim == 2}
    model = products({name: weights[name] for name in linears})
    options = contender.options
    block_size, symmetric = options["block_size"], options.get("symmetric", False)
    in_8_bits = sensitive(linears, options.get("int8"))
    algorithm: Any = None
    if options["algorithm"] == "hqq":
        algorithm = nbits.HQQWeightOnlyQuantConfig(block_size=block_size)
    if options["algorithm"] == "k_quant":
        algorithm = nbits.KQuantWeightOnlyQuantConfig(
            customized_weight_config={name: {"bits": 8} for name in in_8_bits}
        )
    with contender.measured():
        quantizer = nbits.MatMulNBitsQuantizer(
            model,
            bits=options.get("bits", 4),
            block_size=block_size,
            is_symmetric=symmetric,
            algo_config=algorithm,
        )
        quantizer.process()
    return read_weights(quantizer.model.model, weights)


def products(weights: dict[str, Floats]) -> onnx.ModelProto:
    """A graph with y = x W^T for every weight [out, in]; nodes and outputs have the weights' names."""
    nodes, initializers, outputs, inputs = [], [], [], {}
    for name, values in weights.items():
        out_features, in_features = values.shape
        x = f"x{in_features}"
        inputs[x] = helper.make_tensor_value_info(x, TensorProto.FLOAT, [None, in_features])
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(values.T), name + ".T"))
        nodes.append(helper.make_node("MatMul", [x, name + ".T"], [name], name=name))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, out_features]))
    graph = helper.make_graph(nodes, "products", list(inputs.values()), outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def sensitive(linears: set[str], which: str | None) -> set[str]:
    """Layers for 8 bits, as onnxruntime_genai/models/builders/base.py, make_matmul_mixed_precision, chooses them."""
    if which is None:
        return set()
    if which == "lm_head":
        return {EMBEDDING}
    layer_of = {name: int(name.split(".")[2]) for name in linears - {EMBEDDING}}
    num_layers = max(layer_of.values()) + 1
    chosen = {
        index
        for index in range(num_layers)
        if index < num_layers / 8 or index >= 7 * num_layers / 8 or (index - round(num_layers / 8)) % 3 == 2
    }
    # The builder fuses q, k and v, and so takes all three.
    kinds = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "down_proj.weight")
    return {EMBEDDING} | {name for name, index in layer_of.items() if index in chosen and name.endswith(kinds)}


def read_weights(model: onnx.ModelProto, floats: dict[str, Floats]) -> tuple[dict[str, Floats], float]:
    """De-quantized weights by their names, and the bits of the quantized and of the float ones."""
    kinds = {node.op_type for node in model.graph.node}
    if kinds != {"MatMulNBits"}:
        raise ValueError(f"Every product must have been quantized; the graph holds {sorted(kinds)}.")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    num_bits = sum((16 if values.dtype == np.float32 else 8) * values.size for values in tensors.values())
    weights = {name: values for name, values in floats.items() if values.ndim != 2}
    num_bits += sum(32 * values.size for values in weights.values())
    products = {node.output[0]: node for node in model.graph.node}
    return weights | {name: dequantize(node, tensors) for name, node in products.items()}, num_bits


def dequantize(node: onnx.NodeProto, tensors: dict[str, Any]) -> Floats:
    """The weight [out, in] of a MatMulNBits, as ONNX Runtime's ContribOperators.md stores it."""
    number = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, bits = number["N"], number["K"], number["bits"]
    _, packed, scale, *rest = (tensors.get(name) for name in node.input)
    scale = scale.reshape(rows, -1)
    num_blocks = scale.shape[1]
    integers = unpack(packed.reshape(rows, num_blocks, -1), bits).astype(np.float32)
    if not rest or rest[0] is None:
        zero_point = np.full((rows, num_blocks), 1 << (bits - 1), np.float32)
    elif rest[0].dtype == np.uint8:
        zero_point = unpack(rest[0].reshape(rows, -1), bits)[:, :num_blocks].astype(np.float32)
    else:
        zero_point = rest[0].reshape(rows, num_blocks)
    values: Floats = (integers - zero_point[..., None]) * scale[..., None]
    return values.reshape(rows, -1)[:, :columns]


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The integers of bytes along the last axis, the first in the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    integers = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return integers.reshape(*packed.shape[:-1], -1)


if __name__ == "__main__":
    main("ONNX Runtime", ["onnxruntime", "onnx"], CONTENDERS, quantize)
