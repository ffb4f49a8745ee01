"""SmoothQuant: divide outliers out of a layer's inputs and into its weights, where rounding has room for them.

Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, ICML 2023,
arXiv:2211.10438, eq. 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), the maximum of W_j over all layers that read the
input. What it is folded into is in `folding.py`, the up projection among it (the paper stops at the norms).
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.calibration.architectures import Architecture
from tasks.calibration.progress import Report, silent
from tasks.quantization.folding import fold_

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@contextmanager
def smoothed(
    checkpoint: Path,
    batches: "Sequence[Tensor]",
    family: Architecture,
    layers: Collection[str],
    alpha: float,
    scratch: Path,
    report: Report = silent,
) -> Iterator[Path]:
    """A copy of `checkpoint`, in a directory inside `scratch` that is deleted at the end, with smooth inputs.

    Args:
        checkpoint: plain checkpoint directory.
        batches: token ids [batch, seq] int64, no padding.
        family: where it keeps its parts.
        layers: full names of the linear layers that will be quantized.
        alpha: in (0, 1).
        scratch: an existing directory.
        report: told after every batch.
    """
    import tempfile

    from tasks.calibration.checkpoints import load_model, save_model

    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        model = load_model(checkpoint)
        smooth_(model, family, batches, layers, alpha, report)
        save_model(model, checkpoint, Path(directory))
        del model
        yield Path(directory)


def smooth_(
    model: "PreTrainedModel",
    family: Architecture,
    batches: "Sequence[Tensor]",
    layers: Collection[str],
    alpha: float,
    report: Report = silent,
) -> None:
    """Smooth the inputs of `layers` in place; what the model computes does not change. Arguments as in `smoothed`."""
    import torch

    from tasks.calibration.layerwise import observe_inputs
    from tasks.calibration.statistics import InputPeak

    blocks = [family.block(index) for index in range(len(model.get_submodule(family.blocks)))]
    firsts = [f"{block}.{step[0]}" for block in blocks for step in family.steps]
    peaks = observe_inputs(model, batches, [name for name in firsts if name in layers], InputPeak, report)

    def choose(names: list[str], weights: "Sequence[Tensor]") -> "Tensor":
        return scales(peaks[names[0]].value, weights, alpha)

    with torch.no_grad():
        for block in blocks:
            fold_(model, family, block, layers, choose)


def scales(peak: "Tensor", weights: "Sequence[Tensor]", alpha: float) -> "Tensor":
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), [in_features] float32; 1 where an input or its weights are zero.

    Args:
        peak: [in_features] float32, max|X_j|.
        weights: [out, in_features] float32 each, of all layers that read X.
        alpha: in (0, 1).
    """
    import torch

    largest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    used = (peak > 0) & (largest > 0)
    return torch.where(used, peak**alpha / largest.clamp(min=torch.finfo().tiny) ** (1 - alpha), 1.0)
