"""ONNX Runtime's graph: a compact one of its own operators around the checkpoint's integers.

ONNX Runtime waits for operators, not for memory, when it decodes a small model (a graph of an exporter's ~3,000 nodes
runs the same weights at half the speed), so the graph is built by hand: rotary embedding and KV cache inside
GroupQueryAttention, the cache written in place, projections of one input stacked. Weights of 4 bits or in groups
multiply through MatMulNBits, 8-bit weights per channel through the integer matrix product, which reads a prompt several
times faster. docs/decisions/0003-onnxruntime-graph.md has the measurements.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.engines.decoder import Decoder, Floats, Layer, Norm, Weight, shape
from tasks.engines.families import Activation
from tasks.quantization.activations import Inputs
from tasks.quantization.checkpoint_format import QuantizedWeight

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.weights"
MICROSOFT = "com.microsoft"
BLOCK_SIZES = (16, 32, 64, 128)  # of MatMulNBits
LONG_GROUP_BLOCKS = (64, 32, 16)  # what a longer group is stored as: inputs are rounded per block, so not the longest
PRODUCTS = ("FusedMatMul", "MatMulNBits", "MatMulIntegerToFloat")  # float32; int8 or float32 by block; integers
INT32 = 6  # onnx.TensorProto.INT32
PAGE_BYTES = 4096  # initializers start on a page, so that the file is mapped and not copied


def build_graph(decoder: Decoder, out: Path, *, activations: Literal["int8", "float32"], max_length: int) -> None:
    """Writes model.onnx and model.weights: a decoder step over a KV cache that is updated in place.

    Inputs: input_ids [batch, length] int64; attention_mask [batch, total] int64, the tokens so far, of which a
    sequence has as many as its row has ones; past_key_values.i.key / .value [batch, num_kv_heads, room, head_dim];
    num_logits [1] int64, which may be left out: how many of the last positions the LM head computes, 0 for all.
    Outputs: logits [batch, num_logits, vocab_size], present.i.key / .value, to be bound to the same memory as the past.
    The names are those that ONNX Runtime GenAI looks for.

    Between attentions the hidden states are [batch * length, 1, features]: `_GraphWriter.integer_product` stacks two
    halves along the middle.
    """
    import onnx
    from onnx import TensorProto, helper

    _refuse_float8(decoder)
    max_length = min(max_length, decoder.max_position_embeddings)
    with (out / WEIGHTS_FILE).open("wb") as weights_file:
        graph = _GraphWriter(weights_file, activations)
        _add_decoder(graph, decoder, max_length)

    cache: list[str | int | None] = ["batch", decoder.num_kv_heads, "room", decoder.head_dim]
    caches = [f"{index}.{kind}" for index in range(len(decoder.layers)) for kind in ("key", "value")]
    cache_kind = TensorProto.INT8 if decoder.cache else TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        *(helper.make_tensor_value_info(f"past_key_values.{name}", cache_kind, cache) for name in caches),
        helper.make_tensor_value_info("num_logits", TensorProto.INT64, [1]),  # last: it has a default
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "positions", decoder.vocab_size]),
        *(helper.make_tensor_value_info(f"present.{name}", cache_kind, cache) for name in caches),
    ]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "decoder", inputs, outputs, initializer=graph.initializers),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=10,
        producer_name="slimline",
    )
    helper.set_model_props(
        model,
        {
            "max_length": str(max_length),
            "products": _count_products(graph.nodes),
            "kv_cache": decoder.cache.format if decoder.cache else "float32",
        },
    )
    onnx.save(model, out / GRAPH_FILE)


def _refuse_float8(decoder: Decoder) -> None:
    for name, weight in decoder.quantized():
        if weight.format != "int8":
            raise ValueError(
                f"ONNX Runtime's CPU provider has no FP8 products; {name} is {weight.format}. Quantize to integers for "
                "this engine."
            )
    if decoder.cache and decoder.cache.format != "int8":
        raise ValueError(
            f"ONNX Runtime's CPU provider keeps KV caches as float32 or int8; this one is {decoder.cache.format}. "
            "Quantize with `kv_cache: int8`, or without."
        )


def _count_products(nodes: list[Any]) -> str:
    kinds = Counter(node.op_type for node in nodes)
    return ", ".join(f"{kinds[kind]} {kind}" for kind in PRODUCTS if kinds[kind])


def _add_decoder(graph: "_GraphWriter", decoder: Decoder, max_length: int) -> None:
    _refuse_head_dim(decoder)
    for index, rotary in enumerate(decoder.rotaries):
        for name, table in zip(("cos", "sin"), rotary.tables(max_length), strict=True):
            graph.weight(_rotary_table(name, index), table)
    graph.node("Shape", ["input_ids"], ["input_shape"])
    graph.node("Concat", ["input_shape", graph.constant("rest", np.array([-1]))], ["by_sequence"], axis=0)
    graph.constant("by_position", np.array([-1, 1, 0]))  # 0 keeps the last dimension
    graph.constant("num_logits", np.array([0]))
    graph.node("Neg", ["num_logits"], ["first_logits"])
    _add_lengths(graph)

    graph.node("Reshape", ["input_ids", graph.constant("column", np.array([-1, 1]))], ["ids"])
    hidden = _add_embedding(graph, decoder, max_length)
    delta: str | None = None  # what the last block's feed-forward adds to the residual stream
    for index, layer in enumerate(decoder.layers):
        prefix = f"layers.{index}."
        hidden, normed = _add_norm(graph, prefix + "input_norm", hidden, delta, layer.attention_norm)
        attended = _add_attention(graph, decoder, layer, index, prefix, normed)
        if index + 1 == len(decoder.layers):  # past the last attention, only the positions asked for
            hidden = graph.by_position(graph.last_positions(graph.by_sequence(hidden)))
            attended = graph.last_positions(attended)
        attended = graph.by_position(attended)
        attended = graph.linear(prefix + "o", [layer.o], [layer.o_bias], attended)
        if layer.attention_output_norm:
            _, attended = _add_norm(
                graph, prefix + "attention_output_norm", attended, None, layer.attention_output_norm
            )
        residual = None if decoder.parallel_residual else attended
        hidden, normed = _add_norm(graph, prefix + "post_attention_norm", hidden, residual, layer.feed_forward_norm)
        delta = _add_feed_forward(graph, decoder.activation, layer, prefix, normed)
        if layer.feed_forward_output_norm:
            _, delta = _add_norm(
                graph, prefix + "feed_forward_output_norm", delta, None, layer.feed_forward_output_norm
            )
        if decoder.parallel_residual:
            graph.node("Add", [attended, delta], [prefix + "both"])
            delta = prefix + "both"
    _, normed = _add_norm(graph, "norm", hidden, delta, decoder.norm)
    name = "embedding" if decoder.tied else "lm_head"
    logits = graph.linear(name, [decoder.lm_head], [None], normed, output="logits.by_position")
    if decoder.logit_softcap is not None:
        logits = _add_softcap(graph, logits, decoder.logit_softcap)
    graph.node("Gather", ["input_shape", graph.constant("first", np.array([0]))], ["batch"], axis=0)
    graph.node(
        "Concat", ["batch", graph.constant("rows", np.array([-1, decoder.vocab_size]))], ["logits.shape"], axis=0
    )
    graph.node("Reshape", [logits, "logits.shape"], ["logits"])


def _add_lengths(graph: "_GraphWriter") -> None:
    """`last_position` [batch] int32, of each sequence's last token, and `total_length` [] int32, of the longest."""
    graph.node("ReduceSum", ["attention_mask", graph.constant("axis_1", np.array([1]))], ["lengths"], keepdims=0)
    graph.node("Sub", ["lengths", graph.constant("scalar_1", np.array(1))], ["last_positions"])
    graph.node("Cast", ["last_positions"], ["last_position"], to=INT32)
    graph.node("Shape", ["attention_mask"], ["mask_shape"])
    graph.node("Gather", ["mask_shape", graph.constant("scalar_1", np.array(1))], ["total"], axis=0)
    graph.node("Cast", ["total"], ["total_length"], to=INT32)


