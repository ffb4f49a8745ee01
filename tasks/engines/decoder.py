"""A decoder as plain numpy values, read from a checkpoint: what every engine's graph is built from.

Covers the Llama family of blocks: RMS norm, rotary grouped-query attention, gated SiLU feed-forward. Quantized weights
stay the checkpoint's integers; nothing here dequantizes.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.quantization.checkpoint_format import CacheScales, QuantizedWeight, read_cache_scales, read_weights

Floats = NDArray[np.float32]
Weight = Floats | QuantizedWeight
"""A linear layer's weight, [out, in]: float32, or integers with their scales."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Layer:
    """One block. Every weight is [out, in]; biases and norms are float32."""

    q: Weight  # [num_heads * head_dim, hidden_size]
    k: Weight  # [num_kv_heads * head_dim, hidden_size]
    v: Weight  # [num_kv_heads * head_dim, hidden_size]
    o: Weight  # [hidden_size, num_heads * head_dim]
    gate: Weight  # [intermediate_size, hidden_size]
    up: Weight  # [intermediate_size, hidden_size]
    down: Weight  # [hidden_size, intermediate_size]
    input_norm: Floats  # [hidden_size]
    post_attention_norm: Floats  # [hidden_size]
    q_bias: Floats | None = None
    k_bias: Floats | None = None
    v_bias: Floats | None = None
    o_bias: Floats | None = None
    q_norm: Floats | None = None  # [head_dim], before the rotation (Qwen3)
    k_norm: Floats | None = None  # [head_dim]


@dataclass(frozen=True)
class Decoder:
    """A causal language model: embedding, blocks, final norm, LM head."""

    layers: tuple[Layer, ...]
    embedding: Weight  # [vocab_size, hidden_size]
    lm_head: Weight  # [vocab_size, hidden_size]; `is embedding` when tied
    norm: Floats  # [hidden_size]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    norm_eps: float
    max_position_embeddings: int
    sliding_window: int | None  # every layer sees this many positions back, itself included; None: all
    inverse_frequencies: Floats  # [head_dim / 2]: what a position is multiplied with; holds theta and any scaling
    cache: CacheScales | None = None  # how keys and values are rounded; None: they are not

    @property
    def tied(self) -> bool:
        """Whether the LM head is the embedding."""
        return self.lm_head is self.embedding

    def quantized(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Every quantized weight, and what to call it in an error."""
        named = [("embedding", self.embedding), ("lm_head", self.lm_head)]
        for index, layer in enumerate(self.layers):
            linears = ("q", "k", "v", "o", "gate", "up", "down")
            named += [(f"layer {index}'s {name}", getattr(layer, name)) for name in linears]
        return ((name, weight) for name, weight in named if isinstance(weight, QuantizedWeight))

    def rotary_tables(self, length: int) -> tuple[Floats, Floats]:
        """Cosines and sines of every position's angles, in float32 as transformers computes them.

        The rotation is the half-split one: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), halves of head_dim.

        Returns:
            cos, sin: [length, head_dim / 2] float32.
        """
        angles = np.arange(length, dtype=np.float32)[:, None] * self.inverse_frequencies[None, :]
        return np.cos(angles), np.sin(angles)


def read_decoder(checkpoint: Path) -> Decoder:
    """The decoder in a Llama, Mistral, Qwen2 or Qwen3 checkpoint directory, float or quantized.

    Raises:
        ValueError: the family, an option of its configuration or a tensor is not one this reader knows.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    _refuse_unsupported(config)
    weights = read_weights(checkpoint)
    num_heads = int(config["num_attention_heads"])
    hidden_size = int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden_size // num_heads)

    layers = tuple(_take_layer(weights, f"model.layers.{index}.") for index in range(int(config["num_hidden_layers"])))
    embedding = _take(weights, "model.embed_tokens.weight")
    tied = bool(config.get("tie_word_embeddings", False))
    lm_head = embedding if tied else _take(weights, "lm_head.weight")
    norm = _take_floats(weights, "model.norm.weight")
    if weights:
        raise ValueError(
            f"{checkpoint} holds tensors that a {config['model_type']} decoder here has no place for: "
            f"{', '.join(sorted(weights)[:3])}{', …' if len(weights) > 3 else ''}. Use the engine 'pytorch' for it."
        )
    decoder = Decoder(
        layers=layers,
        embedding=embedding,
        lm_head=lm_head,
        norm=norm,
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        hidden_size=hidden_size,
        vocab_size=int(config["vocab_size"]),
        norm_eps=float(config["rms_norm_eps"]),
        max_position_embeddings=int(config["max_position_embeddings"]),
        sliding_window=_sliding_window(config),
        inverse_frequencies=_inverse_frequencies(config, head_dim),
        cache=read_cache_scales(checkpoint),
    )
    _check_shapes(decoder)
    return decoder


