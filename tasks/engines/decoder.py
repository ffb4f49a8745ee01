"""A decoder as plain numpy values, read from a checkpoint: what every engine's graph is built from.

The graphs branch on these values and know no family: kind of norm, gated or plain feed-forward, rotary or learned
positions, windows, soft caps. families.py has a row for each family that can be read. Quantized weights stay the
checkpoint's integers; nothing here dequantizes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.engines.families import FAMILIES, Activation, Family, Options
from tasks.engines.rotary import Rotary
from tasks.quantization.checkpoint_format import CacheScales, QuantizedWeight, read_cache_scales, read_weights

Floats = NDArray[np.float32]
Weight = Floats | QuantizedWeight
"""A linear layer's weight, [out, in]: float32, or integers with their scales."""

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, eq=False)
class Norm:
    """x / sqrt(mean(x^2) + eps) * gain ("rms"), or the same of x - mean(x), plus bias ("layer")."""

    kind: Literal["rms", "layer"]
    gain: Floats  # [features]
    eps: float
    bias: Floats | None = None  # [features]; of "layer" alone, where it is never None


@dataclass(frozen=True, eq=False)
class Layer:
    """One block. Every weight is [out, in]; biases are float32.

    h = x + attention_output_norm(attention(attention_norm(x))), then
    h + feed_forward_output_norm(feed_forward(feed_forward_norm(h))); see `Decoder.parallel_residual` for the other way.
    """

    q: Weight  # [num_heads * head_dim, hidden_size]
    k: Weight  # [num_kv_heads * head_dim, hidden_size]
    v: Weight  # [num_kv_heads * head_dim, hidden_size]
    o: Weight  # [hidden_size, num_heads * head_dim]
    gate: Weight | None  # [intermediate_size, hidden_size]; None: down(activation(up(x))), not gated
    up: Weight  # [intermediate_size, hidden_size]
    down: Weight  # [hidden_size, intermediate_size]
    attention_norm: Norm
    feed_forward_norm: Norm
    attention_scale: float  # of query times key
    attention_output_norm: Norm | None = None
    feed_forward_output_norm: Norm | None = None
    q_bias: Floats | None = None
    k_bias: Floats | None = None
    v_bias: Floats | None = None
    o_bias: Floats | None = None
    gate_bias: Floats | None = None
    up_bias: Floats | None = None
    down_bias: Floats | None = None
    q_norm: Norm | None = None  # of each head, before the rotation
    k_norm: Norm | None = None
    rotary: Rotary | None = None  # layers that turn alike share one
    window: int | None = None  # a position sees this many back, itself included; None: all


@dataclass(frozen=True, eq=False)
class Decoder:
    """A causal language model: embedding, blocks, final norm, LM head."""

    layers: tuple[Layer, ...]
    embedding: Weight  # [vocab_size, hidden_size]
    lm_head: Weight  # [vocab_size, hidden_size]; `is embedding` when tied
    norm: Norm
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    activation: Activation
    positions: Floats | None = None  # [max_position_embeddings, hidden_size], learned; added to the embedding's rows
    embedding_scale: float = 1.0  # of the embedding's rows; a tied LM head is not scaled
    attention_softcap: float | None = None  # c: scores become c tanh(score / c), before the mask
    logit_softcap: float | None = None
    parallel_residual: bool = False  # x + attention(norm(x)) + feed_forward(norm(x)), with x in both
    cache: CacheScales | None = None  # how keys and values are rounded; None: they are not

    @property
    def tied(self) -> bool:
        """Whether the LM head is the embedding."""
        return self.lm_head is self.embedding

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The different rotations of its layers, in the order of their first use."""
        found: list[Rotary] = []
        for layer in self.layers:
            if layer.rotary is not None and layer.rotary not in found:
                found.append(layer.rotary)
        return tuple(found)

    def quantized(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Every quantized weight, and what to call it in an error."""
        named = [("embedding", self.embedding), ("lm_head", self.lm_head)]
        for index, layer in enumerate(self.layers):
            named += [(f"layer {index}'s {name}", getattr(layer, name)) for name in LINEARS]
        return ((name, weight) for name, weight in named if isinstance(weight, QuantizedWeight))


