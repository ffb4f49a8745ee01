"""Scale what linear layers of a block read, and fold the inverse into what comes before: the block computes the same.

x / s reaches a layer with weights W diag(s) instead of x with W, where s is divided out of the norm before q, k and v
or before gate and up, or out of the up projection's rows before down. The output projection of attention is left alone,
since grouped values cannot be scaled per query head, and so is that of a feed-forward network without a gate, whose
inputs are no linear function of anything.
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
    places = [(family.attention_norm, family.steps[0]), (family.mlp_norm, family.steps[2])]
    if family.gated:
        places.append((up, family.steps[3]))
    for before, step in places:
        names = [f"{block}.{linear}" for linear in step]
        if any(name not in layers for name in names) or (before == up and f"{block}.{up}" not in layers):
            continue
        weights = [model.get_submodule(name).weight for name in names]
        scale = choose(names, weights)
        for weight in weights:
            weight.mul_(scale)
        source = model.get_submodule(f"{block}.{before}")
        biases = [] if getattr(source, "bias", None) is None else [source.bias]
        if before == up:  # gate and up may be one layer: the last rows are those of up
            source.weight[-len(scale) :].div_(scale[:, None])
            biases = [bias[-len(scale) :] for bias in biases]
        else:
            source.weight.copy_((source.weight + family.gain_offset) / scale - family.gain_offset)
            changed[f"{block}.{before}.weight"] = source.weight.detach().clone()
        for bias in biases:
            bias.div_(scale)
            changed[f"{block}.{before}.bias"] = source.bias.detach().clone()
    return changed
