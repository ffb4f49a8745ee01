"""Where each model family keeps its parts: one row per family, as attribute names, and nothing else.

Names are dotted paths for `torch.nn.Module.get_submodule`; those of a block's parts begin at the block. They are also
the names of tensors in a checkpoint: `<blocks>.<index>.<part>.weight`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Architecture:
    """Names of the parts of one family of decoders."""

    family: str  # `model_type` of config.json
    embedding: str
    blocks: str  # a ModuleList
    final_norm: str
    lm_head: str
    attention_norm: str
    mlp_norm: str
    attention: tuple[str, ...]  # linear layers that read the normed hidden state, then the output projection
    mlp: tuple[str, ...]  # linear layers that read the normed hidden state, then the one back to it
    gated: bool = True  # what the last of them reads is linear in its up projection: a product with the gate
    positions: str | None = None  # the table of learned positions, an embedding
    gain_offset: float = 0.0  # norms multiply with this plus their weight
    cache_scales: bool = True  # stock transformers with compressed-tensors rounds its KV cache by a checkpoint's scales
    # Keys of config.json that change with the structure; tuples name lists with one item per block.
    num_layers_option: str = "num_hidden_layers"
    intermediate_size_option: str = "intermediate_size"
    per_layer_options: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer of a block."""
        return self.attention + self.mlp

    @property
    def base(self) -> str:
        """The attribute that holds the bare model, without the LM head."""
        return self.blocks.partition(".")[0]

    @property
    def attention_module(self) -> str:
        """The module around the attention's linear layers."""
        return self.attention[0].rpartition(".")[0]

    @property
    def steps(self) -> tuple[tuple[str, ...], ...]:
        """The linear layers of a block in the order of computation; those of one step read the same input."""
        return (self.attention[:-1], self.attention[-1:], self.mlp[:-1], self.mlp[-1:])

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """The projections from the hidden state to the FFN's channels (gate and up, which may be one layer)."""
        return self.mlp[:-1]

    @property
    def mlp_output(self) -> str:
        """The projection from the FFN's channels back to the hidden state (down)."""
        return self.mlp[-1]

    def block(self, index: int) -> str:
        """The name of block `index`."""
        return f"{self.blocks}.{index}"

    def all_linears(self, num_layers: int) -> list[str]:
        """Full names of the linear layers of all blocks, in order."""
        return [f"{self.block(index)}.{linear}" for index in range(num_layers) for linear in self.linears]


_LLAMA = Architecture(
    family="llama",
    embedding="model.embed_tokens",
    blocks="model.layers",
    final_norm="model.norm",
    lm_head="lm_head",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_GEMMA = replace(_LLAMA, mlp_norm="pre_feedforward_layernorm", gain_offset=1.0, per_layer_options=("layer_types",))

ARCHITECTURES = {
    row.family: row
    for row in (
        _LLAMA,
        replace(_LLAMA, family="mistral"),
        replace(_LLAMA, family="qwen2", per_layer_options=("layer_types",)),
        replace(_LLAMA, family="qwen3", per_layer_options=("layer_types",)),
        replace(
            _LLAMA,
            family="phi3",
            attention=("self_attn.qkv_proj", "self_attn.o_proj"),
            mlp=("mlp.gate_up_proj", "mlp.down_proj"),
        ),
        replace(_GEMMA, family="gemma2"),
        replace(_GEMMA, family="gemma3_text"),
        Architecture(
            family="opt",
            embedding="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            blocks="model.decoder.layers",
            final_norm="model.decoder.final_layer_norm",
            lm_head="lm_head",
            attention_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
            attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
            mlp=("fc1", "fc2"),
            gated=False,
            cache_scales=False,
            intermediate_size_option="ffn_dim",
        ),
        Architecture(
            family="gpt_neox",
            embedding="gpt_neox.embed_in",
            blocks="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            lm_head="lm_head",
            attention_norm="input_layernorm",
            mlp_norm="post_attention_layernorm",
            attention=("attention.query_key_value", "attention.dense"),
            mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            gated=False,
            cache_scales=False,
        ),
    )
}
WITHOUT_ROW = {
    "gpt2": "its linear layers are transformers' Conv1D, with weights [in, out], which compressed-tensors cannot hold; "
    "compile it as it is",
}
"""Families that engines take and these stages do not, and why."""


def architecture(family: str) -> Architecture:
    """The row of a family.

    Args:
        family: `model_type` of config.json.

    Raises:
        ValueError: the family has no row.
    """
    if family in WITHOUT_ROW:
        raise ValueError(
            f"The model must be of a family that can be changed ({', '.join(ARCHITECTURES)}); got {family!r}: "
            f"{WITHOUT_ROW[family]}."
        )
    try:
        return ARCHITECTURES[family]
    except KeyError:
        raise ValueError(
            f"The model must be of a known family ({', '.join(ARCHITECTURES)}); got {family!r}. "
            "Use a model of one of these, or add a row for it to tasks/calibration/architectures.py."
        ) from None


def matching(layers: Sequence[str], patterns: Sequence[str], option: str = "ignore") -> list[str]:
    """The layers that some pattern matches, in order.

    Args:
        layers: full names, such as model.layers.0.mlp.down_proj.
        patterns: names with wildcards, such as model.layers.0.* or *.down_proj.
        option: where they were given, for errors.

    Raises:
        ValueError: a pattern matches no layer.
    """
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ValueError(
                f"Every pattern in `{option}` must match a layer; {pattern!r} matches none. "
                f"Layers are named like {layers[0]}; * stands for anything."
            )
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]
