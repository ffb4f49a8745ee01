"""Where each model family keeps its parts: one row per family, as attribute names, and nothing else.

Names are dotted paths for `torch.nn.Module.get_submodule`; those of a block's parts begin at the block. They are also
the names of tensors in a checkpoint: `<blocks>.<index>.<part>.weight`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    # Keys of config.json that change with the structure; tuples name lists with one item per block.
    num_layers_option: str = "num_hidden_layers"
    intermediate_size_option: str = "intermediate_size"
    per_layer_options: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer of a block."""
        return self.attention + self.mlp

    @property
    def steps(self) -> tuple[tuple[str, ...], ...]:
        """The linear layers of a block in the order of computation; those of one step read the same input."""
        return (self.attention[:-1], self.attention[-1:], self.mlp[:-1], self.mlp[-1:])

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """The projections from the hidden state to the FFN's channels (gate and up)."""
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


def _llama_like(family: str, *, per_layer_options: tuple[str, ...] = ()) -> Architecture:
    return Architecture(
        family=family,
        embedding="model.embed_tokens",
        blocks="model.layers",
        final_norm="model.norm",
        lm_head="lm_head",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        per_layer_options=per_layer_options,
    )


ARCHITECTURES = {
    row.family: row
    for row in (
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2", per_layer_options=("layer_types",)),
        _llama_like("qwen3", per_layer_options=("layer_types",)),
    )
}


def architecture(family: str) -> Architecture:
    """The row of a family.

    Args:
        family: `model_type` of config.json.

    Raises:
        ValueError: the family has no row.
    """
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