def _refuse_head_dim(decoder: Decoder) -> None:
    if decoder.head_dim % 8:
        raise ValueError(
            f"ONNX Runtime's attention needs heads of a multiple of 8 dimensions; these have {decoder.head_dim}. "
            "Use the engine 'openvino' or 'pytorch'."
        )


def _rotary_table(name: str, index: int) -> str:
    return f"rotary_{name}.{index}" if index else f"rotary_{name}"


def _add_embedding(graph: "_GraphWriter", decoder: Decoder, max_length: int) -> str:
    """The residual stream before the first block."""
    hidden = graph.embedding("embedding", decoder.embedding, "ids", decoder.hidden_size)
    if decoder.embedding_scale != 1:
        scale = graph.constant("embedding_scale", np.array(decoder.embedding_scale, np.float32))
        graph.node("Mul", [hidden, scale], ["embedding.scaled"])
        hidden = "embedding.scaled"
    if decoder.positions is not None:
        table = graph.weight("positions.weight", decoder.positions[:max_length])
        graph.node("Gather", [table, _add_positions(graph)], ["positions.by_sequence"], axis=0)
        graph.node("Add", [hidden, graph.by_position("positions.by_sequence")], ["embedding.positioned"])
        hidden = "embedding.positioned"
    return hidden


