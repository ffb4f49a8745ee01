"""Scale what linear layers of a block read, and fold the inverse into what comes before: the block computes the same.

x / s reaches a layer with weights W diag(s) instead of x with W, where s is divided out of the norm before q, k and v
or before gate and up, or out of the up projection's rows before down. The output projection of attention is left alone,
since grouped values cannot be scaled per query head.
"""

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

from tasks.calibration.architectures import Architecture

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def fold_(
    model: "PreTrainedModel",
    family: Architecture,
    block: str,
    layers: Container[str],
    choose: "Callable[[list[str], Sequence[Tensor]], Tensor]",
) -> "dict[str, Tensor]":
    """Scale the inputs of the layers of a block, in place.

    Args:
        model: its norms and linear layers change; what it computes does not.
        family: where it keeps them.
        block: the block's name.
        layers: full names of those that may change; a step with others is left alone.
        choose: the scales s [in_features] of layers that read one input, from their names and weights [out, in].

    Returns:
        The new weights of norms, and biases, by the names of their tensors.
    """
    changed = {}
    up = family.mlp_inputs[-1]
    for before, step in (
        (family.attention_norm, family.steps[0]),
        (family.mlp_norm, family.steps[2]),
        (up, family.steps[3]),
    ):
        names = [f"{block}.{linear}" for linear in step]
        if any(name not in layers for name in names) or (before == up and f"{block}.{up}" not in layers):
            continue
        weights = [model.get_submodule(name).weight for name in names]
        scale = choose(names, weights)
        for weight in weights:
            weight.mul_(scale)
        source = model.get_submodule(f"{block}.{before}")
        if before == up:
            source.weight.div_(scale[:, None])
            if source.bias is not None:
                source.bias.div_(scale)
                changed[f"{block}.{before}.bias"] = source.bias.detach().clone()
        else:
            source.weight.div_(scale)
            changed[f"{block}.{before}.weight"] = source.weight.detach().clone()
    return changed
