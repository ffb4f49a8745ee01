"""Distillation losses on next-token distributions, computed in chunks of tokens.

The logits of one micro-batch are by far its largest tensor (4 x 256 tokens times 49152 words in float32 are 192 MiB,
and a naive loss holds half a dozen of them). Everything the loss needs of them is a number per token and the gradient
with respect to the hidden states and the LM head. So the logits are made from the last hidden states a chunk at a
time, turned into loss and gradients in closed form, and forgotten; none is made twice.

Sources: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531, section 2 (temperature,
T^2); Hsu et al., Liger Kernel, 2024, arXiv:2410.10989, section 3.2 (gradients of a fused linear cross-entropy are
computed in its forward pass).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""The label of a token that is not predicted, as in torch and transformers."""


class Mixture(NamedTuple):
    """Sums over valid tokens, each a scalar in the dtype of the logits' arithmetic, in nats."""

    loss: Tensor
    cross_entropy: Tensor
    forward_kl: Tensor


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher/T) || softmax(student/T)) of every token, without the factor T^2.

    Args:
        teacher_logits: [..., vocab_size], any float dtype.
        student_logits: the same shape and dtype.
        temperature: T > 0.

    Returns:
        [...] in nats, 0 where the distributions are equal.
    """
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_student = F.log_softmax(student_logits / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)


def next_tokens(labels: Tensor) -> Tensor:
    """What each position predicts: `labels` moved one to the left, the last position predicting nothing.

    Args:
        labels: [batch, sequence] int64; -100 is not predicted.

    Returns:
        [batch, sequence] int64.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor,
    *,
    ce_weight: float,
    temperature: float,
    chunk_size: int = 256,
) -> Mixture:
    """Sum over valid tokens of `a * CE(target, student) + (1 - a) * T^2 * KL(teacher || student)`.

    Divide by the number of valid tokens for the mean; it is left to the caller because under gradient accumulation
    that number belongs to the whole batch. Under autocast the matrix products run in its dtype, as they would in the
    model; everything after them is float32 (float64 for float64 inputs).

    Args:
        student_hidden: [tokens, hidden] last hidden states, after the final norm.
        student_head: [vocab_size, hidden] LM head (the embedding where tied).
        teacher_hidden: [tokens, teacher_hidden], or None with `ce_weight` 1: the teacher is not needed.
        teacher_head: [vocab_size, teacher_hidden], or None likewise. No gradient reaches the teacher.
        targets: [tokens] int64, the word each token predicts; -100 is not valid.
        ce_weight: a, in [0, 1].
        temperature: T > 0.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        The sum, which carries the gradient, and its two parts, which do not.

    Raises:
        ValueError: the vocabularies differ, or the teacher is missing though `ce_weight` is below 1.
    """
    if ce_weight < 1:
        if teacher_hidden is None or teacher_head is None:
            raise ValueError(f"A ce_weight below 1 needs the teacher's hidden states; got ce_weight {ce_weight}.")
        if teacher_head.shape[0] != student_head.shape[0]:
            raise ValueError(
                f"Teacher and student need the same vocabulary; got {teacher_head.shape[0]} and "
                f"{student_head.shape[0]} words. Distil from a teacher with the student's tokenizer."
            )
    else:
        teacher_hidden = teacher_head = None
    valid = targets != IGNORE
    if not valid.all():
        student_hidden, targets = student_hidden[valid], targets[valid]
        teacher_hidden = None if teacher_hidden is None else teacher_hidden[valid]
    device = student_hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype
    with torch.autocast(device, enabled=False):
        tensors = student_hidden, student_head, teacher_hidden, teacher_head, targets
        sums = _ChunkedMixture.apply(*tensors, ce_weight, temperature, chunk_size, dtype)  # type: ignore[no-untyped-call]
    return Mixture(*sums)


