"""Quantized weights that can be trained: fake quantization, whose values are those of the stored integers and scales.

Forward is grid.py's rounding, with scales (and real offsets) as they are stored, in float16. Backward goes straight
through every rounding. In v = w / s + z, w' = s (round(v) - z) for integers in [Qn, Qp]:

    dw'/dw = 1 where v rounds into [Qn, Qp], else 0
    dw'/ds = round(v) - v where it does, else Qn - z or Qp - z
    dw'/do = 0 where it does, else 1, for grids with a real offset o, v = (w - o) / s

That is Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153, eq. 3 and 5, and for offsets Bhalgat
et al., LSQ+, CVPRW 2020, arXiv:2004.09576, section 3. Where integers stay as they are, dw'/ds = q - z, as in
EfficientQAT (Chen et al., ACL 2025, arXiv:2407.11062, section 3.3), which leaves zero points as they are too.

Deviations: "inside" is what rounds into the range, where LSQ takes Qn < v < Qp, because weights that begin exactly on
their grid would begin outside where they are the largest of their group. Scales are s = s_0 exp(SPEED t) with t
trained: they keep their sign, and a step of AdamW changes small and large ones by the same factor, about SPEED times
the learning rate. With one learning rate for all, weights would be moved too far or scales too little.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tasks.quantization.checkpoint_format import QuantizedWeight
from tasks.quantization.grid import Affine, integer_range
from tasks.quantization.rtn import stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HALF_MIN, HALF_MAX = 2.0**-24, 65504.0
SPEED = 10.0


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, to the last bit, with the gradient going to `x` of the same shape."""
    return _StraightThrough.apply(x, rounded)  # type: ignore[no-any-return, no-untyped-call]


def fake_quantize(weight: Tensor, affine: Affine) -> Tensor:
    """The values that the integers of `weight` stand for.

    Args:
        weight: [..., group_size] float32.
        affine: its grids, [..., 1]; scales and offsets may have gradients.

    Returns:
        float32, shaped like `weight`.
    """
    smallest, largest = integer_range(affine.bits, symmetric=affine.real_zero_point is None)
    with torch.no_grad():
        integers = affine.quantize(weight).float()
    if affine.offset is not None:
        position = (weight - affine.offset) / affine.scale
    else:
        position = weight / affine.scale if affine.zero_point is None else weight / affine.scale + affine.zero_point
    return affine.dequantize(straight_through(position.clamp(smallest - 0.5, largest + 0.5), integers))


def _stored_scale(scale: Tensor) -> Tensor:
    """The nearest float16 that is not zero, of the same sign; float32."""
    return torch.copysign(scale.abs().clamp(HALF_MIN, HALF_MAX), scale).half().float()


