"""NNCF's weight compression of an OpenVINO model; run by run.py in its own environment.

The float model is Slimline's own OpenVINO graph, whose products are named by their modules. Embedding and LM head are
one weight there, which NNCF gives 8 bits by default.
"""

from typing import Any

import nncf
import numpy as np
import openvino
from contender import Contender, Floats, main
from nncf import CompressWeightsMode, GroupSizeFallbackMode
from nncf.quantization.advanced_parameters import AdvancedCompressionParameters

ALL = {"awq": True, "scale_estimation": True, "gptq": True}
SYM_64: dict[str, Any] = {"mode": "int4_sym", "group_size": 64}
ASYM_32: dict[str, Any] = {"mode": "int4_asym", "group_size": 32}
CONTENDERS: dict[str, dict[str, Any]] = {
    "nncf-int8": {"mode": "int8_asym"},
    # 128 is NNCF's default of group_size, which a hidden size of 576 refuses without a fallback.
    "nncf-int4-sym-g128-adjusted": {"mode": "int4_sym", "group_size": 128, "fallback": "adjust"},
    "nncf-int4-sym-g64": SYM_64,
    "nncf-int4-sym-g64-awq": SYM_64 | {"awq": True},
    "nncf-int4-sym-g64-gptq": SYM_64 | {"gptq": True},
    "nncf-int4-sym-g64-awq-se": SYM_64 | {"awq": True, "scale_estimation": True},
    "nncf-int4-sym-g64-all": SYM_64 | ALL,
    "nncf-int4-asym-g64": ASYM_32 | {"group_size": 64},
    "nncf-int4-asym-g64-awq-se": ASYM_32 | {"group_size": 64, "awq": True, "scale_estimation": True},
    "nncf-int4-asym-g32": ASYM_32,
    "nncf-int4-asym-g32-awq": ASYM_32 | {"awq": True},
    "nncf-int4-asym-g32-gptq": ASYM_32 | {"gptq": True},
    "nncf-int4-asym-g32-awq-se": ASYM_32 | {"awq": True, "scale_estimation": True},
    "nncf-int4-asym-g32-all": ASYM_32 | ALL,
    "nncf-int4-asym-g32-awq-se-everywhere": ASYM_32 | {"awq": True, "scale_estimation": True, "all_layers": True},
}

EMBEDDING = "model.embed_tokens.weight"


def quantize(contender: Contender) -> tuple[dict[str, Floats], float]:
    options = dict(contender.options)
    mode = options.pop("mode")
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": contender.threads, "INFERENCE_PRECISION_HINT": "f32"})
    model = core.read_model(contender.prepared / "openvino" / "openvino_model.xml")
    if not mode.startswith("int8"):
        options["ratio"] = 1.0
    if any(options.get(name) for name in ("awq", "scale_estimation", "gptq")):
        tokens = contender.calibration_tokens()
        options["dataset"] = nncf.Dataset(list(tokens[:, None]), _inputs)
        options["subset_size"] = len(tokens)
    if options.pop("fallback", None):
        options["advanced_parameters"] = AdvancedCompressionParameters(
            group_size_fallback_mode=GroupSizeFallbackMode.ADJUST
        )
    with contender.measured():
        compressed = nncf.compress_weights(model, mode=CompressWeightsMode(mode), **options)
    return read_weights(compressed, contender.weights())


def _inputs(input_ids: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        "position_ids": np.arange(input_ids.shape[1])[None],
        "beam_idx": np.zeros(1, np.int32),
    }


def read_weights(model: openvino.Model, floats: dict[str, Floats]) -> tuple[dict[str, Floats], float]:
    """De-quantized weights by their names, and the bits that the model stores them in.

    A scale of AWQ's that stays in front of a product, because nothing before it could take it, goes into the weight.
    """
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    weights: dict[str, Floats] = {}
    num_bits = 0
    for name, before in floats.items():
        product = nodes.get("lm_head" if name == EMBEDDING else name.removesuffix(".weight"))
        if product is None:  # a norm
            values, bits = evaluate(nodes[name])
        else:
            values, bits = evaluate(product.input_value(1).get_node())
            inputs = product.input_value(0).get_node()
            if inputs.get_friendly_name().endswith("awq_mul"):
                (constant,) = (v.get_node() for v in inputs.input_values() if is_constant(v.get_node()))
                scale, scale_bits = evaluate(constant)
                values, bits = values * scale.reshape(1, -1), bits + scale_bits
        weights[name] = values.reshape(before.shape)
        num_bits += bits
    return weights, num_bits


def evaluate(node: Any) -> tuple[Floats, int]:
    """The value of a constant expression in float32, and the bits of the constants in it."""
    kind = node.get_type_name()
    if kind == "Constant":
        values = node.get_data(dtype=np.float32)
        return values, values.size * node.get_element_type().bitwidth
    values, bits = evaluate(node.input_value(0).get_node())
    if kind == "Convert":
        return values, bits
    if kind == "Reshape":
        return values.reshape(node.get_output_shape(0)), bits
    other, other_bits = evaluate(node.input_value(1).get_node())
    operation = {"Subtract": np.subtract, "Multiply": np.multiply}[kind]
    return operation(values, other), bits + other_bits


def is_constant(node: Any) -> bool:
    return node.get_type_name() == "Constant" or (
        node.get_type_name() == "Convert" and is_constant(node.input_value(0).get_node())
    )


if __name__ == "__main__":
    main("NNCF", ["nncf", "openvino"], CONTENDERS, quantize)