class _ChunkedMixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        targets: Tensor,
        ce_weight: float,
        temperature: float,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, vocab_size = student_hidden.device, student_head.shape[0]
        precise = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(student_hidden) if wants_hidden else None
        head_grad = torch.zeros_like(student_head) if wants_head and len(targets) == 0 else None
        if wants_head and head_grad is None:  # every word of it is written below
            head_grad = torch.empty_like(student_head)
        head = student_head.to(dtype)
        teacher_head = None if teacher_head is None else teacher_head.to(dtype)
        cross_entropy, kl = torch.zeros(2, dtype=precise, device=device).unbind()

        # Buffers made once: memory fresh from the system costs more than the arithmetic done in it.
        rows = min(chunk_size, len(targets))
        buffers = [torch.empty(rows, vocab_size, dtype=precise, device=device) for _ in range(3)]
        rounded = None if dtype == precise else torch.empty(rows, vocab_size, dtype=dtype, device=device)
        head_part = torch.empty_like(head) if wants_head and dtype != precise else None

        for start in range(0, len(targets), chunk_size):
            part = slice(start, start + chunk_size)
            hidden = student_hidden[part].to(dtype)
            first, second, third = (buffer[: len(hidden)] for buffer in buffers)
            scratch = None if rounded is None else rounded[: len(hidden)]
            if teacher_hidden is not None and teacher_head is not None:
                _product(teacher_hidden[part].to(dtype), teacher_head.T, second, scratch)
            _product(hidden, head.T, first, scratch)
            one_ce, one_kl, logits_grad = _chunk_(
                first,
                second if teacher_hidden is not None else None,
                third,
                targets[part],
                ce_weight,
                temperature,
                wants_hidden or wants_head,
            )
            cross_entropy += one_ce
            kl += one_kl
            if logits_grad is None:
                continue
            logits_grad = logits_grad if scratch is None else scratch.copy_(logits_grad)
            if hidden_grad is not None:
                hidden_grad[part] = logits_grad @ head
            if head_part is not None and head_grad is not None:
                torch.mm(logits_grad.T, hidden, out=head_part)
                head_grad = head_grad.copy_(head_part) if start == 0 else head_grad.add_(head_part)
            elif head_grad is not None:
                head_grad.addmm_(logits_grad.T, hidden, beta=float(start > 0))
        ctx.grads = hidden_grad, head_grad
        ctx.mark_non_differentiable(cross_entropy, kl)
        loss = ce_weight * cross_entropy + (1 - ce_weight) * temperature**2 * kl
        return loss, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("The loss holds its gradients for one backward pass; compute it again for another.")
        hidden_grad, head_grad = (None if grad is None else grad.mul_(grads[0]) for grad in ctx.grads)
        ctx.grads = None
        return hidden_grad, head_grad, None, None, None, None, None, None, None


def _product(left: Tensor, right: Tensor, out: Tensor, rounded: Tensor | None) -> None:
    """Write `left @ right` to `out`, by way of `rounded` where the factors are of a lower precision."""
    if rounded is None:
        torch.mm(left, right, out=out)
    else:
        out.copy_(torch.mm(left, right, out=rounded))


def _chunk_(
    logits: Tensor,
    teacher_logits: Tensor | None,
    buffer: Tensor,
    targets: Tensor,
    ce_weight: float,
    temperature: float,
    wants_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed cross-entropy, summed forward KL, and the gradient of their mixture with respect to `logits`.

    With p = softmax(logits), and p_T and q_T the student's and the teacher's softmax at temperature T:
    d CE / d logits = p - onehot, and T^2 * d KL / d logits = T * (p_T - q_T).
    `logits`, `teacher_logits` and `buffer`, all [tokens, vocab_size], are overwritten; the gradient is one of them.
    """
    rows = torch.arange(len(targets), device=targets.device)
    log_student = torch.log_softmax(logits, dim=-1, out=buffer)
    cross_entropy = -log_student[rows, targets].sum()
    kl = torch.zeros_like(cross_entropy)
    if teacher_logits is None:
        if not wants_grad:
            return cross_entropy, kl, None
        grad = log_student.exp_()
        grad[rows, targets] -= 1
        return cross_entropy, kl, grad

    hard = None
    if temperature != 1:
        if wants_grad and ce_weight:
            hard = log_student.exp().mul_(ce_weight)
        log_student = torch.log_softmax(logits.div_(temperature), dim=-1, out=buffer)
        teacher_logits.div_(temperature)
    log_teacher = torch.log_softmax(teacher_logits, dim=-1, out=logits)
    teacher = torch.exp(log_teacher, out=teacher_logits)
    kl = log_teacher.sub_(log_student).mul_(teacher).sum(dim=-1).sum()
    if not wants_grad:
        return cross_entropy, kl, None
    if temperature == 1:  # a * (p - onehot) + (1 - a) * (p - q) = p - (1 - a) * q - a * onehot
        grad = log_student.exp_().sub_(teacher, alpha=1 - ce_weight)
    else:
        grad = log_student.exp_().sub_(teacher).mul_((1 - ce_weight) * temperature)
        if hard is not None:
            grad.add_(hard)
    if ce_weight:
        grad[rows, targets] -= ce_weight
    return cross_entropy, kl, grad