def _add_positions(graph: "_GraphWriter") -> str:
    """[batch, length] int64: the position of every token, counted back from the last; of a prompt's padding, some."""
    if not graph.once("positions"):
        return "positions"
    one, zero = graph.constant("scalar_1", np.array(1)), graph.constant("scalar_0", np.array(0))
    graph.node("Gather", ["input_shape", one], ["input_length"], axis=0)
    graph.node("Range", [zero, "input_length", one], ["places"])
    graph.node("Sub", ["lengths", "input_length"], ["positions.before"])  # negative where padding is on the right
    graph.node("Max", ["positions.before", zero], ["positions.first"])
    graph.node("Unsqueeze", ["positions.first", graph.constant("rest", np.array([-1]))], ["positions.first_column"])
    graph.node("Add", ["positions.first_column", "places"], ["positions"])
    return "positions"


def _add_softcap(graph: "_GraphWriter", logits: str, cap: float) -> str:
    """cap * tanh(logits / cap)."""
    value = graph.constant("logit_softcap", np.array(cap, np.float32))
    graph.node("Div", [logits, value], ["logits.scaled"])
    graph.node("Tanh", ["logits.scaled"], ["logits.tanh"])
    graph.node("Mul", ["logits.tanh", value], ["logits.capped"])
    return "logits.capped"


def _add_norm(graph: "_GraphWriter", name: str, hidden: str, delta: str | None, norm: Norm) -> tuple[str, str]:
    """The residual stream after adding `delta`, and its norm, in one node."""
    weights = [graph.weight(name + ".gain", norm.gain)]
    if norm.bias is not None:
        weights.append(graph.weight(name + ".bias", norm.bias))
    kind = "SimplifiedLayerNormalization" if norm.kind == "rms" else "LayerNormalization"
    if delta is None:
        graph.node(kind, [hidden, *weights], [name], axis=-1, epsilon=norm.eps, stash_type=1)
        return hidden, name
    graph.node("Skip" + kind, [delta, hidden, *weights], [name, "", "", name + ".sum"], MICROSOFT, epsilon=norm.eps)
    return name + ".sum", name


def _add_attention(graph: "_GraphWriter", decoder: Decoder, layer: Layer, index: int, prefix: str, normed: str) -> str:
    weights, biases = [layer.q, layer.k, layer.v], [layer.q_bias, layer.k_bias, layer.v_bias]
    tables, turned_inside = _rotary_tables(decoder, layer)
    if _same_grid(weights) and layer.q_norm is None and layer.k_norm is None and (turned_inside or not tables):
        projected = [graph.by_sequence(graph.linear(prefix + "qkv", weights, biases, normed)), "", ""]
    else:
        projected = [
            graph.by_sequence(graph.linear(prefix + name, [weight], [bias], normed))
            for name, weight, bias in zip("qkv", weights, biases, strict=True)
        ]
        for position, norm in ((0, layer.q_norm), (1, layer.k_norm)):
            if norm is not None:
                projected[position] = graph.norm_heads(projected[position], norm)
    if layer.rotary is not None and not turned_inside:
        for position, num_heads in ((0, decoder.num_heads), (1, decoder.num_kv_heads)):
            projected[position] = _add_rotation(graph, projected[position], tables, num_heads, layer.rotary.dim)
    options: dict[str, Any] = {}
    scales: list[str] = []
    if decoder.cache:
        options = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
        scales = [
            graph.constant(f"{prefix}{name}_scale", np.array([scale], np.float32))
            for name, scale in zip("kv", decoder.cache.of_blocks[index], strict=True)
        ]
    if layer.attention_scale != decoder.head_dim**-0.5:  # which is what it takes by default
        options["scale"] = layer.attention_scale
    if decoder.attention_softcap is not None:
        options["softcap"] = decoder.attention_softcap
    past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
    inputs = [*projected, *past, "last_position", "total_length"]
    if turned_inside or scales:
        inputs += tables if turned_inside else ["", ""]
    if scales:
        inputs += ["", "", "", *scales]  # positions, bias and sinks are left out
    graph.node(
        "GroupQueryAttention",
        inputs,
        [prefix + "attention", f"present.{index}.key", f"present.{index}.value"],
        MICROSOFT,
        num_heads=decoder.num_heads,
        kv_num_heads=decoder.num_kv_heads,
        do_rotary=int(turned_inside),
        rotary_interleaved=0,
        local_window_size=layer.window or -1,
        **options,
    )
    return prefix + "attention"


