"""Width pruning: remove the channels of every feed-forward network whose activations are smallest.

Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation (Minitron), NeurIPS 2024,
arXiv:2407.14679, section 2.2: the importance of a channel is its activation before the last projection, mean of its
size over a sequence, L2 norm over sequences; measured once in the unpruned model, without gradients. Every block keeps
the same number of channels, so a plain `intermediate_size` describes the result. For gated networks the activation is
the product of gate and up; the paper's squared-ReLU networks have no gate.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, model_validator

from tasks.calibration.architectures import Architecture
from tasks.calibration.progress import Report
from tasks.calibration.statistics import InputActivity

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Width(BaseModel, frozen=True, extra="forbid"):
    """Make every feed-forward network narrower; the checkpoint and its computation really shrink."""

    method: Literal["width"] = "width"
    keep: float | None = Field(None, gt=0, lt=1, description="Fraction of the channels that stay; 0.75 if not given.")
    intermediate_size: int | None = Field(None, ge=1, description="Instead of `keep`: how many channels stay.")
    round_to: int = Field(32, ge=1, description="`keep` is rounded to a multiple of this, which kernels like.")

    @model_validator(mode="after")
    def _one_size(self) -> "Width":
        if self.keep is not None and self.intermediate_size is not None:
            raise ValueError("width pruning takes either `keep` or `intermediate_size`; got both. Remove one.")
        if self.intermediate_size is not None and self.intermediate_size % self.round_to:
            raise ValueError(
                f"intermediate_size must be a multiple of round_to, {self.round_to}; got {self.intermediate_size}. "
                "Change either."
            )
        return self

    def size(self, intermediate_size: int) -> int:
        """How many of `intermediate_size` channels stay.

        Raises:
            ValueError: nothing would be removed.
        """
        if self.intermediate_size is not None:
            size = self.intermediate_size
        else:
            wanted = intermediate_size * (0.75 if self.keep is None else self.keep)
            size = max(1, round(wanted / self.round_to)) * self.round_to
        if size >= intermediate_size:
            raise ValueError(
                f"Width pruning must remove channels; the model has {intermediate_size} and {size} would stay "
                f"(multiples of {self.round_to}). Lower `keep`, `intermediate_size` or `round_to`."
            )
        return size

    def layers(self, family: Architecture, num_layers: int) -> list[str]:
        """Names of the layers that get smaller."""
        return [f"{family.block(index)}.{linear}" for index in range(num_layers) for linear in family.mlp]

    def prune_(
        self,
        model: "PreTrainedModel",
        family: Architecture,
        batches: Sequence["Tensor"],
        layers: Collection[str],
        report: Report,
    ) -> None:
        """Make the feed-forward networks of `model` narrower, in place, and its configuration with them."""
        import torch

        from tasks.calibration.layerwise import observe_inputs

        option = family.intermediate_size_option
        before = int(getattr(model.config, option))
        size = self.size(before)
        outputs = [layer for layer in layers if layer.endswith(f".{family.mlp_output}")]
        for output, activity in observe_inputs(model, batches, outputs, InputActivity, report).items():
            kept = most_important(activity.value, size)
            block = model.get_submodule(output.removesuffix(f".{family.mlp_output}"))
            for name in family.mlp_inputs:
                linear = block.get_submodule(name)
                num_parts = linear.out_features // before  # gate and up may be one layer
                keep_outputs_(linear, torch.cat([kept + part * before for part in range(num_parts)]))
            keep_inputs_(block.get_submodule(family.mlp_output), kept)
        setattr(model.config, option, size)


def most_important(importance: "Tensor", size: int) -> "Tensor":
    """Indices of the `size` largest values of `importance` [channels], ascending; [size] int64."""
    order = importance.argsort(descending=True, stable=True)
    return order[:size].sort().values


def keep_outputs_(linear: "nn.Linear", kept: "Tensor") -> None:
    """Leave only the outputs `kept` [n] int64 of a linear layer."""
    from torch import nn

    linear.weight = nn.Parameter(linear.weight.detach()[kept])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[kept])
    linear.out_features = len(kept)


def keep_inputs_(linear: "nn.Linear", kept: "Tensor") -> None:
    """Leave only the inputs `kept` [n] int64 of a linear layer."""
    from torch import nn

    linear.weight = nn.Parameter(linear.weight.detach()[:, kept].contiguous())
    linear.in_features = len(kept)
