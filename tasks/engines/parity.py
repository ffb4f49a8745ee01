"""An engine against PyTorch: the same checkpoint, the same inputs, how far apart are the answers, and may they be?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, Field

from tasks.engines.generation import Ids, Logits, Session

if TYPE_CHECKING:
    from tasks.engines import Engine


class Divergence(BaseModel, frozen=True, extra="forbid"):
    """Where two greedy texts part."""

    sequence: int
    position: int = Field(description="Of the first token that differs, counted from the first new one.")
    logit_gap: float = Field(description="By how much the reference finds its own token likelier, in logits.")


class Greedy(BaseModel, frozen=True, extra="forbid"):
    """Whether both write the same tokens."""

    num_sequences: int
    num_same: int
    num_new_tokens: int
    first_divergence: Divergence | None = Field(description="The earliest of all sequences; None: there is none.")


class Parity(BaseModel, frozen=True, extra="forbid"):
    """Differences between two sessions, over `num_positions` next-token distributions."""

    max_abs_error: float = Field(description="Largest difference of a logit.")
    mean_abs_error: float
    top1_agreement: float = Field(description="Fraction of positions where both find the same token likeliest.")
    kl_nats: float = Field(description="Mean KL(reference ‖ candidate).")
    decode_max_abs_error: float = Field(description="Largest difference of a logit when decoding token by token.")
    decode_kl_nats: float = Field(description="Mean KL(reference ‖ candidate) when decoding token by token.")
    num_positions: int
    greedy: Greedy


class Tolerance(BaseModel, frozen=True, extra="forbid"):
    """How far an engine may be from PyTorch on the same checkpoint before it is taken to be wrong.

    It tells a wrong graph from rounding, and says nothing about whether rounding costs too much: the gate on the
    quality of the whole candidate does that.
    """

    max_abs_error: float = Field(description="Of a logit, read at once or token by token.")
    kl_nats: float = Field(description="Mean KL(PyTorch ‖ engine), read at once or token by token.")
    top1_agreement: float = Field(description="Least fraction of positions where both find the same token likeliest.")

    def broken_by(self, parity: Parity) -> str | None:
        """What is beyond it, in words; None if nothing is."""
        found = []
        for name in ("max_abs_error", "decode_max_abs_error", "kl_nats", "decode_kl_nats"):
            value, limit = getattr(parity, name), getattr(self, name.removeprefix("decode_"))
            if not value <= limit:
                found.append(f"{name} is {value:.3g}, allowed {limit:g}")
        if not parity.top1_agreement >= self.top1_agreement:
            found.append(f"top1_agreement is {parity.top1_agreement:.3f}, at least {self.top1_agreement:g} is required")
        return "; ".join(found) or None


EXACT = Tolerance(max_abs_error=0.05, kl_nats=1e-5, top1_agreement=0.99)
"""Float32 throughout: sums in another order. Measured on SmolLM2-135M: 0.0003, 2e-9 and 1."""

ROUNDED = Tolerance(max_abs_error=10.0, kl_nats=0.05, top1_agreement=0.9)
"""Inputs of products in 8 bits, or halves of floats. Measured on SmolLM2-135M: up to 2.5, 0.005 and 0.96."""


def tolerance(engine: "Engine", checkpoint: Path) -> Tolerance:
    """What an engine's options, and what the checkpoint says of inputs, allow.

    A checkpoint that rounds inputs or the KV cache makes a step of a grid of the last digit of a sum.
    """
    options: dict[str, Any] = engine.model_dump()
    exact = all(options.get(name, "float32") == "float32" for name in ("precision", "activations", "kv_cache"))
    quantization = json.loads((checkpoint / "config.json").read_text()).get("quantization_config") or {}
    rounds = any(group.get("input_activations") for group in quantization.get("config_groups", {}).values())
    return EXACT if exact and not rounds and not quantization.get("kv_cache_scheme") else ROUNDED


def compare(
    candidate: Session, reference: Session, windows: Ids, *, num_decoded: int = 4, num_new_tokens: int = 16
) -> Parity:
    """How far `candidate` is from `reference` on token ids [num_windows, length] int64.

    Every window is read at once, and its last `num_decoded` tokens once more one by one, through the KV cache; then
    both write after the first half of each, `num_new_tokens` or as many as the window has left.

    Raises:
        ValueError: the vocabularies differ, or a session answers with something that is not a finite number.
    """
    if candidate.vocab_size != reference.vocab_size:
        raise ValueError(
            f"Both must have the same vocabulary; the candidate has {candidate.vocab_size} tokens, "
            f"the reference {reference.vocab_size}."
        )
    largest = total = kl = decoded = decoded_kl = 0.0
    agreed = num_positions = 0
    half = windows.shape[1] // 2
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
        steps, expected = _decode(candidate, row, num_decoded), theirs[-num_decoded:]
        decoded = max(decoded, float(np.abs(steps - expected).max()))
        decoded_kl += float(_kl_nats(expected, steps).mean()) / len(windows)
    return Parity(
        max_abs_error=largest,
        mean_abs_error=total / num_positions,
        top1_agreement=agreed / num_positions,
        kl_nats=kl / num_positions,
        decode_max_abs_error=decoded,
        decode_kl_nats=decoded_kl,
        num_positions=num_positions,
        greedy=compare_greedy(
            candidate, reference, windows[:, :half].astype(np.int64), min(num_new_tokens, windows.shape[1] - half)
        ),
    )


def compare_greedy(candidate: Session, reference: Session, prompts: Ids, num_new_tokens: int) -> Greedy:
    """Whether both go on alike after prompts [num_sequences, length] int64, always with the likeliest token."""
    ours, _ = _write(candidate, prompts, num_new_tokens)
    theirs, logits = _write(reference, prompts, num_new_tokens)
    parted = [
        (int((row != expected).argmax()), index)
        for index, (row, expected) in enumerate(zip(ours, theirs, strict=True))
        if (row != expected).any()
    ]
    first = None
    if parted:
        position, index = min(parted)
        at = logits[position, index]
        gap = float(at[theirs[index, position]] - at[ours[index, position]])
        first = Divergence(sequence=index, position=position, logit_gap=gap)
    return Greedy(
        num_sequences=len(prompts),
        num_same=len(prompts) - len(parted),
        num_new_tokens=num_new_tokens,
        first_divergence=first,
    )


def _write(session: Session, prompts: Ids, num_new_tokens: int) -> tuple[Ids, Logits]:
    """[num_sequences, num_new_tokens] greedy tokens, and the logits they were the largest of, tokens first."""
    logits = [session.prefill(prompts)[:, -1]]
    while len(logits) < num_new_tokens:
        logits.append(session.decode(logits[-1].argmax(-1)))
    every = np.stack(logits)
    return every.argmax(-1).T, every


def _decode(candidate: Session, row: Ids, num_decoded: int) -> Logits:
    """[num_decoded, vocab_size]: logits of the last positions, read one by one through the KV cache."""
    end = row.shape[1]
    candidate.prefill(row[:, : end - num_decoded])
    return np.concatenate([candidate.decode(row[:, position]) for position in range(end - num_decoded, end)])


def _kl_nats(reference: Logits, candidate: Logits) -> Logits:
    """KL(reference ‖ candidate) per position, [length]; logits are [length, vocab_size]."""
    p, q = _log_softmax(reference), _log_softmax(candidate)
    result: Logits = (np.exp(p) * (p - q)).sum(-1)
    return result


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Logits = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