class TrainableWeight(nn.Module):
    """A quantized weight [out, in] whose scales are trained, and its weights too where it has latent ones.

    Parameters begin at zero, but for the latent weights, given de-quantized. Integers, zero points and first scales are
    no part of the state: they come from the quantized checkpoint.
    """

    log_scale: nn.Parameter  # [out, groups], t in s = s_0 exp(SPEED t)
    shift: nn.Parameter | None  # [out, groups], u in o = o_0 + s_0 SPEED u
    latent: nn.Parameter | None  # [out, in]
    first_scale: Tensor
    first_offset: Tensor
    zero_point: Tensor | None
    integers: Tensor | None

    def __init__(self, weight: QuantizedWeight, latent: nn.Parameter | None) -> None:
        super().__init__()
        self.bits, self.group_size = weight.bits, weight.group_size
        scale = torch.from_numpy(weight.scale)
        self.log_scale = nn.Parameter(torch.zeros_like(scale))
        self.shift = nn.Parameter(torch.zeros_like(scale)) if weight.has_real_zero_point else None
        self.latent = latent
        if latent is not None:
            num_together = weight.shape[1] // scale.shape[1]
            factor = (num_together * integer_range(self.bits, weight.zero_point is None)[1]) ** -0.5
            register_hook: Any = self.log_scale.register_hook  # it has no types
            register_hook(lambda grad: grad * factor)  # LSQ's g, section 2.2
        fixed = {"first_scale": scale, "zero_point": None, "integers": None}
        if weight.has_real_zero_point:
            fixed["first_offset"] = torch.from_numpy(weight.offset)
        elif weight.zero_point is not None:
            fixed["zero_point"] = torch.from_numpy(weight.zero_point).float()
        if latent is None:
            fixed["integers"] = torch.from_numpy(weight.integers)
        for name, values in fixed.items():
            self.register_buffer(name, values, persistent=False)

    def affine(self) -> Affine:
        """The grids as they are stored, [out, groups]."""
        scale = self.first_scale * (SPEED * self.log_scale).exp()
        scale = straight_through(scale, _stored_scale(scale.detach()))
        if self.shift is None:
            return Affine(self.bits, scale, self.zero_point)
        offset = self.first_offset + self.first_scale * (SPEED * self.shift)
        return Affine(
            self.bits, scale, offset=straight_through(offset, offset.detach().clamp(-HALF_MAX, HALF_MAX).half().float())
        )

    @torch.no_grad()
    def begin_at_(self, weight: Tensor) -> None:
        """Move the latent weights to those of `weight` [out, in] float32 that round to the same integers."""
        assert self.latent is not None
        affine = self.affine()
        ours, theirs = (affine.expanded().quantize(w.reshape(*affine.scale.shape, -1)) for w in (self.latent, weight))
        self.latent.copy_(torch.where((ours == theirs).flatten(-2), weight, self.latent))

    def rows(self, ids: Tensor | None = None) -> Tensor:
        """The de-quantized weight: rows `ids` [...] as [..., in], or all as [out, in]; float32."""

        def chosen(part: Tensor) -> Tensor:
            return part if ids is None else F.embedding(ids, part)

        affine = self.affine().each(chosen)
        shape = (*affine.scale.shape, -1)
        if self.latent is None:
            assert self.integers is not None
            return affine.expanded().dequantize(chosen(self.integers).reshape(shape)).flatten(-2)
        return fake_quantize(chosen(self.latent).reshape(shape), affine.expanded()).flatten(-2)

    @torch.no_grad()
    def stored(self) -> QuantizedWeight:
        """The weight as a checkpoint holds it."""
        affine = self.affine()
        integers = self.integers
        if self.latent is not None:
            integers = affine.expanded().quantize(self.latent.reshape(*affine.scale.shape, -1)).flatten(-2)
        assert integers is not None
        return stored(integers, affine, self.group_size)


def _recomputed(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What `compute` returns; backward de-quantizes again, so that no layer's float weight is kept for it."""
    return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class QuantizedLinear(nn.Module):
    """A linear layer, or an LM head, with a trainable quantized weight."""

    def __init__(self, quantized: TrainableWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.quantized, self.bias = quantized, bias

    @property
    def weight(self) -> Tensor:
        """[out, in] float32."""
        return _recomputed(self.quantized.rows)

    def forward(self, x: Tensor) -> Tensor:
        """x W'^T + b."""
        return _recomputed(self._product, x)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized.rows(), self.bias)


class QuantizedEmbedding(nn.Module):
    """An embedding with a trainable quantized weight; only the rows that are looked up are de-quantized."""

    def __init__(self, quantized: TrainableWeight, scale: float = 1.0) -> None:
        super().__init__()
        self.quantized = quantized
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """[vocab_size, hidden] float32, not scaled."""
        return _recomputed(self.quantized.rows)

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of `ids`, [..., hidden]."""
        rows = self.quantized.rows(ids)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale)


def make_trainable_(
    model: "PreTrainedModel", weights: dict[str, QuantizedWeight], *, latent: bool
) -> dict[str, TrainableWeight]:
    """Replace every quantized layer of a de-quantized model; tied layers share one weight.

    Args:
        model: float32, with the values of `weights`.
        weights: by the name of the module.
        latent: train the model's weights behind the integers, not only their scales.

    Returns:
        By the name of the module, an LM head that is tied to the embedding not among them.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    trained = {}
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        trained[name] = TrainableWeight(weight, layer.weight if latent else None)
        if isinstance(layer, nn.Embedding):
            head = model.get_output_embeddings()
            scale = getattr(layer, "scalar_embed_scale", 1.0)  # Gemma's rows are multiplied
            model.set_input_embeddings(QuantizedEmbedding(trained[name], scale))
            if tied:
                model.set_output_embeddings(QuantizedLinear(trained[name], head.bias))
        else:
            model.set_submodule(name, QuantizedLinear(trained[name], layer.bias))
    return trained
