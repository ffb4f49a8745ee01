"""GPTQ: round one column after the other, and let the columns that are left make up for the error.

Frantar, Ashkboos, Hoefler and Alistarh, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers, ICLR 2023, arXiv:2210.17323, algorithm 1; with the activation order of its code. A group's grid is fitted
to the weights as they were, so that groups stay runs of neighbouring inputs whatever the order ("static groups");
with `range: mse`, errors are weighed by the inputs' squares.

The LM head is no layer of a block, but it is a product with known inputs, the outputs of the final norm, so it is
rounded in the same way once all blocks are. Where it is tied to the embedding, its rows are looked up too, and a
lookup counts every error of a row alike: that is a multiple of the identity in the Hessian, which is what damping adds,
hence TIED_DAMPING.

Deviations: weights that are zero stay zero where the grid has a zero, so a pruned layer stays pruned; where the damped
Hessian has no Cholesky factor, damping grows tenfold, at most to the mean of its diagonal, and the summary says so.
"""

from operator import itemgetter
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, model_validator

from tasks.quantization.mixed import Weights, possible_grids
from tasks.quantization.ranges import Grid, fit
from tasks.quantization.rtn import round_to_nearest, stored
from tasks.quantization.targets import Targets

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.calibration.statistics import InputGram
    from tasks.quantization.checkpoint_format import QuantizedWeight
    from tasks.quantization.grid import Affine

TIED_DAMPING = 0.1
"""At least, for an LM head that is the embedding too."""
ROWS_AT_ONCE = 8192
"""So that an LM head needs little more memory than itself."""


class Gptq(Targets, frozen=True, extra="forbid"):
    """Round weights so that a layer's outputs on the calibration tokens change least; block by block."""

    method: Literal["gptq"] = "gptq"
    weights: Weights = Field(
        Grid(bits=4, group_size=32),
        description="Grid of the linear layers of every block, or `choices` of grids and a budget.",
    )
    damping: float = Field(0.01, gt=0, le=1, description="Added to the Hessian's diagonal, in units of its mean.")
    act_order: bool = Field(True, description="Columns with the largest inputs first, while others can still give way.")
    block_size: int = Field(128, ge=1, description="Columns between two updates of all that follow; changes no result.")
    true_sequential: bool = Field(True, description="Within a block too, see the outputs of quantized layers.")
    awq: bool = Field(
        False, description="Before, scale the inputs of layers so that those that matter lose less (AWQ)."
    )

    @model_validator(mode="after")
    def _options_fit_together(self) -> "Gptq":
        if any(grid.format == "float8_e4m3" for grid in possible_grids(self.weights, None)):
            raise ValueError("GPTQ rounds to integers; use `method: rtn` for FP8 weights.")
        if self.awq and self.activations and self.activations.smooth:
            raise ValueError("`awq` and `activations.smooth` scale the same inputs; keep one of them.")
        return self

    def quantize(self, weight: "Tensor", grid: Grid, layer: str) -> "QuantizedWeight":
        """`weight` [out, in] float32 of a table that is only looked up on `grid`; `layer` names it in errors."""
        return round_to_nearest(weight, grid, layer)

    def quantize_for(
        self, weight: "Tensor", grid: Grid, layer: str, inputs: "InputGram", *, is_looked_up: bool = False
    ) -> "Found":
        """`weight` [out, in] float32 of a linear layer on `grid`, for the inputs it was seen to get.

        `is_looked_up`: it is an embedding too.
        """
        damping = max(self.damping, TIED_DAMPING) if is_looked_up else self.damping
        found = gptq(
            weight,
            inputs.value,
            grid,
            layer,
            damping=damping,
            act_order=self.act_order,
            block_size=self.block_size,
        )
        note = ""
        if found.damping > damping:
            note = f"damping raised from {damping:g} to {found.damping:g}; its inputs are nearly dependent"
        return found._replace(note=note)


class Found(NamedTuple):
    """What `gptq` found."""

    weight: "QuantizedWeight"
    damping: float  # as it had to be
    note: str = ""  # in words, where that is more than was asked for


