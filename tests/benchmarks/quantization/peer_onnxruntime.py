"""ONNX Runtime's MatMulNBits quantizer, on a graph of one product per linear layer; run by run.py in its environment.

These quantizers read weights alone, so a graph that only holds products shows what they make of a model. Embedding and
LM head are quantized as one weight, as ONNX Runtime GenAI's builder does with `shared_embeddings`; its choice of layers
for 8 bits ("mixed") is the builder's, too. Scales count as 16 bits, as in a float16 model, though CPUs' are float32.

Weights are read back by multiplying identities with the quantized products, in float32.
"""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from contender import Contender, Floats, main
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
    num_bits = 0.0
    for initializer in model.graph.initializer:
        values = numpy_helper.to_array(initializer)
        num_bits += 16 * values.size if values.dtype == np.float32 else 8 * values.nbytes
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    identities = {x.name: np.eye(x.shape[1], dtype=np.float32) for x in session.get_inputs()}
    weights = {name: values for name, values in floats.items() if values.ndim != 2}
    num_bits += sum(32 * values.size for values in weights.values())
    for output in session.get_outputs():
        weights[output.name] = session.run([output.name], identities)[0].T
    return weights, num_bits


if __name__ == "__main__":
    main("ONNX Runtime", ["onnxruntime", "onnx"], CONTENDERS, quantize)
