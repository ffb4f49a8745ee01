"""Students made of some of the teacher's layers, which keep what the teacher knows better than fresh weights do."""

import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from tasks.calibration.architectures import architecture

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class KeepLayers(BaseModel, frozen=True, extra="forbid"):
    """A student with the teacher's width and some of its layers."""

    layers: int = Field(ge=1, description="How many of the teacher's layers the student keeps.")
    choice: Literal["evenly", "block_influence"] = Field(
        "block_influence",
        description="block_influence: those that change the hidden state most on calibration text (Men et al., "
        "ShortGPT, arXiv:2403.03853). evenly: equally spaced, first and last included.",
    )


def evenly_spaced(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Indices of `num_kept` of `num_layers` layers at equal distances, first and last included; ties to even."""
    _check_number(num_layers, num_kept)
    if num_kept == 1:
        return (0,)
    return tuple(round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept))


def most_influential(influence: Sequence[float], num_kept: int) -> tuple[int, ...]:
    """Indices of the `num_kept` layers with the largest block influence, in order; of equal ones the earlier."""
    _check_number(len(influence), num_kept)
    ranked = sorted(range(len(influence)), key=lambda i: (-influence[i], i))
    return tuple(sorted(ranked[:num_kept]))


def block_influence(model: "PreTrainedModel", tokens: "Tensor", batch_size: int = 4) -> list[float]:
    """How much each block turns the hidden state: `1 - E[cos(x_in, x_out)]` over all tokens (ShortGPT, eq. 1).

    Args:
        model: a decoder of a known family.
        tokens: [num_sequences, sequence_length] integer calibration tokens.
        batch_size: sequences in one forward pass.

    Returns:
        One value in [0, 2] per block.
    """
    import torch
    from torch.nn import functional as F

    final_norm = architecture(model.config.model_type).final_norm
    norm = model.get_submodule(final_norm)
    sums = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    model.set_submodule(final_norm, torch.nn.Identity())  # else the last hidden state is the normed one
    try:
        with torch.no_grad():
            for batch in torch.split(tokens.long(), batch_size):
                states = model.base_model(
                    input_ids=batch.to(model.device), use_cache=False, output_hidden_states=True
                ).hidden_states
                for i, (x_in, x_out) in enumerate(itertools.pairwise(states)):
                    sums[i] += F.cosine_similarity(x_in.float(), x_out.float(), dim=-1).double().sum().cpu()
    finally:
        model.set_submodule(final_norm, norm)
    return [float(1 - s / tokens.numel()) for s in sums]


def keep_layers(model: "PreTrainedModel", kept: Sequence[int]) -> "PreTrainedModel":
    """A copy of `model` with the blocks `kept` only, and a configuration that says so.

    Args:
        model: a decoder of a known family; not modified.
        kept: indices of its blocks, increasing.
    """
    from torch import nn

    row = architecture(model.config.model_type)
    student = copy.deepcopy(model)
    blocks = student.get_submodule(row.blocks)
    assert isinstance(blocks, nn.ModuleList)
    chosen = nn.ModuleList([blocks[i] for i in kept])
    for index, block in enumerate(chosen):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # the place in the KV cache
                setattr(module, "layer_idx", index)  # noqa: B010, a module's attributes have no such type
    student.set_submodule(row.blocks, chosen)
    config: Any = student.config
    for option in {"layer_types", *row.per_layer_options}:
        values = getattr(config, option, None)
        if values is not None:
            setattr(config, option, [values[i] for i in kept])
    setattr(config, row.num_layers_option, len(chosen))
    return student


def _check_number(num_layers: int, num_kept: int) -> None:
    if not 1 <= num_kept <= num_layers:
        raise ValueError(
            f"A student keeps 1 to {num_layers} of its teacher's {num_layers} layers; got {num_kept}. "
            f"Set student.layers accordingly."
        )
