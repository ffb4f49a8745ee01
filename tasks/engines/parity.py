"""An engine against PyTorch: the same checkpoint, the same inputs, how far apart are the answers?"""

import numpy as np
from pydantic import BaseModel, Field

from tasks.engines.generation import Ids, Logits, Session


class Parity(BaseModel, frozen=True, extra="forbid"):
    """Differences between two sessions, over `num_positions` next-token distributions."""

    max_abs_error: float = Field(description="Largest difference of a logit.")
    mean_abs_error: float
    top1_agreement: float = Field(description="Fraction of positions where both find the same token likeliest.")
    kl_nats: float = Field(description="Mean KL(reference ‖ candidate).")
    decode_max_abs_error: float = Field(description="Largest difference of a logit when decoding token by token.")
    num_positions: int


def compare(candidate: Session, reference: Session, windows: Ids, *, num_decoded: int = 4) -> Parity:
    """How far `candidate` is from `reference` on token ids [num_windows, length] int64.

    Every window is read at once, and its last `num_decoded` tokens once more one by one, through the KV cache.

    Raises:
        ValueError: the vocabularies differ, or a session answers with something that is not a finite number.
    """
    if candidate.vocab_size != reference.vocab_size:
        raise ValueError(
            f"Both must have the same vocabulary; the candidate has {candidate.vocab_size} tokens, "
            f"the reference {reference.vocab_size}."
        )
    largest = total = kl = decoded = 0.0
    agreed = num_positions = 0
    for window in windows:
        row = window[None].astype(np.int64)
        ours, theirs = candidate.prefill(row, row.shape[1])[0], reference.prefill(row, row.shape[1])[0]
        if not np.isfinite(ours).all():
            raise ValueError("The engine's logits are not finite. Compile it with a higher precision.")
        difference = np.abs(ours - theirs)
        largest = max(largest, float(difference.max()))
        total += float(difference.mean(dtype=np.float64)) * len(ours)
        kl += float(_kl_nats(theirs, ours).sum())
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        num_positions += len(ours)
        decoded = max(decoded, _decode_error(candidate, row, theirs, num_decoded))
    return Parity(
        max_abs_error=largest,
        mean_abs_error=total / num_positions,
        top1_agreement=agreed / num_positions,
        kl_nats=kl / num_positions,
        decode_max_abs_error=decoded,
        num_positions=num_positions,
    )


def _decode_error(candidate: Session, row: Ids, expected: Logits, num_decoded: int) -> float:
    start = row.shape[1] - num_decoded
    candidate.prefill(row[:, :start])
    return max(
        float(np.abs(candidate.decode(row[:, position])[0] - expected[position]).max())
        for position in range(start, row.shape[1])
    )


def _kl_nats(reference: Logits, candidate: Logits) -> Logits:
    """KL(reference ‖ candidate) per position, [length]; logits are [length, vocab_size]."""
    p, q = _log_softmax(reference), _log_softmax(candidate)
    result: Logits = (np.exp(p) * (p - q)).sum(-1)
    return result


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Logits = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
