"""An engine against PyTorch: the same checkpoint, the same inputs, how far apart are the answers, and may they be?"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, Field

from tasks.engines.generation import Ids, Logits, Session

if TYPE_CHECKING:
    from tasks.engines import Engine


Texts = Sequence[tuple[Ids, int]]
"""Token ids, [batch, length] each, and of how many of their last positions the logits are wanted."""


@runtime_checkable
class Reader(Protocol):
    """What only reads, several texts at once: a model that is never in memory as a whole."""

    @property
    def vocab_size(self) -> int:
        """Size of the last dimension of logits."""

    def read(self, texts: Texts) -> Iterator[Logits]:
        """Of each text [batch, positions, vocab_size] float32."""


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


@dataclass(frozen=True)
class Answers:
    """What a session says on some windows; kept, so that it can go before the one it is compared with comes."""

    vocab_size: int
    windows: Ids  # [num_windows, length]
    read: list[Logits]  # [length, vocab_size] of each window, read at once
    decoded: list[Logits]  # [num_decoded, vocab_size] of each window's last tokens, read one by one
    written: Ids  # [num_windows, num_new_tokens] greedy tokens after the first half of each window


def ask(session: Session, windows: Ids, *, num_decoded: int = 4, num_new_tokens: int = 16) -> Answers:
    """A session's answers on token ids [num_windows, length] int64.

    Every window is read at once, and its last `num_decoded` tokens once more one by one, through the KV cache; then it
    writes after the first half of each, `num_new_tokens` or as many as the window has left.

    Raises:
        ValueError: it answers with something that is not a finite number.
    """
    rows = [window[None].astype(np.int64) for window in windows]
    read = [session.prefill(row, row.shape[1])[0] for row in rows]
    if not all(np.isfinite(logits).all() for logits in read):
        raise ValueError("The engine's logits are not finite. Compile it with a higher precision.")
    half = windows.shape[1] // 2
    return Answers(
        vocab_size=session.vocab_size,
        windows=windows,
        read=read,
        decoded=[_decode(session, row, min(num_decoded, row.shape[1] - 1)) for row in rows],
        written=_write(session, windows[:, :half].astype(np.int64), min(num_new_tokens, windows.shape[1] - half)),
    )


def compare(candidate: Session | Answers, reference: Session | Reader, windows: Ids) -> Parity:
    """How far a candidate, or what it said on `windows`, is from `reference`, which only reads.

    Raises:
        ValueError: the vocabularies differ, or a session answers with something that is not a finite number.
    """
    if candidate.vocab_size != reference.vocab_size:
        raise ValueError(
            f"Both must have the same vocabulary; the candidate has {candidate.vocab_size} tokens, "
            f"the reference {reference.vocab_size}."
        )
    said = candidate if isinstance(candidate, Answers) else ask(candidate, windows)
    prompts = windows[:, : windows.shape[1] // 2].astype(np.int64)
    texts = [(window[None].astype(np.int64), len(window)) for window in windows]
    theirs_of = _read(reference, [*texts, _continued(prompts, said.written)])
    largest = total = kl = decoded = decoded_kl = 0.0
    agreed = num_positions = 0
    for ours, steps in zip(said.read, said.decoded, strict=True):
        theirs = next(theirs_of)[0]
        difference = np.abs(ours - theirs)
        largest = max(largest, float(difference.max()))
        total += float(difference.mean(dtype=np.float64)) * len(ours)
        kl += float(_kl_nats(theirs, ours).sum())
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        num_positions += len(ours)
        expected = theirs[-len(steps) :]
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
        greedy=_same_text(said.written, next(theirs_of)),
    )


def compare_greedy(prompts: Ids, written: Ids, reference: Session | Reader) -> Greedy:
    """Whether a reference would have written the same tokens, always the likeliest.

    It reads what the other has written: until the first token that it finds less likely than another, it would have
    written the same.

    Args:
        prompts: [num_sequences, length].
        written: [num_sequences, num_new_tokens] greedy tokens of another session.
    """
    return _same_text(written, next(_read(reference, [_continued(prompts, written)])))


def _read(reference: Session | Reader, texts: Texts) -> Iterator[Logits]:
    if isinstance(reference, Reader):
        return reference.read(texts)
    return (reference.prefill(input_ids, num_logits) for input_ids, num_logits in texts)


def _continued(prompts: Ids, written: Ids) -> tuple[Ids, int]:
    """The text that says which tokens a reference would have written."""
    return np.concatenate([prompts, written[:, :-1]], 1), written.shape[1]


def _same_text(written: Ids, logits: Logits) -> Greedy:
    """Whether the likeliest tokens are those `written`; both of [num_sequences, num_new_tokens]."""
    expected = logits.argmax(-1)  # until the first that differs, what the reference would have written itself
    parted = [
        (int((row != own).argmax()), index)
        for index, (row, own) in enumerate(zip(written, expected, strict=True))
        if (row != own).any()
    ]
    first = None
    if parted:
        position, index = min(parted)
        at = logits[index, position]
        gap = float(at[expected[index, position]] - at[written[index, position]])
        first = Divergence(sequence=index, position=position, logit_gap=gap)
    return Greedy(
        num_sequences=len(written),
        num_same=len(written) - len(parted),
        num_new_tokens=written.shape[1],
        first_divergence=first,
    )


def _write(session: Session, prompts: Ids, num_new_tokens: int) -> Ids:
    """[num_sequences, num_new_tokens] greedy tokens."""
    tokens = [session.prefill(prompts)[:, -1].argmax(-1)]
    while len(tokens) < num_new_tokens:
        tokens.append(session.decode(tokens[-1]).argmax(-1))
    return np.stack(tokens, 1)


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
