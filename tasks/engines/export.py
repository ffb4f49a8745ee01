"""A decoder as a portable ONNX file: standard operators, weights as integers behind DequantizeLinear, flat KV cache.

What TensorRT takes, and what any other ONNX tool can read. The engines with a graph of their own are faster on theirs
(docs/decisions/0004): here attention is written out, and a quantized embedding is looked up after its DequantizeLinear,
which ONNX Runtime computes for the whole table at every step.

The graph has no loop and no branch. Names follow the exporters of transformers:

    input_ids                       [batch, length] int64
    attention_mask                  [batch, total] int64, 1 where a position holds a token; total = past + length
    position_ids                    [batch, length] int64, the number of tokens before each in its sequence
    logit_indices                   [num_logits] int64, the places in 0..length-1 that the LM head computes
    past_key_values.i.key, .value   [batch, num_kv_heads, past, head_dim]; past may be 0
    logits                          [batch, num_logits, vocab_size] float32
    present.i.key, .value           [batch, num_kv_heads, total, head_dim]

Sequences of different lengths are padded on the left.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.engines.decoder import Decoder, Floats, Layer, Norm, Weight
from tasks.engines.families import Activation
from tasks.quantization.activations import Inputs
from tasks.quantization.checkpoint_format import QuantizedWeight

if TYPE_CHECKING:
    from onnx import ModelProto

Precision = Literal["float32", "float16"]
OPSET = 21  # the first with 4-bit integers and blocked DequantizeLinear
INT4_BLOCKS = (128, 96, 64, 48, 32, 16)  # what a group longer than a block is stored as
LOWEST = float(np.finfo(np.float32).min)  # finite: a row that sees nothing must not become NaN


def export_decoder(decoder: Decoder, file: Path, *, precision: Precision, max_length: int) -> None:
    """Writes `file` and, beside it, `file`.data with the weights.

    Args:
        precision: of activations, KV cache, float weights and scales; norms, softmax and logits are float32 always.
        max_length: the longest sequence, past and new tokens: how many positions the rotary tables hold.

    Raises:
        ValueError: a value does not fit float16.
    """
    from onnx import TensorProto, helper

    graph = _Graph(precision)
    _add_decoder(graph, decoder, min(max_length, decoder.max_position_embeddings))

    kind = TensorProto.FLOAT if precision == "float32" else TensorProto.FLOAT16
    heads, dim = decoder.num_kv_heads, decoder.head_dim
    caches = [f"{index}.{half}" for index in range(len(decoder.layers)) for half in ("key", "value")]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "length"]),
        helper.make_tensor_value_info("logit_indices", TensorProto.INT64, ["num_logits"]),
        *(helper.make_tensor_value_info("past_key_values." + c, kind, ["batch", heads, "past", dim]) for c in caches),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "num_logits", decoder.vocab_size]),
        *(helper.make_tensor_value_info("present." + c, kind, ["batch", heads, "total", dim]) for c in caches),
    ]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "decoder", inputs, outputs, initializer=graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
        producer_name="slimline",
    )
    save_graph(model, file)


def save_graph(model: "ModelProto", file: Path) -> None:
    """Writes `file` and, beside it, `file`.data with the weights."""
    import onnx

    data = file.with_name(file.name + ".data")
    data.unlink(missing_ok=True)  # onnx appends to what is there
    onnx.save(model, file, save_as_external_data=True, location=data.name, size_threshold=1024)


def _add_decoder(graph: "_Graph", decoder: Decoder, max_length: int) -> None:
    for index, rotary in enumerate(decoder.rotaries):
        for name, table in zip(("cos", "sin"), rotary.tables(max_length), strict=True):
            name = _numbered(name, index)
            rows = graph.node("Gather", [graph.floats("rotary." + name, table), "position_ids"], "rows." + name, axis=0)
            graph.node("Unsqueeze", [rows, graph.ints("axis.1", [1])], name)  # [batch, 1, length, rotary_dim / 2]
    for index, window in enumerate(_windows(decoder)):
        _add_mask(graph, window, index)

    embedding = graph.matrix("embedding", decoder.embedding, rows_are_outputs=True)
    hidden = graph.node("Gather", [embedding, "input_ids"], "embedded", axis=0)
    if decoder.embedding_scale != 1:
        hidden = graph.node(
            "Mul", [hidden, graph.scalar("embedding_scale", decoder.embedding_scale)], "embedded.scaled"
        )
    if decoder.positions is not None:
        positions = graph.floats("positions", decoder.positions[:max_length])
        learned = graph.node("Gather", [positions, "position_ids"], "positions.rows", axis=0)
        hidden = graph.node("Add", [hidden, learned], "embedded.positioned")
    for index, layer in enumerate(decoder.layers):
        prefix = f"layers.{index}."
        normed = graph.norm(prefix + "input_norm", hidden, layer.attention_norm)
        attended = _add_attention(graph, decoder, layer, index, normed)
        if layer.attention_output_norm:
            attended = graph.norm(prefix + "attention_output_norm", attended, layer.attention_output_norm)
        before = hidden
        hidden = graph.node("Add", [hidden, attended], prefix + "after_attention")
        normed = graph.norm(
            prefix + "post_attention_norm",
            before if decoder.parallel_residual else hidden,
            layer.feed_forward_norm,
        )
        fed = _add_feed_forward(graph, decoder.activation, layer, prefix, normed)
        if layer.feed_forward_output_norm:
            fed = graph.norm(prefix + "feed_forward_output_norm", fed, layer.feed_forward_output_norm)
        hidden = graph.node("Add", [hidden, fed], prefix + "output")

    last = graph.node("Gather", [hidden, "logit_indices"], "last", axis=1)
    normed = graph.norm("norm", last, decoder.norm)
    if decoder.tied:
        head = graph.node("Transpose", [embedding], "lm_head.weight", perm=[1, 0])
    else:
        head = graph.matrix("lm_head", decoder.lm_head)
    logits = graph.node("MatMul", [normed, head], "lm_head")
    if decoder.logit_softcap is not None:
        logits = graph.softcapped(graph.cast(logits, "float32"), decoder.logit_softcap)
        graph.node("Identity", [logits], "logits")
    else:
        graph.cast(logits, "float32", "logits")


def _numbered(name: str, index: int) -> str:
    """The name of the first, second ... of several alike."""
    return f"{name}.{index}" if index else name


def _windows(decoder: Decoder) -> list[int | None]:
    """The different windows of its layers, in the order of their first use."""
    return list(dict.fromkeys(layer.window for layer in decoder.layers))


def _add_mask(graph: "_Graph", window: int | None, index: int) -> None:
    """`bias` [batch, 1, 1, length, total]: 0 where a query sees a key, the lowest finite value elsewhere.

    A key's position is the number of tokens before it, so padding on the left neither is seen nor counts.
    """
    counted = graph.node("CumSum", ["attention_mask", graph.ints("axis.last", 1)], "mask.counted")
    keys = graph.node("Sub", [counted, graph.ints("one", [1])], "mask.key_positions")
    keys = graph.node("Unsqueeze", [keys, graph.ints("axis.1", [1])], "mask.keys")  # [batch, 1, total]
    queries = graph.node("Unsqueeze", ["position_ids", graph.ints("axis.2", [2])], "mask.queries")  # [batch, length, 1]
    seen = graph.node("LessOrEqual", [keys, queries], "mask.causal")
    if window is not None:
        size = graph.ints(_numbered("sliding_window", index), [window])
        first = graph.node("Sub", [queries, size], _numbered("mask.before_window", index))
        near = graph.node("Greater", [keys, first], _numbered("mask.window", index))
        seen = graph.node("And", [seen, near], _numbered("mask.causal_window", index))
    real = graph.node("Greater", ["attention_mask", graph.ints("zero", [0])], "mask.real")
    real = graph.node("Unsqueeze", [real, graph.ints("axis.1", [1])], "mask.real_keys")
    seen = graph.node("And", [seen, real], _numbered("mask.seen", index))
    zero, masked = graph.scalar("bias.zero", 0.0, "float32"), graph.scalar("bias.masked", LOWEST, "float32")
    bias = graph.node("Where", [seen, zero, masked], _numbered("mask.bias", index))
    graph.node("Unsqueeze", [bias, graph.ints("axes.heads", [1, 2])], _numbered("bias", index))


def _add_attention(graph: "_Graph", decoder: Decoder, layer: Layer, index: int, normed: str) -> str:
    """Grouped-query attention; the queries that share a key-value head are one more batch dimension."""
    prefix = f"layers.{index}."
    num_heads, num_kv_heads, head_dim = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim

    def heads(name: str, weight: Weight, bias: Floats | None, norm: Norm | None, count: int) -> str:
        projected = graph.linear(prefix + name, weight, bias, normed)
        split = graph.node(
            "Reshape", [projected, graph.ints(f"split.{count}", [0, 0, count, head_dim])], f"{projected}.s"
        )
        if norm is not None:
            split = graph.norm(prefix + name + "_norm", split, norm)
        return graph.node("Transpose", [split], f"{projected}.heads", perm=[0, 2, 1, 3])

    def turned(value: str) -> str:
        if layer.rotary is None:
            return value
        return graph.rotated(value, decoder.rotaries.index(layer.rotary), layer.rotary.dim, head_dim)

    query = turned(heads("q", layer.q, layer.q_bias, layer.q_norm, num_heads))
    key = turned(heads("k", layer.k, layer.k_bias, layer.k_norm, num_kv_heads))
    value = heads("v", layer.v, layer.v_bias, None, num_kv_heads)
    key = graph.node("Concat", [f"past_key_values.{index}.key", key], f"present.{index}.key", axis=2)
    value = graph.node("Concat", [f"past_key_values.{index}.value", value], f"present.{index}.value", axis=2)

    same = layer.attention_scale == decoder.layers[0].attention_scale
    scale = graph.scalar("attention.scale" if same else prefix + "attention.scale", layer.attention_scale)
    query = graph.node("Mul", [query, scale], prefix + "q.scaled")
    grouped = graph.ints("split.groups", [0, num_kv_heads, num_heads // num_kv_heads, -1, head_dim])
    query = graph.node("Reshape", [query, grouped], prefix + "q.grouped")
    key = graph.node("Transpose", [key], prefix + "k.transposed", perm=[0, 1, 3, 2])
    key = graph.node("Unsqueeze", [key, graph.ints("axis.2", [2])], prefix + "k.shared")
    value = graph.node("Unsqueeze", [value, graph.ints("axis.2", [2])], prefix + "v.shared")

    scores = graph.cast(graph.node("MatMul", [query, key], prefix + "scores"), "float32")
    if decoder.attention_softcap is not None:
        scores = graph.softcapped(scores, decoder.attention_softcap)
    bias = _numbered("bias", _windows(decoder).index(layer.window))
    scores = graph.node("Add", [scores, bias], prefix + "scores.masked")
    weights = graph.node("Softmax", [scores], prefix + "weights", axis=-1)
    attended = graph.node("MatMul", [graph.cast(weights, graph.precision), value], prefix + "attended")
    attended = graph.node(
        "Reshape", [attended, graph.ints("join.groups", [0, num_heads, -1, head_dim])], f"{attended}.h"
    )
    attended = graph.node("Transpose", [attended], prefix + "attended.positions", perm=[0, 2, 1, 3])
    attended = graph.node(
        "Reshape", [attended, graph.ints("join.heads", [0, 0, num_heads * head_dim])], f"{attended}.j"
    )
    return graph.linear(prefix + "o", layer.o, layer.o_bias, attended)


def _add_feed_forward(graph: "_Graph", activation: Activation, layer: Layer, prefix: str, normed: str) -> str:
    if layer.gate is None:
        active = graph.active(activation, graph.linear(prefix + "up", layer.up, layer.up_bias, normed))
        return graph.linear(prefix + "down", layer.down, layer.down_bias, active)
    active = graph.active(activation, graph.linear(prefix + "gate", layer.gate, layer.gate_bias, normed))
    gated = graph.node("Mul", [active, graph.linear(prefix + "up", layer.up, layer.up_bias, normed)], prefix + "gated")
    return graph.linear(prefix + "down", layer.down, layer.down_bias, gated)


@dataclass
class _Graph:
    """Nodes and initializers as they come; a value's name is its node's name."""

    precision: Precision
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)
    _written: set[str] = field(default_factory=set)
    _made: set[str] = field(default_factory=set)

    def node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """The output of a node, `name`; added once, however often it is asked for."""
        from onnx import helper

        if name in self._made:
            return name
        self._made.add(name)
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def cast(self, value: str, precision: Precision, name: str | None = None) -> str:
        """`value` in `precision`; no node where it is already, unless `name` has to exist."""
        from onnx import TensorProto

        if self.precision == "float32":
            return value if name is None else self.node("Identity", [value], name)
        target = TensorProto.FLOAT if precision == "float32" else TensorProto.FLOAT16
        return self.node("Cast", [value], name or f"{value}.{precision}", to=target)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """An initializer; written once, however often it is used."""
        from onnx import numpy_helper

        if name not in self._written:
            self._written.add(name)
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def ints(self, name: str, value: int | list[int]) -> str:
        """An int64 constant."""
        return self.constant(name, np.array(value, dtype=np.int64))

    def scalar(self, name: str, value: float, precision: Precision | None = None) -> str:
        """A float constant of no dimension."""
        return self.constant(name, np.array(value, dtype=precision or self.precision))

    def floats(self, name: str, value: Floats) -> str:
        """A float constant in the graph's precision."""
        if name in self._written:
            return name
        with np.errstate(over="ignore"):  # refused below
            converted = value.astype(self.precision)
        if not np.isfinite(converted).all():
            raise ValueError(
                f"{name} must be finite in {self.precision}; its largest magnitude is {np.abs(value).max():g}. "
                "Use precision 'float32'."
            )
        return self.constant(name, converted)

    def norm(self, name: str, value: str, norm: Norm) -> str:
        """The norm over the last dimension, computed in float32."""
        exact = self.cast(value, "float32")
        if norm.bias is not None:
            weights = [self.constant(name + ".gain", norm.gain), self.constant(name + ".bias", norm.bias)]
            normed = self.node("LayerNormalization", [exact, *weights], name + ".float32", axis=-1, epsilon=norm.eps)
            return self.cast(normed, self.precision)
        square = self.node("Mul", [exact, exact], name + ".square")
        mean = self.node("ReduceMean", [square, self.ints("axes.last", [-1])], name + ".mean", keepdims=1)
        shifted = self.node("Add", [mean, self.scalar(f"eps.{norm.eps}", norm.eps, "float32")], name + ".shifted")
        root = self.node("Sqrt", [shifted], name + ".root")
        normed = self.node("Div", [exact, root], name + ".normed")
        return self.node("Mul", [self.cast(normed, self.precision), self.floats(name + ".gain", norm.gain)], name)

    def active(self, activation: Activation, value: str) -> str:
        """`value` through the activation of the feed-forward."""
        if activation == "silu":
            return self.node("Mul", [value, self.node("Sigmoid", [value], value + ".sigmoid")], value + ".silu")
        if activation == "relu":
            return self.node("Relu", [value], value + ".relu")
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return self.node("Gelu", [value], f"{value}.{activation}", approximate=approximate)

    def softcapped(self, value: str, cap: float) -> str:
        """cap * tanh(value / cap), in float32."""
        size = self.scalar(f"softcap.{cap}", cap, "float32")
        small = self.node("Div", [value, size], value + ".scaled_down")
        return self.node("Mul", [self.node("Tanh", [small], value + ".tanh"), size], value + ".softcapped")

    def rotated(self, value: str, index: int, dim: int, head_dim: int) -> str:
        """[batch, heads, length, head_dim], the halves of the first `dim` turned by their position's angle."""
        from onnx import helper

        if dim < head_dim:
            whole, turning, staying = value, value + ".turning", value + ".staying"
            sizes = self.ints(f"rotary.split.{dim}", [dim, head_dim - dim])
            split = helper.make_node("Split", [whole, sizes], [turning, staying], name=value + ".parts", axis=3)
            self.nodes.append(split)
            return self.node("Concat", [self.rotated(turning, index, dim, dim), staying], whole + ".rotated", axis=3)
        cos, sin = _numbered("cos", index), _numbered("sin", index)
        first, second = value + ".first", value + ".second"
        self.nodes.append(
            helper.make_node("Split", [value], [first, second], name=value + ".halves", axis=3, num_outputs=2)
        )
        left = [self.node("Mul", [first, cos], first + ".cos"), self.node("Mul", [second, sin], second + ".sin")]
        right = [self.node("Mul", [second, cos], second + ".cos"), self.node("Mul", [first, sin], first + ".sin")]
        turned = [self.node("Sub", left, first + ".turned"), self.node("Add", right, second + ".turned")]
        return self.node("Concat", turned, value + ".rotated", axis=3)

    def linear(self, name: str, weight: Weight, bias: Floats | None, value: str) -> str:
        """value @ weight.T + bias, the value rounded before where the checkpoint says so."""
        if isinstance(weight, QuantizedWeight) and weight.inputs:
            value = self.rounded(name + ".inputs", weight.inputs, value)
        product = self.node("MatMul", [value, self.matrix(name, weight)], name)
        if bias is None:
            return product
        return self.node("Add", [product, self.floats(name + ".bias", bias)], name + ".biased")

    def rounded(self, name: str, inputs: Inputs, value: str) -> str:
        """`value` behind QuantizeLinear and DequantizeLinear, with one static scale."""
        if inputs.scale is None:
            raise ValueError(
                f'ONNX\'s QuantizeLinear has no scale per token; {name} need one. Quantize with `static: ["*"]` in '
                "`activations` for this engine."
            )
        scale = self.floats(name + ".scale", np.array(inputs.scale, dtype=np.float32))
        if inputs.format == "float8_e4m3":
            zero_point = self._float8(name + ".zero_point", np.zeros((), dtype=np.uint8))
        else:
            zero_point = self.constant(name + ".zero_point", np.array(inputs.zero_point, dtype=np.int8))
        integers = self.node("QuantizeLinear", [value, scale, zero_point], name + ".integers")
        return self.node("DequantizeLinear", [integers, scale, zero_point], name)

    def matrix(self, name: str, weight: Weight, *, rows_are_outputs: bool = False) -> str:
        """The weight's values, [in, out] as MatMul takes them or [out, in]; quantized ones behind DequantizeLinear."""
        if not isinstance(weight, QuantizedWeight):
            return self.floats(name + ".weight", weight if rows_are_outputs else weight.T)
        if weight.has_real_zero_point:
            raise ValueError(
                f"ONNX's DequantizeLinear needs integer zero points; {name} has real-valued ones. Quantize with "
                "`zero_point: integer` or `symmetric: true` for this engine."
            )
        integers, scale, zero_point, block_size = _stored(weight)
        if not rows_are_outputs:
            integers, scale = integers.T, scale.T
            zero_point = None if zero_point is None else zero_point.T
        inputs = [self._integers(name + ".integers", integers, weight), self.floats(name + ".scale", scale)]
        if zero_point is not None:
            inputs.append(self._integers(name + ".zero_point", zero_point, weight))
        output_axis = 0 if rows_are_outputs else 1
        attributes = (
            {"axis": output_axis} if block_size is None else {"axis": 1 - output_axis, "block_size": block_size}
        )
        return self.node("DequantizeLinear", inputs, name + ".weight", **attributes)

    def _integers(self, name: str, value: NDArray[Any], weight: QuantizedWeight) -> str:
        """An integer constant, two to a byte up to 4 bits; or one of FP8."""
        from onnx import TensorProto, helper

        if weight.format == "float8_e4m3":
            return self._float8(name, value)
        if weight.bits > 4:
            return self.constant(name, value)
        if name not in self._written:
            self._written.add(name)
            kind = TensorProto.INT4 if weight.zero_point is None else TensorProto.UINT4
            flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8) & 0xF
            flat = np.append(flat, np.zeros(flat.size % 2, dtype=np.uint8))
            packed = flat[0::2] | flat[1::2] << 4  # the first of two in the low half
            self.initializers.append(helper.make_tensor(name, kind, value.shape, packed.tobytes(), raw=True))
        return name

    def _float8(self, name: str, bits: NDArray[Any]) -> str:
        """A float8_e4m3fn constant, from its bits as uint8."""
        from onnx import TensorProto, helper

        if name not in self._written:
            self._written.add(name)
            raw = np.ascontiguousarray(bits).tobytes()
            self.initializers.append(helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, bits.shape, raw, raw=True))
        return name


def _stored(weight: QuantizedWeight) -> tuple[NDArray[Any], Floats, NDArray[Any] | None, int | None]:
    """[out, in] integers, scales, zero points and block size (None: one [out] scale per row) for DequantizeLinear.

    A 4-bit row with one scale is stored in blocks that repeat it: engines fuse blocked 4-bit weights into the product
    and others not. The values are the same.
    """
    in_features = weight.shape[1]
    scale, zero_point, groups = weight.scale, weight.zero_point, weight.scale.shape[1]
    if groups == 1:
        block_size = next((size for size in INT4_BLOCKS if in_features % size == 0), None) if weight.bits <= 4 else None
        if block_size is None:
            return weight.integers, scale[:, 0], None if zero_point is None else zero_point[:, 0], None
        repeats = in_features // block_size
        repeated = None if zero_point is None else np.repeat(zero_point, repeats, axis=1)
        return weight.integers, np.repeat(scale, repeats, axis=1), repeated, block_size
    return weight.integers, scale, zero_point, in_features // groups
