"""What an engine's `load` returns, what it refuses, and how the next token is chosen from its logits."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Writes(Protocol):
    """What writes token by token: a decoder, or an encoder-decoder after it has read its source."""

    def prefill(self, input_ids: Ids) -> Logits:
        """Logits [batch, 1, vocab_size] of the first new token of each of the sequences [batch, length]."""

    def decode(self, input_ids: Ids) -> Logits:
        """Logits [batch, vocab_size] of the token after each of [batch]."""


class Session(Protocol):
    """A loaded decoder with its KV cache: one batch of sequences of equal length at a time."""

    @property
    def vocab_size(self) -> int:
        """Size of the last dimension of logits."""

    @property
    def max_length(self) -> int:
        """The longest sequence, prompt and new tokens together."""

    @property
    def facts(self) -> dict[str, str]:
        """What the engine says it computes in: precisions, threads."""

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        """Starts new sequences and reads their prompts.

        Args:
            input_ids: [batch, length] int64.
            num_logits: how many of the last positions the LM head computes, 1..length.

        Returns:
            [batch, num_logits, vocab_size] float32; the caller's own, not overwritten by later calls.

        Raises:
            ValueError: the prompt is empty or longer than `max_length`, or `num_logits` is out of range.
        """

    def decode(self, input_ids: Ids) -> Logits:
        """Appends one token to each sequence.

        Args:
            input_ids: [batch] int64, the batch of the last `prefill`.

        Returns:
            [batch, vocab_size] float32.

        Raises:
            ValueError: there is no such batch, or the sequences are at `max_length`.
        """

    def close(self) -> None:
        """Frees the engine's memory; the session is not used again."""


def check_prompt(input_ids: Ids, num_logits: int, *, vocab_size: int, max_length: int) -> None:
    """Refuses what no engine can prefill; `Session.prefill` calls it first."""
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"A prompt must be [batch, length] with at least one token; got {list(input_ids.shape)}.")
    length = input_ids.shape[1]
    if length > max_length:
        raise ValueError(
            f"A prompt may have at most {max_length} tokens; got {length}. "
            "Shorten it, or compile the engine with a larger max_length."
        )
    if not 1 <= num_logits <= length:
        raise ValueError(f"num_logits must be between 1 and the prompt's {length} tokens; got {num_logits}.")
    if input_ids.min() < 0 or input_ids.max() >= vocab_size:
        raise ValueError(
            f"Token ids must be below the vocabulary's {vocab_size}; got {input_ids.min()} to {input_ids.max()}. "
            "Use the tokenizer of this model."
        )


def check_step(input_ids: Ids, *, batch_size: int, length: int, max_length: int) -> None:
    """Refuses a decoding step that does not continue the last prompt; `Session.decode` calls it first.

    Args:
        input_ids: [batch] int64.
        batch_size: sequences of the last prefill; 0 if there was none.
        length: tokens each sequence has so far.
        max_length: tokens each may have.
    """
    if input_ids.shape != (batch_size,):
        raise ValueError(
            f"A step must have one token for each of the {batch_size} sequences of the last prefill; "
            f"got {list(input_ids.shape)}."
        )
    if length >= max_length:
        raise ValueError(
            f"A sequence may have at most {max_length} tokens; it has {length} and got one more. "
            "Generate fewer tokens, or compile the engine with a larger max_length."
        )


def choose(
    logits: Logits, generators: Sequence[np.random.Generator], *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Ids:
    """The next token of each sequence: the likeliest, or above temperature 0 a sample.

    Sampling is by the Gumbel-max trick, exact for any temperature. `top_k` and then `top_p` (Holtzman et al., "The
    Curious Case of Neural Text Degeneration", ICLR 2020, arXiv:1904.09751, section 3) leave the likeliest tokens only;
    probabilities are those at `temperature`.

    Args:
        logits: [batch, vocab_size].
        generators: one per sequence, so that a sample does not depend on the batch.

    Returns:
        [batch] int64.
    """
    scores: Logits = logits
    if temperature > 0:
        scores = logits / np.float32(temperature)
        if top_k:
            smallest = np.partition(scores, -min(top_k, scores.shape[1]), axis=-1)[:, [-min(top_k, scores.shape[1])]]
            scores = np.where(scores < smallest, -np.inf, scores)
        if top_p < 1:
            scores = np.where(scores < _nucleus(scores, top_p), -np.inf, scores)
        scores = scores + np.stack([generator.gumbel(size=scores.shape[1]) for generator in generators])
    chosen: Ids = scores.argmax(-1).astype(np.int64)
    return chosen


def _nucleus(scores: Logits, top_p: float) -> Logits:
    """[batch, 1]: the score of the last token of the smallest set of likeliest ones with probability `top_p`."""
    ordered = -np.sort(-scores, axis=-1)
    probabilities = np.exp(ordered - ordered[:, :1], dtype=np.float64)
    probabilities /= probabilities.sum(-1, keepdims=True)
    before = probabilities.cumsum(-1) - probabilities
    last = (before < top_p).sum(-1, keepdims=True) - 1
    result: Logits = np.take_along_axis(ordered, last, axis=-1)
    return result


def generate_timed(session: Writes, input_ids: Ids, new_tokens: int) -> list[float]:
    """Seconds from the request until each of the `new_tokens` likeliest next tokens was chosen, for a whole batch.

    Args:
        session: any engine's.
        input_ids: [batch, prompt_tokens] int64.
        new_tokens: generated for each sequence; the end-of-text token does not stop it, so that all do equal work.

    Returns:
        [new_tokens], ascending; the first is the time to first token.
    """
    with without_garbage_collection():
        started_at = time.perf_counter()
        next_ids = session.prefill(input_ids)[:, -1].argmax(axis=-1)
        chosen_at = [time.perf_counter()]
        while len(chosen_at) < new_tokens:
            next_ids = session.decode(next_ids).argmax(axis=-1)
            chosen_at.append(time.perf_counter())
    return [at - started_at for at in chosen_at]


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Within, Python does not stop to look for garbage; it has just done so."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