def _rotary_tables(decoder: Decoder, layer: Layer) -> tuple[list[str], bool]:
    """Names of the layer's cosines and sines, and whether GroupQueryAttention takes them; [] without rotation.

    It takes heads of a multiple of 16 dimensions, of which a multiple of 16 turn.
    """
    if layer.rotary is None:
        return [], False
    index = decoder.rotaries.index(layer.rotary)
    inside = decoder.head_dim % 16 == 0 and layer.rotary.dim % 16 == 0
    return [_rotary_table(name, index) for name in ("cos", "sin")], inside


def _add_rotation(graph: "_GraphWriter", projected: str, tables: list[str], num_heads: int, dim: int) -> str:
    """Queries or keys [batch, length, heads * head_dim], the first `dim` dimensions of every head turned."""
    graph.node(
        "RotaryEmbedding",
        [projected, _add_positions(graph), *tables],
        [projected + ".turned"],
        MICROSOFT,
        num_heads=num_heads,
        rotary_embedding_dim=dim,
    )
    return projected + ".turned"


def _add_feed_forward(graph: "_GraphWriter", activation: Activation, layer: Layer, prefix: str, normed: str) -> str:
    gate, up = prefix + "gate", prefix + "up"
    if layer.gate is None:
        graph.linear(up, [layer.up], [layer.up_bias], normed)
        active = _add_activation(graph, activation, up)
        return graph.linear(prefix + "down", [layer.down], [layer.down_bias], active)
    if _same_grid([layer.gate, layer.up]):
        biases = [layer.gate_bias, layer.up_bias]
        both = graph.linear(prefix + "gate_up", [layer.gate, layer.up], biases, normed)
        graph.node("Split", [both], [gate, up], axis=-1, num_outputs=2)
    else:
        graph.linear(gate, [layer.gate], [layer.gate_bias], normed, output=gate)
        graph.linear(up, [layer.up], [layer.up_bias], normed, output=up)
    graph.node("Mul", [_add_activation(graph, activation, gate), up], [prefix + "gated"])
    return graph.linear(prefix + "down", [layer.down], [layer.down_bias], prefix + "gated")


def _add_activation(graph: "_GraphWriter", activation: Activation, value: str) -> str:
    output = f"{value}.{activation}"
    if activation == "silu":
        graph.node("QuickGelu", [value], [output], MICROSOFT, alpha=1.0)  # x * sigmoid(alpha * x)
    elif activation == "gelu_tanh":
        graph.node("FastGelu", [value], [output], MICROSOFT)
    elif activation == "gelu":
        graph.node("Gelu", [value], [output], MICROSOFT)
    else:
        graph.node("Relu", [value], [output])
    return output


