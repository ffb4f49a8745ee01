"""Text from any engine: what an engine's `load` returns, and the loop that turns it into words."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


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


def generate(
    session: Session,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
) -> list[str]:
    """What the model writes after each prompt, without the prompt and without special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        max_new_tokens: per prompt.
        temperature: 0 takes the likeliest token; above it samples.
        seed: of the sampling; prompt i's text depends on (seed, i) only, not on its batch.
        eos_ids: tokens that end a sequence; the tokenizer's own by default.
    """
    if eos_ids is None:
        eos_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = generate_tokens(
        session,
        [tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        eos_ids=eos_ids,
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]


def generate_tokens(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    batch_size: int = 8,
) -> list[list[int]]:
    """New token ids after each prompt, up to and including the first of `eos_ids`.

    Prompts of equal length share a batch of at most `batch_size`, so no prompt is padded.

    Raises:
        ValueError: a prompt is empty or does not fit the session with `max_new_tokens`, or `temperature` is negative.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (the likeliest token) or above; got {temperature}.")
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    if 0 in by_length:
        raise ValueError(f"A prompt must have at least one token; prompt {by_length[0][0]} has none.")
    longest = max(by_length, default=0)
    if longest + max_new_tokens - 1 > session.max_length:  # the last new token is not read back
        raise ValueError(
            f"A sequence may have at most {session.max_length} tokens; a prompt of {longest} and {max_new_tokens} new "
            "ones do not fit. Ask for fewer, or compile the engine with a larger max_length."
        )
    results: list[list[int]] = [[] for _ in prompts]
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            generators = [np.random.default_rng([seed, index]) for index in batch]
            texts = _generate_batch(
                session,
                np.array([prompts[index] for index in batch], dtype=np.int64),
                max_new_tokens,
                temperature,
                generators,
                frozenset(eos_ids),
            )
            for index, text in zip(batch, texts, strict=True):
                results[index] = text
    return results


def _generate_batch(
    session: Session,
    input_ids: Ids,
    max_new_tokens: int,
    temperature: float,
    generators: list[np.random.Generator],
    eos_ids: frozenset[int],
) -> list[list[int]]:
    logits = session.prefill(input_ids)[:, -1]
    texts: list[list[int]] = [[] for _ in range(len(input_ids))]
    open_rows = set(range(len(input_ids)))
    for step in range(max_new_tokens):
        chosen = _choose(logits, temperature, generators)
        for row in tuple(open_rows):
            texts[row].append(int(chosen[row]))
            if texts[row][-1] in eos_ids:
                open_rows.remove(row)
        if not open_rows or step + 1 == max_new_tokens:
            break
        logits = session.decode(chosen)
    return texts


def _choose(logits: Logits, temperature: float, generators: list[np.random.Generator]) -> Ids:
    """[batch] int64 from [batch, vocab_size] logits; sampling by the Gumbel-max trick, exact for any temperature."""
    scores: Logits = logits
    if temperature > 0:
        noise = np.stack([generator.gumbel(size=logits.shape[1]) for generator in generators])
        scores = logits / temperature + noise
    chosen: Ids = scores.argmax(-1).astype(np.int64)
    return chosen
