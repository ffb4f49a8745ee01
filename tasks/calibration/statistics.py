"""What the compression algorithms need to know about a linear layer's inputs, gathered batch by batch."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class InputStatistic(Protocol):
    """A running statistic of a layer's inputs; made with the layer's `in_features`."""

    def update(self, x: "Tensor") -> None:
        """Add a batch of inputs, [batch, seq, in_features] in any float dtype."""


class InputNorm:
    """Running L2 norm of every input feature, over all calibration tokens."""

    def __init__(self, in_features: int) -> None:
        import torch

        self.sum_of_squares = torch.zeros(in_features, dtype=torch.float64)

    def update(self, x: "Tensor") -> None:
        """Add a batch of inputs, [..., in_features] in any float dtype."""
        self.sum_of_squares += x.flatten(0, -2).float().square().sum(dim=0).cpu()

    @property
    def value(self) -> "Tensor":
        """[in_features] float32."""
        return self.sum_of_squares.sqrt().float()


class InputActivity:
    """Mean of |x| over each sequence, then L2 norm over the sequences, of every input feature.

    Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, NeurIPS 2024,
    arXiv:2407.14679, section 2.2, with the aggregation (batch = L2, sequence = mean) that its table 12 finds best.
    """

    def __init__(self, in_features: int) -> None:
        import torch

        self.sum_of_squares = torch.zeros(in_features, dtype=torch.float64)

    def update(self, x: "Tensor") -> None:
        """Add a batch of inputs, [batch, seq, in_features] in any float dtype."""
        self.sum_of_squares += x.float().abs().mean(dim=1).square().sum(dim=0).cpu()

    @property
    def value(self) -> "Tensor":
        """[in_features] float32."""
        return self.sum_of_squares.sqrt().float()


class InputGram:
    """Running X X^T of a layer's inputs X [in_features, tokens]: the Hessian of its squared output error, up to 2."""

    def __init__(self, in_features: int) -> None:
        import torch

        self.value = torch.zeros(in_features, in_features)
        self.sum_of_magnitudes = torch.zeros(in_features)
        self.num_tokens = 0

    def update(self, x: "Tensor") -> None:
        """Add a batch of inputs, [..., in_features] in any float dtype."""
        rows = x.flatten(0, -2).float()
        self.value.addmm_(rows.T, rows)
        self.sum_of_magnitudes += rows.abs().sum(dim=0)
        self.num_tokens += len(rows)

    @property
    def magnitude(self) -> "Tensor":
        """[in_features] float32, the mean of |x|."""
        return self.sum_of_magnitudes / max(1, self.num_tokens)