def read_decoder(checkpoint: Path) -> Decoder:
    """The decoder in a checkpoint directory of one of the families in families.py, float or quantized.

    Raises:
        ValueError: the family, an option of its configuration or a tensor is not one this reader knows.
    """
    name = json.loads((checkpoint / "config.json").read_text()).get("model_type")
    if name not in FAMILIES:
        raise ValueError(
            f"An engine graph can be built for the families {', '.join(FAMILIES)}; got {name!r}. "
            "Use the engine 'pytorch' for it."
        )
    config = _read_config(checkpoint)
    family, tied = FAMILIES[name], bool(config.tie_word_embeddings)
    options = family.read_options(config)
    tensors = _Tensors(checkpoint, family, tied=tied)

    layers = tuple(_take_layer(tensors, family, options, index) for index in range(len(options.windows)))
    embedding = tensors.weight(family.embedding)
    decoder = Decoder(
        layers=layers,
        embedding=embedding,
        lm_head=embedding if tied else tensors.lm_head(),
        norm=_take_norm(tensors, family, options, family.final_norm),
        num_heads=options.num_heads,
        num_kv_heads=options.num_kv_heads,
        head_dim=options.head_dim,
        hidden_size=options.hidden_size,
        vocab_size=options.vocab_size,
        max_position_embeddings=_longest(options),
        activation=options.activation,
        positions=_take_positions(tensors, family, options),
        embedding_scale=options.embedding_scale,
        attention_softcap=options.attention_softcap,
        logit_softcap=options.logit_softcap,
        parallel_residual=options.parallel_residual,
        cache=read_cache_scales(checkpoint),
    )
    tensors.refuse_rest(name)
    _check_shapes(decoder)
    return decoder


def _read_config(checkpoint: Path) -> Any:
    """The configuration as transformers completes it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except (StrictDataclassError, KeyError) as error:  # the latter of rotary positions
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(
            f"config.json must be one that transformers takes; that of {checkpoint} is not: {reason}. "
            "Save the model again."
        ) from error


def shape(weight: Weight) -> tuple[int, int]:
    """(out, in) of a weight."""
    out_features, in_features = weight.shape
    return int(out_features), int(in_features)


def floats(weight: Weight) -> Floats:
    """The weight's values, [out, in] float32: for an engine that cannot hold its integers."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def rows(weight: Weight, indices: NDArray[np.int64]) -> Weight:
    """Some outputs of a weight, in that order: the same integers, with the scales and zero points of their rows."""
    return weight.rows(indices) if isinstance(weight, QuantizedWeight) else weight[indices]


class _Tensors:
    """A checkpoint's tensors by the names of a family's modules; each is taken once."""

    def __init__(self, checkpoint: Path, family: Family, *, tied: bool) -> None:
        self._weights: dict[str, Any] = {
            name: value for name, value in read_weights(checkpoint).items() if not name.endswith(family.ignored)
        }
        if tied:
            self._weights.pop("lm_head.weight", None)
        # A checkpoint of the bare model, without the module around it, is loaded by transformers too.
        bare = not any(name.startswith(family.base + ".") for name in self._weights)
        self._base = "" if bare else family.base + "."
        self._checkpoint = checkpoint

    def weight(self, module: str) -> Weight:
        return self._take(f"{self._base}{module}.weight")

    def lm_head(self) -> Weight:
        return self._take("lm_head.weight")

    def floats(self, module: str, parameter: str = "weight") -> Floats:
        name = f"{self._base}{module}.{parameter}"
        value = self._take(name)
        if isinstance(value, QuantizedWeight):
            raise ValueError(f"{name} must be float; it is quantized. Add it to the quantization method's `ignore`.")
        return np.asarray(value, dtype=np.float32)

    def bias(self, module: str) -> Floats | None:
        return self.floats(module, "bias") if f"{self._base}{module}.bias" in self._weights else None

    def refuse_rest(self, family: str) -> None:
        left = sorted(self._weights)
        if left:
            raise ValueError(
                f"{self._checkpoint} holds tensors that a {family} decoder here has no place for: "
                f"{', '.join(left[:3])}{', …' if len(left) > 3 else ''}. Use the engine 'pytorch' for it."
            )

    def _take(self, name: str) -> Weight:
        try:
            return self._weights.pop(name)  # type: ignore[no-any-return]
        except KeyError:
            raise ValueError(
                f"The checkpoint must hold the tensor {name}; it is missing. Save the model again."
            ) from None


def _take_layer(tensors: _Tensors, family: Family, options: Options, index: int) -> Layer:
    prefix = f"{family.blocks}.{index}."

    def norm(name: str | None) -> Norm | None:
        return None if name is None else _take_norm(tensors, family, options, prefix + name)

    parts = _take_linears(tensors, family, options, prefix)
    weights: dict[str, Any] = {name: weight for name, (weight, _) in parts.items()}
    biases: dict[str, Any] = {f"{name}_bias": bias for name, (_, bias) in parts.items()}
    return Layer(
        **{"gate": None} | weights | biases,
        attention_norm=_take_norm(tensors, family, options, prefix + family.attention_norm),
        feed_forward_norm=_take_norm(tensors, family, options, prefix + family.feed_forward_norm),
        attention_output_norm=norm(family.attention_output_norm),
        feed_forward_output_norm=norm(family.feed_forward_output_norm),
        q_norm=norm(family.q_norm),
        k_norm=norm(family.k_norm),
        attention_scale=options.attention_scales[index],
        rotary=options.rotaries[index],
        window=options.windows[index],
    )