def gptq(
    weight: "Tensor",
    hessian: "Tensor",
    options: Grid,
    layer: str,
    *,
    damping: float,
    act_order: bool,
    block_size: int,
) -> Found:
    """The weight on its grid with nearly the smallest ||(W - Q) X||.

    Args:
        weight: [out_features, in_features] float32, finite; not modified.
        hessian: [in_features, in_features] float32, X X^T of the inputs X [in_features, tokens]; its scale is free.
        options: which grid.
        layer: the layer's name, for errors.
        damping: lambda, in units of the mean of the Hessian's diagonal.
        act_order: columns in the order of descending diagonal.
        block_size: columns in one block of the lazy updates (section 3.3, step 2).

    Raises:
        ValueError: the weight or the Hessian is not finite, the group size does not divide the layer's width, or no
            damping makes the Hessian positive definite.
    """
    import torch

    in_features = weight.shape[1]
    if not torch.isfinite(hessian).all():
        raise ValueError(f"The inputs of {layer} must be finite on the calibration tokens; they overflow or are NaN.")
    affine = fit(weight, options, layer, importance=hessian.diagonal())
    dead = hessian.diagonal() == 0  # never seen: nothing says what their weights are for
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(in_features)
    upper, damping = _upper_factor_(hessian[order[:, None], order], dead[order], damping, layer)
    pieces = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(weight), ROWS_AT_ONCE)]
    integers = [
        _round_columns(weight[rows], affine.each(itemgetter(rows)), upper, order, dead, block_size) for rows in pieces
    ]
    return Found(stored(torch.cat(integers), affine, options.group_size), damping)


def _round_columns(
    weight: "Tensor",
    affine: "Affine",
    upper: "Tensor",
    order: "Tensor",
    dead: "Tensor",
    block_size: int,
) -> "Tensor":
    """Algorithm 1 for some rows of a weight [rows, in_features]; the integers, in the order of its columns."""
    import torch

    in_features = weight.shape[1]
    group_size = in_features // affine.scale.shape[1]
    left = weight.clone()
    left[:, dead] = 0
    left = left[:, order]
    zero = affine.zero
    integers = torch.empty(weight.shape, dtype=torch.int8 if affine.real_zero_point is None else torch.uint8)
    for start in range(0, in_features, block_size):
        end = min(start + block_size, in_features)
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            group = int(order[column]) // group_size
            grids = affine.group(group)
            values = left[:, column]
            chosen = grids.quantize(values)
            if zero is not None:
                pruned = weight[:, order[column]] == 0
                chosen = torch.where(pruned, zero[:, group].to(chosen.dtype), chosen)
            integers[:, order[column]] = chosen
            error = (values - grids.dequantize(chosen)) / upper[column, column]
            errors[:, column - start] = error
            left[:, column:end].addr_(error, upper[column, column:end], alpha=-1)
        left[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    return integers


def _upper_factor_(hessian: "Tensor", dead: "Tensor", damping: float, layer: str) -> "tuple[Tensor, float]":
    """U with U^T U = (H + lambda I)^-1, upper triangular, and lambda as it had to be; `hessian` is overwritten."""
    import torch

    mean = float(hessian.diagonal()[~dead].mean()) if not dead.all() else 1.0
    hessian /= mean  # small inputs would underflow
    hessian.diagonal()[dead] = 1
    diagonal = hessian.diagonal().clone()
    while damping <= 1:
        hessian.diagonal().copy_(diagonal + damping)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
        if not failed and factor.isfinite().all():
            return factor, damping
        damping *= 10
    raise ValueError(
        f"The Hessian of {layer} has no Cholesky factor, whatever the damping up to the mean of its diagonal. "
        "Calibrate on more sequences, or leave the layer out with `ignore`."
    )


def output_error(weight: "Tensor", quantized: "Tensor", hessian: "Tensor") -> float:
    """||(W - Q) X|| / ||W X||: the relative error of a layer's outputs on the tokens whose X X^T is `hessian`."""
    before = error = 0.0
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        difference = weight[rows] - quantized[rows]
        before += float(((weight[rows] @ hessian) * weight[rows]).sum())
        error += float(((difference @ hessian) * difference).sum())
    return (max(error, 0.0) / before) ** 0.5 if before > 0 else 0.0
