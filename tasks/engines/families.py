"""What each family's checkpoints call the parts of a decoder, and what its configuration asks of them.

One row per family. Names are those of modules in transformers' classes, so of tensors in a checkpoint; the functions
read transformers' own configuration, which fills in what config.json leaves out. A configuration that asks for what the
graphs do not compute is refused here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tasks.engines.rotary import Rotary, read_rotary

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS: dict[str, Activation] = {  # by transformers' names
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Options:
    """What a configuration asks for, in one vocabulary for all families; tuples have one item per block."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    activation: Activation
    windows: tuple[int | None, ...]
    rotaries: tuple[Rotary | None, ...]
    attention_scales: tuple[float, ...]
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    parallel_residual: bool = False


@dataclass(frozen=True)
class Family:
    """One family of decoders. Names of a block's parts begin at the block; None where it has no such part."""

    read_options: Callable[[Any], Options]  # from a transformers configuration
    norm: Literal["rms", "layer"] = "rms"
    gain_offset: float = 0.0  # what is added to the stored gains of norms
    weights_are: Literal["out, in", "in, out"] = "out, in"  # of linear layers in blocks

    base: str = "model"  # the module around everything but the LM head
    embedding: str = "embed_tokens"
    positions: str | None = None  # the table of learned positions
    position_offset: int = 0  # rows of it before position 0's
    blocks: str = "layers"
    final_norm: str = "norm"

    attention_norm: str = "input_layernorm"
    attention_output_norm: str | None = None
    feed_forward_norm: str = "post_attention_layernorm"
    feed_forward_output_norm: str | None = None
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = None  # the three in one, instead of them
    qkv_rows: Literal["stacked", "by head"] = "stacked"  # all queries first, or each head's query, key and value
    o: str = "self_attn.o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str | None = None  # the two in one, instead of them
    down: str = "mlp.down_proj"
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)  # ends of names that hold no weights: buffers of old versions


def _llama(config: Any) -> Options:
    return _rotary_decoder(config)


def _mistral(config: Any) -> Options:
    return _rotary_decoder(config, windows=(config.sliding_window,) * config.num_hidden_layers)


def _qwen(config: Any) -> Options:
    return _rotary_decoder(config, windows=_windows(config))


def _phi3(config: Any) -> Options:
    windows = (config.sliding_window,) * config.num_hidden_layers
    return _rotary_decoder(config, windows=windows, partial_rotary=True)


def _rotary_decoder(
    config: Any, *, windows: tuple[int | None, ...] | None = None, partial_rotary: bool = False
) -> Options:
    rotary = _rotary(config, config.rope_parameters, partial=partial_rotary)
    return _options(
        config,
        num_kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        norm_eps=config.rms_norm_eps,
        activation=_activation("hidden_act", config.hidden_act),
        windows=windows,
        rotaries=(rotary,) * config.num_hidden_layers,
    )


def _gemma2(config: Any) -> Options:
    rotaries = (_rotary(config, config.rope_parameters),) * config.num_hidden_layers
    return _gemma(config, rotaries=rotaries, attention_softcap=config.attn_logit_softcapping)


def _gemma3(config: Any) -> Options:
    if config.attn_logit_softcapping is not None:
        raise ValueError(
            "attn_logit_softcapping must be null for Gemma 3, whose attention in transformers does without; got "
            f"{config.attn_logit_softcapping}. Remove it from config.json."
        )
    by_type = {kind: _rotary(config, config.rope_parameters[kind]) for kind in sorted(set(config.layer_types))}
    return _gemma(config, rotaries=tuple(by_type[kind] for kind in config.layer_types))


def _gemma(config: Any, *, rotaries: tuple[Rotary | None, ...], attention_softcap: float | None = None) -> Options:
    if config.use_bidirectional_attention:
        raise ValueError(
            "use_bidirectional_attention must be false, so that a token sees those before it only; got "
            f"{config.use_bidirectional_attention}. Such a model embeds texts and generates none."
        )
    return _options(
        config,
        num_kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        norm_eps=config.rms_norm_eps,
        activation=_activation("hidden_activation", config.hidden_activation),
        windows=_windows(config),
        rotaries=rotaries,
        attention_scales=(config.query_pre_attn_scalar**-0.5,) * config.num_hidden_layers,
        embedding_scale=config.hidden_size**0.5,
        attention_softcap=attention_softcap,
        logit_softcap=config.final_logit_softcapping,
    )


def _gpt_neox(config: Any) -> Options:
    return _options(
        config,
        norm_eps=config.layer_norm_eps,
        activation=_activation("hidden_act", config.hidden_act),
        rotaries=(_rotary(config, config.rope_parameters, partial=True),) * config.num_hidden_layers,
        parallel_residual=config.use_parallel_residual,
    )


