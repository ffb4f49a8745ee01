"""Stage: a checkpoint in, a pruned plain checkpoint out."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from tasks.calibration.architectures import architecture
from tasks.calibration.checkpoints import load_model, save_model
from tasks.calibration.progress import Report, silent
from tasks.calibration.tensor_files import refuse_not_finite
from tasks.calibration.tokens import calibration_batches
from tasks.pruning import PruningMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

BATCH_SIZE = 8  # sequences; more is no faster on CPUs and holds more activations


class PrunedLayer(BaseModel, frozen=True):
    """What pruning made of one layer."""

    name: str
    num_weights_before: int
    num_weights: int
    sparsity: float  # fraction of the weights that stayed in the checkpoint and are zero


class PruningSummary(BaseModel, frozen=True):
    """What pruning made of a checkpoint."""

    num_parameters_before: int  # tied ones once
    num_parameters: int
    num_nonzero: int
    size_bytes_before: int  # the safetensors files
    size_bytes: int
    intermediate_size_before: int
    intermediate_size: int
    sparsity: float  # fraction of zeros in the linear layers of all blocks
    layers: list[PrunedLayer]  # those that were to be pruned
    untouched: list[str]  # those of them that stayed as they were


def prune_checkpoint(
    *, checkpoint: Path, data: Path, method: PruningMethod, out: Path, report: Report = silent
) -> PruningSummary:
    """Prune a checkpoint with `method`, calibrated on the calibration tokens of `data`.

    Args:
        checkpoint: plain checkpoint directory, float, of a family in `architectures.py`.
        data: prepared data with calibration.npy [num_sequences, sequence_length] int32.
        method: how.
        out: empty directory; gets a plain checkpoint that stock transformers loads.
        report: told after every layer, block or batch.

    Raises:
        ValueError: the checkpoint is quantized, of an unknown family or not finite; the tokens are none of its
            vocabulary; the pattern does not fit a layer; nothing would be removed.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if config.get("quantization_config"):
        raise ValueError(f"Pruning needs a float checkpoint; {checkpoint} is quantized. Start from the float model.")
    family = architecture(config["model_type"])
    num_layers = int(config[family.num_layers_option])
    layers = method.layers(family, num_layers)
    if not layers:
        raise ValueError("At least one layer must be pruned; `ignore` leaves none.")
    batches = calibration_batches(data, int(config["vocab_size"]), BATCH_SIZE)
    model = load_model(checkpoint)
    for name, parameter in model.named_parameters():
        refuse_not_finite(parameter, name)
    all_linears = family.all_linears(num_layers)
    before = {name: _count(model.get_submodule(name)) for name in all_linears}
    num_parameters_before = sum(parameter.numel() for parameter in model.parameters())
    intermediate_size_before = int(getattr(model.config, family.intermediate_size_option))

    method.prune_(model, family, batches, layers, report)

    after = {name: _count(model.get_submodule(name)) for name in all_linears}
    untouched = [name for name in layers if after[name] == before[name]]
    if len(untouched) == len(layers):
        raise ValueError(
            f"Pruning must change the model; none of {len(layers)} layers lost a weight. "
            "Raise the sparsity or the threshold."
        )
    if untouched:
        logger.warning("%d of %d layers lost no weight: %s", len(untouched), len(layers), ", ".join(untouched))
    save_model(model, checkpoint, out)
    return PruningSummary(
        num_parameters_before=num_parameters_before,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_nonzero=sum(int(parameter.count_nonzero()) for parameter in model.parameters()),
        size_bytes_before=_size_bytes(checkpoint),
        size_bytes=_size_bytes(out),
        intermediate_size_before=intermediate_size_before,
        intermediate_size=int(getattr(model.config, family.intermediate_size_option)),
        sparsity=sum(zeros for _, zeros in after.values()) / sum(weights for weights, _ in after.values()),
        layers=[
            PrunedLayer(
                name=name,
                num_weights_before=before[name][0],
                num_weights=after[name][0],
                sparsity=after[name][1] / after[name][0],
            )
            for name in layers
        ],
        untouched=untouched,
    )


def _count(linear: "nn.Linear") -> tuple[int, int]:
    """How many weights, and how many of them are zero."""
    weight: Tensor = linear.weight
    return weight.numel(), weight.numel() - int(weight.count_nonzero())


def _size_bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
