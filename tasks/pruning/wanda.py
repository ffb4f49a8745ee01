"""Wanda: prune the weights with the smallest |weight| x input norm, row by row.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024,
arXiv:2306.11695, section 3 and algorithm 1.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from tasks.calibration.architectures import Architecture, matching
from tasks.calibration.progress import Report
from tasks.calibration.statistics import InputNorm
from tasks.pruning.sparsity import Sparsity, Unstructured

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def wanda_scores(weight: "Tensor", input_norm: "Tensor") -> "Tensor":
    """Importance of every weight of a linear layer (eq. 1).

    Args:
        weight: [out_features, in_features], any float dtype.
        input_norm: [in_features] float32, L2 norm of each input feature over the calibration tokens.

    Returns:
        [out_features, in_features] float32; comparable within a row, not across rows.
    """
    return weight.abs().float() * input_norm


class Wanda(BaseModel, frozen=True, extra="forbid"):
    """Remove the weights that matter least for the calibration tokens, block by block; updates no other weight."""

    method: Literal["wanda"] = "wanda"
    sparsity: Sparsity = Field(Unstructured(), description="Which weights to compare, and how many to remove.")
    ignore: tuple[str, ...] = Field(
        (), description="Layers to leave alone: names with wildcards, such as model.layers.0.* or *.down_proj."
    )

    def prune_weight_(self, layer: str, weight: "Tensor", inputs: InputNorm) -> None:
        """Zero the pruned entries of `weight`, in place; `layer` names it in errors."""
        keep = self.sparsity.keep(wanda_scores(weight, inputs.value), layer)
        weight.masked_fill_(~keep, 0)

    def layers(self, family: Architecture, num_layers: int) -> list[str]:
        """Names of the layers to prune."""
        layers = family.all_linears(num_layers)
        ignored = matching(layers, self.ignore)
        return [layer for layer in layers if layer not in ignored]

    def prune_(
        self,
        model: "PreTrainedModel",
        family: Architecture,
        batches: Sequence["Tensor"],
        layers: Collection[str],
        report: Report,
    ) -> None:
        """Zero the pruned weights of `layers`, in place."""
        from tasks.calibration.layerwise import compress_blocks

        compress_blocks(model, family, batches, layers, InputNorm, self.prune_weight_, report)