def _take_linears(
    tensors: _Tensors, family: Family, options: Options, prefix: str
) -> dict[str, tuple[Any, Floats | None]]:
    """Weight and bias of every linear layer of a block; those stored as one are split into their parts."""

    def linear(module: str) -> tuple[Weight, Floats | None]:
        weight, bias = tensors.weight(prefix + module), tensors.bias(prefix + module)
        if family.weights_are == "out, in":
            return weight, bias
        if isinstance(weight, QuantizedWeight):
            raise ValueError(
                f"{prefix}{module} must be float, because its weight is stored as [in, out]; it is quantized. "
                "Start from the model before it was quantized."
            )
        return np.ascontiguousarray(weight.T), bias

    parts: dict[str, tuple[Weight, Floats | None]] = {}
    names = {"o": family.o, "down": family.down}
    if family.qkv:
        parts |= _split(prefix + family.qkv, *linear(family.qkv), _qkv_rows(family, options))
    else:
        names |= {"q": family.q, "k": family.k, "v": family.v}
    if family.gate_up:
        weight, bias = linear(family.gate_up)
        half = np.arange(shape(weight)[0] // 2)
        parts |= _split(prefix + family.gate_up, weight, bias, {"gate": half, "up": half + len(half)})
    else:
        names |= {"up": family.up} | ({"gate": family.gate} if family.gate else {})
    return parts | {name: linear(module) for name, module in names.items()}


def _split(
    module: str, weight: Weight, bias: Floats | None, parts: dict[str, NDArray[np.int64]]
) -> dict[str, tuple[Weight, Floats | None]]:
    """Weight and bias of each part, which has some of the outputs."""
    expected = sum(len(indices) for indices in parts.values())
    if shape(weight)[0] != expected:
        raise ValueError(
            f"{module} must have {expected} outputs by its configuration; got {shape(weight)[0]}. "
            "Save the model with a matching config.json."
        )
    return {name: (rows(weight, indices), None if bias is None else bias[indices]) for name, indices in parts.items()}


def _qkv_rows(family: Family, options: Options) -> dict[str, NDArray[np.int64]]:
    """Which outputs of the layer that holds all three are queries, keys and values."""
    heads = (options.num_heads, options.num_kv_heads, options.num_kv_heads)
    if family.qkv_rows == "by head":
        every = np.arange(3 * options.num_heads * options.head_dim).reshape(options.num_heads, 3, options.head_dim)
        return {name: every[:, index].reshape(-1) for index, name in enumerate("qkv")}
    ends = np.cumsum([count * options.head_dim for count in heads])
    return {
        name: np.arange(end - count * options.head_dim, end)
        for name, count, end in zip("qkv", heads, ends, strict=True)
    }


def _take_norm(tensors: _Tensors, family: Family, options: Options, module: str) -> Norm:
    gain = tensors.floats(module)
    if family.gain_offset:
        gain = gain + np.float32(family.gain_offset)
    bias = tensors.floats(module, "bias") if family.norm == "layer" else None
    return Norm(family.norm, gain, options.norm_eps, bias)


def _take_positions(tensors: _Tensors, family: Family, options: Options) -> Floats | None:
    if family.positions is None:
        return None
    table = tensors.floats(family.positions)
    expected = (options.max_position_embeddings + family.position_offset, options.hidden_size)
    if table.shape != expected:
        raise ValueError(
            f"The table of positions must be {list(expected)} by config.json; got {list(table.shape)}. "
            "Save the model with a matching config.json."
        )
    return table[family.position_offset :]


def _longest(options: Options) -> int:
    """The longest sequence that the model's positions, and its rotations as a graph holds them, are right for."""
    lengths = [rotary.max_length for rotary in options.rotaries if rotary is not None and rotary.max_length is not None]
    return min([options.max_position_embeddings, *lengths])


def _check_shapes(decoder: Decoder) -> None:
    heads, kv_heads = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    tables = {"embedding": decoder.embedding, "LM head": decoder.lm_head}
    for name, table in tables.items():
        if shape(table) != (decoder.vocab_size, decoder.hidden_size):
            raise ValueError(
                f"The {name} must be {[decoder.vocab_size, decoder.hidden_size]} by config.json; got "
                f"{list(shape(table))}. Save the model with a matching config.json."
            )
    for index, layer in enumerate(decoder.layers):
        intermediate = shape(layer.up)[0]
        expected = {
            "q": (heads, decoder.hidden_size),
            "k": (kv_heads, decoder.hidden_size),
            "v": (kv_heads, decoder.hidden_size),
            "o": (decoder.hidden_size, heads),
            "gate": (intermediate, decoder.hidden_size),
            "up": (intermediate, decoder.hidden_size),
            "down": (decoder.hidden_size, intermediate),
        }
        for name, wanted in expected.items():
            weight = getattr(layer, name)
            if weight is not None and shape(weight) != wanted:
                raise ValueError(
                    f"Layer {index}'s {name} must be {list(wanted)} by its configuration; "
                    f"got {list(shape(weight))}. Save the model with a matching config.json."
                )
