"""OpenVINO's graph: a stateful decoder in the shapes that its CPU plugin fuses, on the checkpoint's own integers.

A quantized weight is stored as `Constant -> Convert -> (Subtract zero point) -> Multiply scale -> Reshape`; the plugin
keeps the integers in memory and multiplies with them. The KV cache is a pair of variables per layer. Inputs and outputs
are named as OpenVINO GenAI names them: input_ids, attention_mask, position_ids, beam_idx -> logits.

The shapes are those that openvinotoolkit/openvino, src/plugins/intel_cpu/src/transformations, looks for: stateful
attention, rotary positions, RMS norm, products with compressed weights, rows of compressed embeddings. A test reads the
compiled graph to see that each is still found.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.engines.decoder import Decoder, Floats, Layer, Norm, Weight
from tasks.engines.families import Activation
from tasks.engines.rotary import Rotary
from tasks.quantization.checkpoint_format import QuantizedWeight

MASKED = -65504.0  # float16's lowest: finite in every precision, so that a row masked whole is no NaN


def build_model(decoder: Decoder) -> Any:
    """The stateful `openvino.Model` of a decoder.

    Inputs: input_ids [batch, length] int64, attention_mask [batch, past + length] int64 (1: seen, 0: padding),
    position_ids [batch, length] int64, beam_idx [batch] int32 (which row of the cache each sequence continues).
    Output: logits [batch, length, vocab_size] float32.
    """
    import openvino
    from openvino import opset13 as ops

    _refuse_rounding(decoder)
    input_ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    attention_mask = ops.parameter([-1, -1], np.int64, name="attention_mask")
    position_ids = ops.parameter([-1, -1], np.int64, name="position_ids")
    beam_idx = ops.parameter([-1], np.int32, name="beam_idx")
    parameters = [input_ids, attention_mask, position_ids, beam_idx]
    for parameter in parameters:
        parameter.output(0).set_names({parameter.get_friendly_name()})

    embedding = _weight(decoder.embedding, "model.embed_tokens.weight")
    lm_head = embedding if decoder.tied else _weight(decoder.lm_head, "lm_head.weight")
    hidden = ops.gather(embedding, ops.convert(input_ids, "i32"), ops.constant(0, dtype=np.int32))
    if decoder.embedding_scale != 1:
        hidden = ops.multiply(hidden, np.float32(decoder.embedding_scale))
    if decoder.positions is not None:
        table = _constant(decoder.positions, "positions")
        learned = ops.gather(table, ops.convert(position_ids, "i32"), ops.constant(0, dtype=np.int32))
        hidden = ops.add(hidden, learned)
    attention = _Attention(decoder, input_ids, attention_mask, position_ids, beam_idx)
    for index, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{index}."
        normed = _norm(hidden, layer.attention_norm, prefix + "input_layernorm")
        attended = attention.apply(normed, layer, index)
        if layer.attention_output_norm:
            attended = _norm(attended, layer.attention_output_norm, prefix + "attention_output_norm")
        before, hidden = hidden, ops.add(hidden, attended)
        source = before if decoder.parallel_residual else hidden
        normed = _norm(source, layer.feed_forward_norm, prefix + "post_attention_layernorm")
        fed = _feed_forward(normed, layer, decoder.activation, prefix + "mlp.")
        if layer.feed_forward_output_norm:
            fed = _norm(fed, layer.feed_forward_output_norm, prefix + "feed_forward_output_norm")
        hidden = ops.add(hidden, fed)
    hidden = _norm(hidden, decoder.norm, "model.norm")
    logits = ops.matmul(hidden, lm_head, False, True, name="lm_head")
    if decoder.logit_softcap is not None:
        logits = _softcapped(logits, decoder.logit_softcap)
    logits.output(0).set_names({"logits"})

    model = openvino.Model([ops.result(logits, name="logits_result")], attention.sinks, parameters, "decoder")
    model.set_rt_info(decoder.max_position_embeddings, ["slimline", "max_length"])
    windows = " ".join(str(layer.window or 0) for layer in decoder.layers)  # 0: a layer that sees all before
    model.set_rt_info(windows, ["slimline", "windows"])
    name_nodes(model)
    return model


def _refuse_rounding(decoder: Decoder) -> None:
    for name, weight in decoder.quantized():
        if weight.inputs or weight.format != "int8":
            what = "FP8" if weight.format != "int8" else "integers with rounded inputs"
            raise ValueError(
                f"OpenVINO takes weights of integers alone; {name} is {what}. Quantize without `activations`, and to "
                "integers, for this engine."
            )
    if decoder.cache:
        raise ValueError(
            f"OpenVINO takes no scales of a KV cache; this checkpoint has {decoder.cache.format} ones. Quantize "
            "without `kv_cache`, and use the engine's own option."
        )


class _Attention:
    """Grouped-query attention with rotary positions; what all layers share is made once."""

    def __init__(self, decoder: Decoder, input_ids: Any, attention_mask: Any, position_ids: Any, beam_idx: Any) -> None:
        self.decoder = decoder
        self.beam_idx = beam_idx
        self.batch_size = _dimension(input_ids, 0)
        windows = dict.fromkeys(layer.window for layer in decoder.layers)
        self.masks = {window: _mask(input_ids, attention_mask, window) for window in windows}
        self.angles = [_angles(position_ids, rotary) for rotary in decoder.rotaries]
        self.sinks: list[Any] = []

    def apply(self, hidden: Any, layer: Layer, index: int) -> Any:
        """[batch, length, hidden_size] -> [batch, length, hidden_size], the cache of layer `index` extended."""
        from openvino import opset13 as ops

        decoder, prefix = self.decoder, f"model.layers.{index}.self_attn."
        query = self._heads(hidden, layer.q, layer.q_bias, layer.q_norm, decoder.num_heads, prefix + "q")
        key = self._heads(hidden, layer.k, layer.k_bias, layer.k_norm, decoder.num_kv_heads, prefix + "k")
        value = self._heads(hidden, layer.v, layer.v_bias, None, decoder.num_kv_heads, prefix + "v")
        keys = self._cache(self._rotate(key, layer), f"past_key_values.{index}.keypresent.{index}.key")
        values = self._cache(value, f"past_key_values.{index}.valuepresent.{index}.value")
        attended = self._attend(self._rotate(query, layer), self._repeat(keys), self._repeat(values), layer)
        merged = ops.reshape(
            ops.transpose(attended, np.array([0, 2, 1, 3])),
            np.array([0, 0, decoder.num_heads * decoder.head_dim]),
            special_zero=True,
        )
        return _linear(merged, layer.o, prefix + "o_proj", layer.o_bias)

    def _attend(self, query: Any, keys: Any, values: Any, layer: Layer) -> Any:
        """softmax(scores + mask) values, [batch, heads, length, head_dim]; fused unless the scores are capped."""
        from openvino import opset13 as ops

        mask, scale = self.masks[layer.window], np.float32(layer.attention_scale)
        if self.decoder.attention_softcap is None:
            if layer.attention_scale == self.decoder.head_dim**-0.5:  # the operator's own
                return ops.scaled_dot_product_attention(query, keys, values, mask)
            return ops.scaled_dot_product_attention(query, keys, values, mask, ops.constant(scale))
        scores = ops.matmul(ops.multiply(query, scale), keys, False, True)
        scores = ops.add(_softcapped(scores, self.decoder.attention_softcap), mask)
        return ops.matmul(ops.softmax(scores, -1), values, False, False)

    def _heads(
        self, hidden: Any, weight: Weight, bias: Floats | None, norm: Norm | None, num_heads: int, name: str
    ) -> Any:
        """[batch, length, hidden_size] -> [batch, num_heads, length, head_dim]."""
        from openvino import opset13 as ops

        projected = ops.reshape(
            _linear(hidden, weight, name + "_proj", bias),
            np.array([0, 0, num_heads, self.decoder.head_dim]),
            special_zero=True,
        )
        if norm is not None:
            projected = _norm(projected, norm, name + "_norm")
        return ops.transpose(projected, np.array([0, 2, 1, 3]))

    def _rotate(self, x: Any, layer: Layer) -> Any:
        """x cos + rotate_half(x) sin of the dimensions that turn, [batch, heads, length, head_dim]."""
        from openvino import opset13 as ops

        if layer.rotary is None:
            return x
        cos, sin = self.angles[self.decoder.rotaries.index(layer.rotary)]
        dim = layer.rotary.dim
        turning = x if dim == self.decoder.head_dim else _part(x, 0, dim)
        rotated = ops.concat(
            [ops.multiply(_part(turning, dim // 2, None), np.float32(-1)), _part(turning, 0, dim // 2)], -1
        )
        turned = ops.add(ops.multiply(turning, cos), ops.multiply(rotated, sin))
        return turned if dim == self.decoder.head_dim else ops.concat([turned, _part(x, dim, None)], -1)

    def _cache(self, current: Any, variable: str) -> Any:
        """What the variable holds, reordered by beam_idx, with `current` appended; the variable then holds that."""
        from openvino import opset13 as ops

        num_heads, head_dim = self.decoder.num_kv_heads, self.decoder.head_dim
        empty = ops.broadcast(
            ops.constant(np.float32(0)),
            ops.concat([self.batch_size, ops.constant(np.array([num_heads, 0, head_dim]))], 0),
        )
        past = ops.read_value(empty, variable, np.float32, [-1, num_heads, -1, head_dim])
        reordered = ops.gather(past, self.beam_idx, ops.constant(0, dtype=np.int32))
        present = ops.concat([reordered, current], 2)
        self.sinks.append(ops.assign(present, variable))
        return present

    def _repeat(self, cached: Any) -> Any:
        """Each head as often as queries share it, [batch, num_heads, length, head_dim]."""
        from openvino import opset13 as ops

        decoder = self.decoder
        times = decoder.num_heads // decoder.num_kv_heads
        if times == 1:
            return cached
        repeated = ops.broadcast(
            ops.unsqueeze(cached, np.array(2)), np.array([1, 1, times, 1, 1]), broadcast_spec="BIDIRECTIONAL"
        )
        return ops.reshape(repeated, np.array([0, decoder.num_heads, -1, decoder.head_dim]), special_zero=True)


def _part(x: Any, start: int, stop: int | None) -> Any:
    """x[..., start:stop] of [batch, heads, length, head_dim]."""
    from openvino import opset13 as ops

    end = np.iinfo(np.int64).max if stop is None else stop
    return ops.slice(x, np.array([start]), np.array([end]), np.array([1]), np.array([3]))


def _feed_forward(x: Any, layer: Layer, activation: Activation, prefix: str) -> Any:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""
    from openvino import opset13 as ops

    if layer.gate is None:
        hidden = _active(_linear(x, layer.up, prefix + "up_proj", layer.up_bias), activation)
    else:
        gate = _active(_linear(x, layer.gate, prefix + "gate_proj", layer.gate_bias), activation)
        hidden = ops.multiply(gate, _linear(x, layer.up, prefix + "up_proj", layer.up_bias))
    return _linear(hidden, layer.down, prefix + "down_proj", layer.down_bias)


def _active(x: Any, activation: Activation) -> Any:
    from openvino import opset13 as ops

    if activation == "silu":
        return ops.swish(x)
    if activation == "relu":
        return ops.relu(x)
    return ops.gelu(x, "tanh" if activation == "gelu_tanh" else "erf")


def _softcapped(x: Any, cap: float) -> Any:
    """cap * tanh(x / cap)."""
    from openvino import opset13 as ops

    return ops.multiply(ops.tanh(ops.divide(x, np.float32(cap))), np.float32(cap))


def _linear(x: Any, weight: Weight, name: str, bias: Floats | None = None) -> Any:
    """x W^T + b, [..., in] -> [..., out]; `name` is the module's, without `.weight`."""
    from openvino import opset13 as ops

    product = ops.matmul(x, _weight(weight, name + ".weight"), False, True, name=name)
    if isinstance(weight, QuantizedWeight) and weight.has_real_zero_point:
        product = ops.add(product, _offset_product(x, weight, name + ".offset"))
    if bias is None:
        return product
    return ops.add(product, _constant(bias.reshape(1, 1, -1), name + ".bias"))


