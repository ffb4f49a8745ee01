"""What the compression algorithms need to know about a linear layer's inputs, gathered batch by batch."""

import math
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

BINS_PER_SIGN = 2048
SMALLEST_EXPONENT = -100  # of a histogram's range: what is smaller than 2^-111 is counted as zero


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


class InputPeak:
    """Running maximum of |x| of every input feature."""

    def __init__(self, in_features: int) -> None:
        import torch

        self.value = torch.zeros(in_features)

    def update(self, x: "Tensor") -> None:
        """Add a batch of inputs, [..., in_features] in any float dtype."""
        import torch

        self.value = torch.maximum(self.value, x.flatten(0, -2).float().abs().amax(dim=0).cpu())


class Histogram:
    """How often values occur, all features alike, without knowing their range beforehand.

    Bin i of [-2048, 2047] counts the values in [i w, (i + 1) w). The width w is a power of two, the smallest with which
    the bins hold all values, and doubles by merging pairs of bins: floor(floor(x / w) / 2) = floor(x / 2 w). So the
    order of the values does not matter, and histograms of parts of the data merge into exactly that of all of it.
    """

    def __init__(self) -> None:
        import torch

        self.counts = torch.zeros(2 * BINS_PER_SIGN, dtype=torch.int64)
        self.exponent = SMALLEST_EXPONENT  # the bins reach from -2^exponent to 2^exponent
        self.minimum, self.maximum = math.inf, -math.inf
        self.sum_of_minima = self.sum_of_maxima = 0.0  # of sequences
        self.num_sequences = 0

    def update(self, x: "Tensor") -> None:
        """Add a batch of inputs, [batch, seq, in_features] in any float dtype.

        Raises:
            ValueError: a value is not finite.
        """
        import torch

        x = x.detach().flatten(1).float()
        low, high = x.aminmax(dim=1)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError(
                f"Inputs of layers must be finite; {int((~x.isfinite()).sum())} of {x.numel()} are NaN or infinite. "
                "The checkpoint is damaged or its training diverged: use another."
            )
        self.minimum, self.maximum = min(self.minimum, float(low.min())), max(self.maximum, float(high.max()))
        self.sum_of_minima += float(low.double().sum())
        self.sum_of_maxima += float(high.double().sum())
        self.num_sequences += len(x)
        self._grow(math.frexp(max(abs(self.minimum), abs(self.maximum)))[1])
        bins = (x / self.width).floor_().int().add_(BINS_PER_SIGN)
        self.counts += torch.bincount(bins.flatten(), minlength=2 * BINS_PER_SIGN).cpu()

    def merge(self, other: "Histogram") -> "Histogram":
        """What one histogram that had seen the data of both would be."""
        merged, added = Histogram(), Histogram()
        for copy, source in ((merged, self), (added, other)):
            copy.__dict__.update(source.__dict__)
            copy._grow(max(self.exponent, other.exponent))
        merged.counts = merged.counts + added.counts
        merged.minimum, merged.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        merged.sum_of_minima += other.sum_of_minima
        merged.sum_of_maxima += other.sum_of_maxima
        merged.num_sequences += other.num_sequences
        return merged

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1 / BINS_PER_SIGN, self.exponent)

    @property
    def num_values(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def mean_range(self) -> tuple[float, float]:
        """The smallest and the largest value of a sequence, each averaged over sequences."""
        return self.sum_of_minima / self.num_sequences, self.sum_of_maxima / self.num_sequences

    def _grow(self, exponent: int) -> None:
        import torch

        while self.exponent < exponent:
            pairs = self.counts.reshape(-1, 2).sum(dim=1)
            quarter = torch.zeros(BINS_PER_SIGN // 2, dtype=torch.int64)
            self.counts = torch.cat((quarter, pairs, quarter))
            self.exponent += 1
