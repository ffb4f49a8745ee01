"""Magnitude pruning: the data-free baseline.

Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015, arXiv:1506.02626,
section 3. Weights are compared within a layer, as there, not within a row; no weight is retrained here.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, model_validator

from tasks.calibration.architectures import Architecture, matching
from tasks.calibration.progress import Report
from tasks.pruning.sparsity import Sparsity, Unstructured

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Magnitude(BaseModel, frozen=True, extra="forbid"):
    """Remove the smallest weights of every linear layer; needs no data."""

    method: Literal["magnitude"] = "magnitude"
    sparsity: Sparsity = Field(Unstructured(), description="Which weights to compare, and how many to remove.")
    threshold: float | None = Field(
        None, gt=0, description="Instead of `sparsity`: remove every weight smaller in size than this."
    )
    ignore: tuple[str, ...] = Field(
        (), description="Layers to leave alone: names with wildcards, such as model.layers.0.* or *.down_proj."
    )

    @model_validator(mode="after")
    def _one_rule(self) -> "Magnitude":
        if self.threshold is not None and "sparsity" in self.model_fields_set:
            raise ValueError("magnitude pruning takes either `sparsity` or `threshold`; got both. Remove one.")
        return self

    def keep(self, weight: "Tensor", layer: str) -> "Tensor":
        """Bool mask shaped like `weight` [out_features, in_features]; True is kept. `layer` names it in errors."""
        sizes = weight.abs()
        if self.threshold is not None:
            return sizes >= self.threshold
        if isinstance(self.sparsity, Unstructured):
            return self.sparsity.keep(sizes.reshape(1, -1), layer).view_as(weight)
        return self.sparsity.keep(sizes, layer)

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
        """Zero the pruned weights of `layers`, in place; `batches` are not read."""
        import torch

        for step, name in enumerate(layers, start=1):
            weight = model.get_submodule(name).weight
            with torch.no_grad():
                weight.masked_fill_(~self.keep(weight, name), 0)
            report(step, len(layers), {})