class _GraphWriter:
    """Nodes and initializers; large initializers go to a file beside the graph as they come."""

    def __init__(self, weights_file: Any, activations: Literal["int8", "float32"]) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._file = weights_file
        self._activations = activations
        self._written: set[str] = set()

    def node(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **values: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **values))

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A small initializer, kept in the graph itself."""
        from onnx import numpy_helper

        if name not in self._written:
            self._written.add(name)
            self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """An initializer in the weights file; written once, however often it is used."""
        from onnx import TensorProto, helper

        if name in self._written:
            return name
        self._written.add(name)
        value = np.ascontiguousarray(value)
        self._file.write(bytes(-self._file.tell() % PAGE_BYTES))
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(value.dtype),
            dims=value.shape,
            data_location=TensorProto.EXTERNAL,
        )
        place = {"location": WEIGHTS_FILE, "offset": self._file.tell(), "length": value.nbytes}
        for key, entry in place.items():
            tensor.external_data.add(key=key, value=str(entry))
        self.initializers.append(tensor)
        self._file.write(value.data)
        return name

    def once(self, name: str) -> bool:
        """Whether `name` is asked for the first time: what several nodes read is made once."""
        first = name not in self._written
        self._written.add(name)
        return first

    def last_positions(self, hidden: str) -> str:
        """[batch, num_logits, features] out of [batch, length, features]."""
        end = self.constant("last_end", np.array([np.iinfo(np.int64).max]))
        self.node("Slice", [hidden, "first_logits", end, self.constant("axis_1", np.array([1]))], [hidden + ".last"])
        return hidden + ".last"

    def by_sequence(self, hidden: str) -> str:
        """[batch, length, features] out of [batch * length, 1, features]."""
        self.node("Reshape", [hidden, "by_sequence"], [hidden + ".by_sequence"])
        return hidden + ".by_sequence"

    def by_position(self, hidden: str) -> str:
        """[batch * length, 1, features] out of [batch, length, features]."""
        self.node("Reshape", [hidden, "by_position"], [hidden + ".by_position"])
        return hidden + ".by_position"

    def norm_heads(self, projected: str, norm: Norm) -> str:
        """RMS norm of every head of [batch, length, heads * head_dim]."""
        self.constant("split_heads", np.array([0, 0, -1, len(norm.gain)]))
        self.constant("join_heads", np.array([0, 0, -1]))
        self.weight(projected + ".gain", norm.gain)
        self.node("Reshape", [projected, "split_heads"], [projected + ".heads"])
        self.node(
            "SimplifiedLayerNormalization",
            [projected + ".heads", projected + ".gain"],
            [projected + ".normed_heads"],
            axis=-1,
            epsilon=norm.eps,
            stash_type=1,
        )
        self.node("Reshape", [projected + ".normed_heads", "join_heads"], [projected + ".normed"])
        return projected + ".normed"

    def linear(
        self,
        name: str,
        weights: Sequence[Weight],
        biases: Sequence[Floats | None],
        hidden: str,
        output: str | None = None,
    ) -> str:
        """hidden @ concat(weights).T + concat(biases); the weights share one grid."""
        output = output or name
        bias = _joined_bias(weights, biases)
        product = output if bias is None else output + ".product"
        quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        if not quantized:
            values = _stacked([np.asarray(weight) for weight in weights])
            self.node("FusedMatMul", [hidden, self.weight(name + ".weight", values)], [product], MICROSOFT, transB=1)
        elif quantized[0].inputs:
            self._rounded_product(name, quantized, quantized[0].inputs, hidden, product)
        elif self._activations == "int8" and _per_channel(quantized[0]):
            self._integer_product(name, quantized, hidden, product)
        else:
            self._blocked_product(name, quantized, hidden, product)
        if bias is not None:
            self.node("Add", [product, self.weight(name + ".bias", bias)], [output])
        return output

    def _blocked_product(self, name: str, weights: list[QuantizedWeight], hidden: str, output: str) -> None:
        """MatMulNBits: inputs rounded to 8 bits with a scale per block (accuracy level 4), or taken as they are (1)."""
        bits, block_size = _storage(weights[0])
        offsets = weights[0].has_real_zero_point
        product = output + ".scaled" if offsets else output
        self.node(
            "MatMulNBits",
            [hidden, *self._blocks(name, weights)],
            [product],
            MICROSOFT,
            K=shape(weights[0])[1],
            N=sum(shape(weight)[0] for weight in weights),
            bits=bits,
            block_size=block_size,
            accuracy_level=4 if self._activations == "int8" else 1,
        )
        if offsets:
            self.node("Add", [product, self._offset_product(name, weights, hidden)], [output])

    def _offset_product(self, name: str, weights: list[QuantizedWeight], hidden: str) -> str:
        """What real-valued offsets add to x @ W.T: each group's sum of inputs, times its offset.

        Its integers are counted from the middle of their range (see `_unsigned`), which is made up for here.
        """
        in_features = shape(weights[0])[1]
        groups = weights[0].scale.shape[1]
        sums = f"{hidden}.sums_of_{groups}"
        if sums not in self._written:
            self._written.add(sums)
            split = self.constant(f"{in_features}_in_{groups}", np.array([0, 0, groups, in_features // groups]))
            self.node("Reshape", [hidden, split], [sums + ".groups"])
            self.node("ReduceSum", [sums + ".groups", "rest"], [sums], keepdims=0)
        work = name + ".offset"
        middle = 1 << (weights[0].bits - 1)
        stored = self.weight(work + ".groups", np.concatenate([w.offset for w in weights]).astype(np.float16))
        # Up to the product these are constants, folded when the session is made.
        self.node("Cast", [stored], [work + ".float"], to=1)
        self.node("Cast", [name + ".scale.groups"], [work + ".scale"], to=1)
        self.node(
            "Mul", [work + ".scale", self.constant(f"float_{middle}", np.array(middle, np.float32))], [work + ".middle"]
        )
        self.node("Add", [work + ".float", work + ".middle"], [work + ".rows"])
        self.node("Transpose", [work + ".rows"], [work], perm=[1, 0])
        self.node("MatMul", [sums, work], [name + ".offsets"])
        return name + ".offsets"

    def _integer_product(self, name: str, weights: list[QuantizedWeight], hidden: str, output: str) -> None:
        """x @ W.T of integers, with x = scale * (high + low / 254) at every position.

        `high` is x / scale rounded, scale = max |x| / 127, and `low` what rounding left, in 254ths: together 16 bits,
        so the inputs are off by at most max |x| / 64516. Both halves are rows of one product, which reads the weights
        once; decoding, which waits for them, does not pay for the second. 8 bits alone cost SmolLM2-135M 3 % in
        perplexity, because a few inputs of some layers are a hundred times the others.

        x = 0 everywhere makes NaN of x / scale, which rounds to some integer and is multiplied by scale = 0.
        """
        one = self.constant("one", np.array(1, np.float32))
        zero_point = self.constant("input_zero_point", np.array(128, np.uint8))  # fast kernels take unsigned inputs
        work = name + ".inputs"
        self.node("Abs", [hidden], [work + ".magnitude"])
        self.node("ReduceMax", [work + ".magnitude", "rest"], [work + ".largest"], keepdims=1)
        self.node("Mul", [work + ".largest", self.constant("127th", np.array(1 / 127, np.float32))], [work + ".scale"])
        self.node("Div", [hidden, work + ".scale"], [work + ".scaled"])
        self.node("Round", [work + ".scaled"], [work + ".rounded"])
        self.node("Sub", [work + ".scaled", work + ".rounded"], [work + ".left"])
        self.node("Concat", [work + ".scaled", work + ".left"], [work + ".halves"], axis=1)
        self.node(
            "QuantizeLinear",
            [
                work + ".halves",
                self.constant("half_scales", np.array([1, 1 / 254], np.float32)),
                self.constant("half_zero_points", np.array([128, 128], np.uint8)),
            ],
            [work + ".integers"],
            axis=1,
        )
        integers, scale, *weight_zero_point = self._columns(name, weights)
        self.node(
            "MatMulIntegerToFloat",
            [work + ".integers", integers, one, scale, zero_point, *weight_zero_point],
            [work + ".products"],
            MICROSOFT,
        )
        halves = self.constant("127th_and_254th_of_it", np.array([[[1 / 127, 1 / (127 * 254)]]], np.float32))
        self.node("Mul", [work + ".largest", halves], [work + ".half_scales"])
        self.node("MatMul", [work + ".half_scales", work + ".products"], [output])  # [1, 2] @ [2, out] at each position

    def _rounded_product(
        self, name: str, weights: list[QuantizedWeight], inputs: Inputs, hidden: str, output: str
    ) -> None:
        """x @ W.T of integers, with x rounded to 8 bits as the checkpoint says (see `quantization.activations`)."""
        work = name + ".inputs"
        zero_point = self.constant(f"zero_point_{inputs.zero_point}", np.array(inputs.zero_point + 128, np.uint8))
        if inputs.scale is None:
            self.node("Abs", [hidden], [work + ".magnitude"])
            self.node("ReduceMax", [work + ".magnitude", "rest"], [work + ".largest"], keepdims=1)
            half_range = self.constant("127.5", np.array(127.5, np.float32))
            self.node("Div", [work + ".largest", half_range], [work + ".scale"])
            self.node("Div", [hidden, work + ".scale"], [work + ".scaled"])  # NaN for a row of zeros, times scale 0
            values, scale, product = work + ".scaled", self.constant("one", np.array(1, np.float32)), work + ".product"
        else:
            scale = self.constant(work + ".scale", np.array(inputs.scale, np.float32))
            values, product = hidden, output
        self.node("QuantizeLinear", [values, scale, zero_point], [work + ".integers"])
        integers, weight_scale, *weight_zero_point = self._columns(name, weights)
        self.node(
            "MatMulIntegerToFloat",
            [work + ".integers", integers, scale, weight_scale, zero_point, *weight_zero_point],
            [product],
            MICROSOFT,
        )
        if inputs.scale is None:
            self.node("Mul", [product, work + ".scale"], [output])

    def embedding(self, name: str, weight: Weight, ids: str, hidden_size: int) -> str:
        """[batch * length, 1, hidden_size] rows of a table; of a tied quantized one, the LM head's own integers."""
        output = name + ".rows"
        if not isinstance(weight, QuantizedWeight):
            self.node("Gather", [self.weight(name + ".weight", weight), ids], [output], axis=0)
            return output
        if _per_channel(weight) and self._activations == "int8":
            self._add_rows(name, weight, ids, output)
        else:
            self._add_block_rows(name, weight, ids, output, hidden_size)
        return output

    def _add_rows(self, name: str, weight: QuantizedWeight, ids: str, output: str) -> None:
        self.weight(name + ".integers", weight.integers)
        rows = {"integers": name + ".integers", "scale": self.weight(name + ".scale", weight.scale[:, 0])}
        if weight.zero_point is not None:
            rows["zero_point"] = self.weight(name + ".zero_point", weight.zero_point[:, 0])
        for kind, table in rows.items():
            self.node("Gather", [table, ids], [f"{output}.{kind}"], axis=0)
        self.node("Cast", [output + ".integers"], [output + ".values"], to=1)
        values = output + ".values"
        last = self.constant("rest", np.array([-1]))
        if weight.zero_point is not None:
            self.node("Cast", [output + ".zero_point"], [output + ".zero"], to=1)
            self.node("Unsqueeze", [output + ".zero", last], [output + ".zeros"])
            self.node("Sub", [values, output + ".zeros"], [output + ".shifted"])
            values = output + ".shifted"
        self.node("Unsqueeze", [output + ".scale", last], [output + ".scales"])
        self.node("Mul", [values, output + ".scales"], [output])

    def _add_block_rows(self, name: str, weight: QuantizedWeight, ids: str, output: str, hidden_size: int) -> None:
        integers, scale, *zero_point = self._blocks(name, [weight])
        bits, block_size = _storage(weight)
        self.node("Unsqueeze", [scale, "rest"], [scale + ".blocks"])  # folded when the session is made
        inputs = [integers, ids, scale + ".blocks"]
        if zero_point:
            groups = np.asarray(weight.zero_point)
            blocks = np.repeat(groups, hidden_size // block_size // groups.shape[1], axis=1)
            inputs.append(self.weight(name + ".zero_point_blocks", blocks[:, :, None]))  # a byte each, whatever `bits`
        self.node(
            "GatherBlockQuantized",
            inputs,
            [output + ".blocks"],
            MICROSOFT,
            gather_axis=0,
            quantize_axis=2,
            block_size=block_size,
            bits=bits,
        )
        self.constant("join_blocks", np.array([0, 0, -1]))
        self.node("Reshape", [output + ".blocks", "join_blocks"], [output])

    def _columns(self, name: str, weights: list[QuantizedWeight]) -> list[str]:
        """Names of MatMulIntegerToFloat's integers [in, out], scales [out] and, unless symmetric, zero points [out]."""
        scale = self.weight(name + ".scale", np.concatenate([weight.scale for weight in weights])[:, 0])
        if name + ".integers" in self._written:  # the table of a tied embedding, rows still
            self.node("Transpose", [name + ".integers"], [name + ".columns"], perm=[1, 0])  # folded into a constant
        else:
            self.weight(name + ".columns", _stacked([weight.integers for weight in weights]).T)
        names = [name + ".columns", scale]
        if weights[0].zero_point is not None:
            zero_point = np.concatenate([np.asarray(weight.zero_point) for weight in weights])
            names.append(self.weight(name + ".zero_point", zero_point[:, 0]))
        return names

    def _blocks(self, name: str, weights: list[QuantizedWeight]) -> list[str]:
        """Names of MatMulNBits' integers, scales and, unless symmetric, zero points."""
        bits, block_size = _storage(weights[0])
        integers = _stacked([_unsigned(weight, bits) for weight in weights])
        scale = np.concatenate([weight.scale for weight in weights])
        num_blocks = -(-integers.shape[1] // block_size)
        names = [self.weight(name + ".integers", _pack(integers, bits, block_size)), name + ".scale"]
        self._repeated(name + ".scale", scale, num_blocks)
        if weights[0].zero_point is not None and not weights[0].has_real_zero_point:
            zero_point = np.concatenate([np.asarray(weight.zero_point) for weight in weights])
            zero_point = np.repeat(zero_point, num_blocks // zero_point.shape[1], axis=1)
            names.append(self.weight(name + ".zero_point", _pack_rows(zero_point, bits)))
        return names

    def _repeated(self, name: str, scale: Floats, num_blocks: int) -> None:
        """[out, num_blocks] scales from [out, groups]; a group of several blocks is stored once.

        ONNX Runtime folds the repetition, and the way from float16, into a constant when it makes the session.
        """
        if name in self._written:
            return
        self._written.add(name)
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        stored = self.weight(name + ".groups", half if (half == scale).all() else scale)
        groups = scale.shape[1]
        self.node("Cast", [stored], [name if groups == num_blocks else name + ".float"], to=1)
        if groups != num_blocks:
            self.node("Unsqueeze", [name + ".float", "rest"], [name + ".column"])
            times = self.constant(f"repeat_{num_blocks // groups}", np.array([1, 1, num_blocks // groups]))
            self.node("Expand", [name + ".column", times], [name + ".repeated"])
            self.node("Reshape", [name + ".repeated", self.constant("join_groups", np.array([0, -1]))], [name])


def _stacked(rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """All of the rows; one alone, which an LM head is, is not copied."""
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _same_grid(weights: Sequence[Weight]) -> bool:
    """Whether weights can be stacked along `out` without changing an integer."""
    kinds = {
        (weight.bits, weight.group_size, weight.inputs, None if weight.zero_point is None else weight.zero_point.dtype)
        if isinstance(weight, QuantizedWeight)
        else None
        for weight in weights
    }
    return len(kinds) == 1


def _per_channel(weight: QuantizedWeight) -> bool:
    """Whether the integer product takes it: one scale per row, and a byte per integer no waste."""
    return weight.scale.shape[1] == 1 and weight.bits > 4 and not weight.has_real_zero_point


def _joined_bias(weights: Sequence[Weight], biases: Sequence[Floats | None]) -> Floats | None:
    if all(bias is None for bias in biases):
        return None
    parts = [
        np.zeros(shape(weight)[0], dtype=np.float32) if bias is None else bias
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return np.concatenate(parts)


def _storage(weight: QuantizedWeight) -> tuple[int, int]:
    """Bits and block size MatMulNBits holds the weight with; fewer bits and longer groups fit exactly.

    A group longer than a block repeats its scale, which changes nothing.
    """
    in_features = shape(weight)[1]
    group = weight.group_size or in_features
    bits = 4 if weight.bits <= 4 else 8
    if group in BLOCK_SIZES:
        return bits, group
    for block_size in LONG_GROUP_BLOCKS:
        if group % block_size == 0:
            return bits, block_size
    raise ValueError(
        f"ONNX Runtime needs quantization groups divisible by 16; got {group} of {in_features} inputs. "
        "Choose another group_size, or leave this layer unquantized."
    )


def _unsigned(weight: QuantizedWeight, bits: int) -> NDArray[np.uint8]:
    """[out, in] integers as MatMulNBits counts them: from its implied zero point 2^(bits-1) unless they have their own.

    With offsets, the middle of their range lies there: rounded inputs are multiplied with integers as small as can be.
    """
    if weight.has_real_zero_point:
        return weight.integers.astype(np.uint8) + np.uint8((1 << (bits - 1)) - (1 << (weight.bits - 1)))
    if weight.zero_point is not None:
        return weight.integers.astype(np.uint8)
    return weight.integers.view(np.uint8) + np.uint8(1 << (bits - 1))  # bytes wrap around, which gives the right ones


def _pack(integers: NDArray[np.uint8], bits: int, block_size: int) -> NDArray[np.uint8]:
    """[out, blocks, block_size * bits / 8]."""
    blocks = integers.reshape(len(integers), -1, block_size)
    return blocks if bits == 8 else _pairs(blocks)


def _pack_rows(zero_point: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[out, ceil(blocks * bits / 8)], packed like the integers; each row starts a new byte."""
    if bits == 8:
        return zero_point
    return _pairs(np.pad(zero_point, ((0, 0), (0, zero_point.shape[1] % 2))))


def _pairs(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit integers of the last dimension in each byte, the first in the low half."""
    packed: NDArray[np.uint8] = values[..., 0::2] | values[..., 1::2] << np.uint8(4)
    return packed