def _offset_product(x: Any, weight: QuantizedWeight, name: str) -> Any:
    """What real-valued offsets add to x W^T: each group's sum of inputs, times its offset; [..., out].

    A real zero point on the weight itself is computed with too, but a prompt then takes half as long again.
    """
    from openvino import opset13 as ops

    groups = weight.scale.shape[1]
    split = np.array([0, 0, groups, weight.shape[1] // groups])
    sums = ops.reduce_sum(ops.reshape(x, split, special_zero=True), np.array([3]))
    middle = ops.multiply(_scale(weight.scale, name + "_scale"), np.float32(_middle(weight.bits)))
    return ops.matmul(sums, ops.add(_scale(weight.offset, name), middle), False, True)


def _middle(bits: int) -> int:
    """The integer in the middle of the type's range, [0, 2 ** bits - 1]."""
    return 1 << (bits - 1)


def _weight(weight: Weight, name: str) -> Any:
    """The weight's values, [out, in] float32, as an expression on its stored numbers.

    With a real zero point they are those less their group's offset and counted from the middle, see `_offset_product`.

    Constants: `name` (integers [out, in] or [out, groups, group_size], or float32 [out, in]), `name`_scale and
    `name`_zero_point ([out, 1] or [out, groups, 1]).
    """
    from openvino import opset13 as ops

    if not isinstance(weight, QuantizedWeight):
        return _constant(weight, name)
    out_features, in_features = weight.shape
    groups = weight.scale.shape[1]
    grid_shape = [out_features, 1] if groups == 1 else [out_features, groups, 1]
    shape = [out_features, in_features] if groups == 1 else [out_features, groups, in_features // groups]
    values = ops.convert(_integers(weight.integers, weight.bits, shape, name), "f32")
    if weight.has_real_zero_point:
        middle = np.full([1] * len(grid_shape), _middle(weight.bits), np.uint8)
        zero_point = _integers(middle, weight.bits, list(middle.shape), name + "_zero_point")
        values = ops.subtract(values, ops.convert(zero_point, "f32"))
    elif weight.zero_point is not None:
        points = weight.zero_point.astype(np.uint8)
        zero_point = _integers(points, weight.bits, grid_shape, name + "_zero_point")
        values = ops.subtract(values, ops.convert(zero_point, "f32"))
    values = ops.multiply(values, _scale(weight.scale.reshape(grid_shape), name + "_scale"))
    if groups == 1:
        return values
    return ops.reshape(values, np.array([out_features, in_features]), special_zero=False)


def _scale(scale: Floats, name: str) -> Any:
    """The scale as float32, stored as float16 where that loses nothing."""
    from openvino import opset13 as ops

    short = scale.astype(np.float16)
    if np.array_equal(short.astype(np.float32), scale):
        return ops.convert(_constant(short, name), "f32")
    return _constant(scale, name)


def _integers(integers: NDArray[np.int8] | NDArray[np.uint8], bits: int, shape: list[int], name: str) -> Any:
    """A constant of i8 or u8, or of i4 or u4 for at most 4 bits: two to a byte, the first in its low half."""
    import openvino

    if bits > 4:
        return _constant(integers.reshape(shape), name)
    nibbles = integers.reshape(-1).view(np.uint8) & 0xF
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    # By attribute: Type("i4") is numpy's four-byte integer.
    element_type = openvino.Type.i4 if integers.dtype == np.int8 else openvino.Type.u4
    # A tensor made around a numpy array does not keep it alive; this one has its own memory.
    tensor = openvino.Tensor(element_type, openvino.Shape(shape))
    tensor.data.reshape(-1).view(np.uint8)[:] = nibbles[0::2] | (nibbles[1::2] << 4)
    return _named(openvino.op.Constant(tensor), name)


def _constant(values: NDArray[Any], name: str) -> Any:
    """A constant on the array's own memory, which it keeps alive: a model is not held twice."""
    import openvino

    return _named(openvino.op.Constant(np.ascontiguousarray(values), shared_memory=True), name)


def _named(node: Any, name: str) -> Any:
    node.set_friendly_name(name)
    return node


def _norm(x: Any, norm: Norm, name: str) -> Any:
    """The norm over the last axis; `name` is the module's, without `.weight`."""
    from openvino import opset13 as ops

    rank = len(x.get_output_partial_shape(0))
    gain = _constant(norm.gain.reshape([1] * (rank - 1) + [-1]), name + ".weight")
    if norm.bias is not None:
        normed = ops.mvn(x, np.array([-1]), True, norm.eps, "inside_sqrt")
        return ops.add(
            ops.multiply(normed, gain), _constant(norm.bias.reshape([1] * (rank - 1) + [-1]), name + ".bias")
        )
    mean = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
    inverse = ops.divide(np.float32(1), ops.sqrt(ops.add(mean, np.float32(norm.eps))))
    return ops.multiply(ops.multiply(x, inverse), gain)


def _angles(position_ids: Any, rotary: Rotary) -> tuple[Any, Any]:
    """Cosines and sines of the angles, each [batch, 1, length, rotary_dim], the halves equal."""
    from openvino import opset13 as ops

    positions = ops.convert(ops.unsqueeze(position_ids, np.array(2)), "f32")
    angles = ops.multiply(positions, _constant(rotary.inverse_frequencies.reshape(1, 1, -1), "inverse_frequencies"))
    both = ops.concat([angles, angles], -1)
    axis = np.array(1)
    cos, sin = ops.unsqueeze(ops.cos(both), axis), ops.unsqueeze(ops.sin(both), axis)
    if rotary.scale == 1:
        return cos, sin
    return ops.multiply(cos, np.float32(rotary.scale)), ops.multiply(sin, np.float32(rotary.scale))


def _mask(input_ids: Any, attention_mask: Any, sliding_window: int | None) -> Any:
    """What is added to the scores: 0 where a query sees a key, MASKED elsewhere, [batch, 1, length, past + length].

    With a window it is written as `gpt_oss_sliding_window_pattern` in openvinotoolkit/openvino,
    src/common/transformations/src/transformations/sdpa_to_paged_attention/state_management_pattern.cpp, wants it: paged
    attention takes the window from there, and without that form drops it.
    """
    from openvino import opset13 as ops

    total = ops.squeeze(_dimension(attention_mask, 1), np.array([0]))
    length = ops.squeeze(_dimension(input_ids, 1), np.array([0]))
    zero, one = ops.constant(0, dtype=np.int64), ops.constant(1, dtype=np.int64)
    keys = ops.range(zero, total, one, "i64")  # [past + length]
    queries = ops.unsqueeze(ops.range(ops.subtract(total, length), total, one, "i64"), np.array(1))  # [length, 1]
    not_future = ops.less_equal(keys, queries)
    not_padding = ops.unsqueeze(ops.convert(attention_mask, "boolean"), np.array([1, 2]))
    if sliding_window is None:
        return ops.select(ops.logical_and(not_future, not_padding), np.float32(0), np.float32(MASKED))
    not_past = ops.greater(keys, ops.add(queries, ops.constant(-sliding_window, dtype=np.int64)))
    true = ops.constant(True)
    seen = ops.bitwise_and(not_future, ops.bitwise_and(ops.bitwise_and(true, not_past), true))
    seen = ops.bitwise_and(seen, not_padding)
    one_head = ops.constant(np.array([1]))
    shape = ops.concat([_dimension(input_ids, 0), one_head, _dimension(input_ids, 1), _dimension(attention_mask, 1)], 0)
    mask = ops.select(ops.broadcast(seen, shape), np.float32(0), np.float32(MASKED))
    end = np.array([np.iinfo(np.int64).max])
    return ops.slice(mask, np.array([0]), end, np.array([1]), np.array([3]))


def _dimension(x: Any, axis: int) -> Any:
    """The size of `x` along `axis`, [1] int64."""
    from openvino import opset13 as ops

    return ops.gather(ops.shape_of(x, "i64"), np.array([axis]), np.array(0))


def name_nodes(model: Any) -> None:
    """Gives nodes without a name one by their place; the library's own counts all nodes the process ever made."""
    for index, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}.{index}")


def name_by_place(model: Any) -> None:
    """Names all nodes by their place, those of a converter too, whose names count all that a process ever made."""
    for index, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(f"{node.get_type_name()}.{index}")
