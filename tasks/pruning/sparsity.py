"""Sparsity patterns: which weights to keep, given a score for each."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field, model_validator

if TYPE_CHECKING:
    from torch import Tensor


class Unstructured(BaseModel, frozen=True, extra="forbid"):
    """Zero the lowest-scored fraction `sparsity` of every row of scores."""

    pattern: Literal["unstructured"] = "unstructured"
    sparsity: float = Field(0.5, gt=0, lt=1, description="Fraction of the weights that become zero.")

    def keep(self, scores: "Tensor", layer: str) -> "Tensor":
        """Bool mask shaped like `scores` [rows, columns]; True is kept. Of equal scores the first is pruned."""
        import torch

        num_pruned = round(scores.shape[1] * self.sparsity)
        pruned = scores.argsort(dim=1, stable=True)[:, :num_pruned]
        return torch.ones_like(scores, dtype=torch.bool).scatter_(1, pruned, False)


class SemiStructured(BaseModel, frozen=True, extra="forbid"):
    """N:M sparsity: at most `n` non-zeros in every `m` consecutive inputs (2:4 on NVIDIA Ampere and later)."""

    pattern: Literal["n:m"] = "n:m"
    n: int = Field(2, ge=1, description="Weights kept of every m.")
    m: int = Field(4, ge=2, description="Consecutive inputs.")

    @model_validator(mode="after")
    def _n_is_less_than_m(self) -> "SemiStructured":
        if self.n >= self.m:
            raise ValueError(
                f"n:m sparsity keeps n of every m weights, so n must be less than m; got {self.n}:{self.m}"
            )
        return self

    def keep(self, scores: "Tensor", layer: str) -> "Tensor":
        """Bool mask shaped like `scores` [out_features, in_features]; True is kept. `layer` names it in errors."""
        import torch

        out_features, in_features = scores.shape
        if in_features % self.m:
            raise ValueError(
                f"{self.n}:{self.m} sparsity needs in_features divisible by {self.m}; got {in_features} in {layer}. "
                "Exclude it with `ignore`, or use pattern 'unstructured'."
            )
        groups = scores.view(out_features, in_features // self.m, self.m)
        kept = groups.topk(self.n, dim=2).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, kept, True).view_as(scores)


Sparsity = Annotated[Unstructured | SemiStructured, Field(discriminator="pattern")]
