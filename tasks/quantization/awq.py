"""AWQ: scale a layer's inputs down and their weights up, where large inputs make rounding errors count most.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, MLSys 2024,
arXiv:2306.00978, section 3.2 (eq. 4 and 5): s = mean|x|^a, with a from a grid of 20 in [0, 1) that changes the outputs
least, normalized as its code does. The inverse is folded into what comes before (`folding.py`), so the model computes
the same until its weights are rounded.

Deviations: the error of the outputs comes from the inputs' Gram matrix instead of sampled tokens. Clipping is that of
`ranges.py`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tasks.calibration.architectures import Architecture
from tasks.quantization.folding import fold_
from tasks.quantization.ranges import Grid, fit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tasks.calibration.statistics import InputGram

NUM_EXPONENTS = 20


def scale_inputs_(
    model: "PreTrainedModel",
    family: Architecture,
    block: str,
    inputs: "Mapping[str, InputGram]",
    grids: Mapping[str, Grid],
) -> "dict[str, Tensor]":
    """Scale the inputs of the layers of a block that are to be quantized, in place.

    Args:
        model: its norms and linear layers change; what it computes does not.
        family: where it keeps them.
        block: the block's name.
        inputs: by name, statistics of the first layer of each of the family's steps.
        grids: of every layer that will be quantized; a step with others is left alone.

    Returns:
        The norms' new weights, by the names of their tensors.
    """

    def choose(names: list[str], weights: "Sequence[Tensor]") -> "Tensor":
        return search(weights, inputs[names[0]], [grids[name] for name in names], names)

    return fold_(model, family, block, grids, choose)


def search(weights: "Sequence[Tensor]", inputs: "InputGram", grids: Sequence[Grid], names: Sequence[str]) -> "Tensor":
    """The scale of each input with which rounding changes the outputs of all `weights` together least.

    Args:
        weights: [out_features, in_features] float32 each, of layers that read the same input; not modified.
        inputs: what they read.
        grids: of each.
        names: of each, for errors.

    Returns:
        [in_features] float32; ones where nothing is better than leaving the inputs as they are.
    """
    import torch

    best, least = torch.ones_like(inputs.magnitude), float("inf")
    for step in range(NUM_EXPONENTS):
        scale = inputs.magnitude.clamp(min=1e-4) ** (step / NUM_EXPONENTS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight, grid, name in zip(weights, grids, names, strict=True):
            difference = rounded(weight * scale, grid, name) / scale - weight
            error += float(((difference @ inputs.value) * difference).sum())
        if error < least:
            best, least = scale, error
    return best


def rounded(weight: "Tensor", options: Grid, layer: str) -> "Tensor":
    """`weight` [out, in] as rounding to nearest on a min-max grid gives it back."""
    from tasks.quantization.grid import in_groups

    affine = fit(weight, options.model_copy(update={"range": "min-max"}), layer).expanded()
    groups = in_groups(weight, options.group_size, layer)
    return affine.dequantize(affine.quantize(groups)).reshape(weight.shape)