def shape(weight: Weight) -> tuple[int, int]:
    """(out, in) of a weight."""
    values = weight.integers if isinstance(weight, QuantizedWeight) else weight
    out_features, in_features = values.shape
    return int(out_features), int(in_features)


def floats(weight: Weight) -> Floats:
    """The weight's values, [out, in] float32: for an engine that cannot hold its integers."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def _refuse_unsupported(config: dict[str, Any]) -> None:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"An engine graph can be built for the families {', '.join(FAMILIES)}; got {family!r}. "
            "Use the engine 'pytorch' for it."
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"The feed-forward activation must be 'silu'; got {activation!r}. Use the engine 'pytorch'.")


def _take(weights: dict[str, Any], name: str) -> Weight:
    try:
        return weights.pop(name)  # type: ignore[no-any-return]
    except KeyError:
        raise ValueError(f"The checkpoint must hold the tensor {name}; it is missing. Save the model again.") from None


def _take_floats(weights: dict[str, Any], name: str) -> Floats:
    value = _take(weights, name)
    if isinstance(value, QuantizedWeight):
        raise ValueError(f"{name} must be float; it is quantized. Add it to the quantization method's `ignore`.")
    return np.asarray(value, dtype=np.float32)


def _take_layer(weights: dict[str, Any], prefix: str) -> Layer:
    def optional(name: str) -> Floats | None:
        return _take_floats(weights, prefix + name) if prefix + name in weights else None

    return Layer(
        q=_take(weights, prefix + "self_attn.q_proj.weight"),
        k=_take(weights, prefix + "self_attn.k_proj.weight"),
        v=_take(weights, prefix + "self_attn.v_proj.weight"),
        o=_take(weights, prefix + "self_attn.o_proj.weight"),
        gate=_take(weights, prefix + "mlp.gate_proj.weight"),
        up=_take(weights, prefix + "mlp.up_proj.weight"),
        down=_take(weights, prefix + "mlp.down_proj.weight"),
        input_norm=_take_floats(weights, prefix + "input_layernorm.weight"),
        post_attention_norm=_take_floats(weights, prefix + "post_attention_layernorm.weight"),
        q_bias=optional("self_attn.q_proj.bias"),
        k_bias=optional("self_attn.k_proj.bias"),
        v_bias=optional("self_attn.v_proj.bias"),
        o_bias=optional("self_attn.o_proj.bias"),
        q_norm=optional("self_attn.q_norm.weight"),
        k_norm=optional("self_attn.k_norm.weight"),
    )


def _sliding_window(config: dict[str, Any]) -> int | None:
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", config["model_type"] == "mistral"):
        return None
    if config["model_type"] == "mistral":
        return int(window)
    kinds = set(config.get("layer_types") or [])
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"}:
        return int(window)
    raise ValueError(
        f"Every layer must have the same attention window; got layer_types {sorted(kinds)}. Use the engine 'pytorch'."
    )


def _inverse_frequencies(config: dict[str, Any], head_dim: int) -> Floats:
    """theta^(-2i / head_dim) with the scaling the configuration asks for.

    transformers 5 writes `rope_parameters`; 4.x wrote `rope_theta` and `rope_scaling`.
    """
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse: Floats = np.float32(1) / np.power(np.float32(rope["rope_theta"]), exponents)
    if kind == "default":
        return inverse
    if kind == "linear":
        inverse /= np.float32(rope["factor"])
        return inverse
    if kind == "llama3":
        return _llama3_frequencies(inverse, rope)
    raise ValueError(
        f"Rotary scaling must be one of default, linear, llama3; got {kind!r}. Use the engine 'pytorch' for it."
    )


def _llama3_frequencies(inverse: Floats, rope: dict[str, Any]) -> Floats:
    """Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1; transformers' rope_type)."""
    trained, low, high = (
        float(rope[key]) for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    wavelength = 2 * math.pi / inverse
    ramp = np.clip((trained / wavelength - low) / (high - low), 0, 1)
    scaled: Floats = ((1 - ramp) * inverse / float(rope["factor"]) + ramp * inverse).astype(np.float32)
    return scaled


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
        intermediate = shape(layer.gate)[0]
        expected = {
            "q": (heads, decoder.hidden_size),
            "k": (kv_heads, decoder.hidden_size),
            "v": (kv_heads, decoder.hidden_size),
            "o": (decoder.hidden_size, heads),
            "gate": (intermediate, decoder.hidden_size),
            "up": (intermediate, decoder.hidden_size),
            "down": (decoder.hidden_size, intermediate),
        }
        for field in fields(layer):
            if field.name in expected and shape(getattr(layer, field.name)) != expected[field.name]:
                raise ValueError(
                    f"Layer {index}'s {field.name} must be {list(expected[field.name])} by its configuration; "
                    f"got {list(shape(getattr(layer, field.name)))}. Save the model with a matching config.json."
                )