def _gpt2(config: Any) -> Options:
    if config.add_cross_attention:
        raise ValueError(
            "add_cross_attention must be false: there is no encoder to attend to; got "
            f"{config.add_cross_attention}. Use a decoder on its own."
        )
    scale = (config.hidden_size // config.num_attention_heads) ** -0.5 if config.scale_attn_weights else 1.0
    by_index = config.scale_attn_by_inverse_layer_idx
    return _options(
        config,
        norm_eps=config.layer_norm_epsilon,
        activation=_activation("activation_function", config.activation_function),
        attention_scales=tuple(scale / (index + 1 if by_index else 1) for index in range(config.num_hidden_layers)),
    )


def _opt(config: Any) -> Options:
    required = {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": config.hidden_size,
    }
    for option, value in required.items():
        if getattr(config, option) != value:
            raise ValueError(
                f"{option} must be {value} for an OPT decoder's graph; got {getattr(config, option)}. "
                "Use the engine 'pytorch' for it."
            )
    return _options(
        config,
        norm_eps=1e-5,  # torch.nn.LayerNorm's own; the configuration has none
        activation=_activation("activation_function", config.activation_function),
    )


def _options(
    config: Any,
    *,
    norm_eps: float,
    activation: Activation,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    windows: tuple[int | None, ...] | None = None,
    rotaries: tuple[Rotary | None, ...] | None = None,
    attention_scales: tuple[float, ...] | None = None,
    **special: Any,
) -> Options:
    """What all families call by the same name, and what most leave out."""
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    nothing = (None,) * config.num_hidden_layers
    return Options(
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads or config.num_attention_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=norm_eps,
        activation=activation,
        windows=windows or nothing,
        rotaries=rotaries or nothing,
        attention_scales=attention_scales or (head_dim**-0.5,) * config.num_hidden_layers,
        **special,
    )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary(config: Any, rope: Any, *, partial: bool = False) -> Rotary:
    return read_rotary(
        rope, head_dim=_head_dim(config), max_position_embeddings=config.max_position_embeddings, partial=partial
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    """How far back each block sees, by its entry in `layer_types`; None: to the first token."""
    strange = set(config.layer_types) - {"full_attention", "sliding_attention"}
    if strange:
        raise ValueError(
            f"layer_types must be full_attention or sliding_attention; got {', '.join(sorted(strange))}. "
            "Use the engine 'pytorch'."
        )
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise ValueError(
            "sliding_window must be a number of tokens where layer_types has sliding_attention; got null. "
            "Set it, or use_sliding_window where that switches it off, in config.json."
        )
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


def _activation(option: str, name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{option} must be one of {', '.join(ACTIVATIONS)}; got {name!r}. Use the engine 'pytorch' for it."
        )
    return ACTIVATIONS[name]


FAMILIES = {
    "llama": Family(_llama),
    "mistral": Family(_mistral),
    "qwen2": Family(_qwen),
    "qwen3": Family(_qwen, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    "phi3": Family(_phi3, qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"),
    "gemma2": Family(
        _gemma2,
        gain_offset=1.0,
        attention_output_norm="post_attention_layernorm",
        feed_forward_norm="pre_feedforward_layernorm",
        feed_forward_output_norm="post_feedforward_layernorm",
    ),
    "gemma3_text": Family(
        _gemma3,
        gain_offset=1.0,
        attention_output_norm="post_attention_layernorm",
        feed_forward_norm="pre_feedforward_layernorm",
        feed_forward_output_norm="post_feedforward_layernorm",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    ),
    "gpt2": Family(
        _gpt2,
        norm="layer",
        weights_are="in, out",  # transformers' Conv1D
        base="transformer",
        embedding="wte",
        positions="wpe",
        blocks="h",
        final_norm="ln_f",
        attention_norm="ln_1",
        feed_forward_norm="ln_2",
        qkv="attn.c_attn",
        o="attn.c_proj",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    "opt": Family(
        _opt,
        norm="layer",
        base="model",
        embedding="decoder.embed_tokens",
        positions="decoder.embed_positions",
        position_offset=2,
        blocks="decoder.layers",
        final_norm="decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        feed_forward_norm="final_layer_norm",
        o="self_attn.out_proj",
        gate=None,
        up="fc1",
        down="fc2",
    ),
    "gpt_neox": Family(
        _gpt_neox,
        norm="layer",
        base="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        qkv="attention.query_key_value",
        qkv_rows="by head",
        o="attention.dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    ),
}
