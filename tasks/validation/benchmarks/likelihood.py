"""How likely an engine finds a given text after another."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.calibration.progress import Report, silent

if TYPE_CHECKING:
    from tasks.engines.generation import Session

BATCH_SIZE = 8


class Request(NamedTuple):
    """A text, and what may follow it."""

    context: tuple[int, ...]  # at least one token
    continuation: tuple[int, ...]  # at least one token


class Likelihood(NamedTuple):
    """What a model says of a continuation."""

    log_probability: float  # nats, of all its tokens together
    is_greedy: bool  # each of its tokens is the likeliest


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Request:
    """The tokens of two texts, divided where the first ends.

    Spaces at the end of the context go to the continuation, where tokenizers keep them (as lm-evaluation-harness does,
    `TemplateLM._encode_pair`).

    Raises:
        ValueError: either has no token.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole, first = tokenizer.encode(bare + continuation), tokenizer.encode(bare)
    request = Request(tuple(whole[: len(first)]), tuple(whole[len(first) :]))
    if not request.context or not request.continuation:
        raise ValueError(f"Both texts must have a token; got {bare!r:.60} and {continuation!r:.60}.")
    return request


def score(session: "Session", requests: Sequence[Request], report: Report = silent) -> list[Likelihood]:
    """The likelihood of every continuation, in order.

    Requests that read the same tokens, as of continuations of one token after the same context, are read once; those of
    equal length together.

    Raises:
        ValueError: one is longer than the model reads, or its logits are not finite.
    """
    found: list[Likelihood | None] = [None] * len(requests)
    reads: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(requests):
        reads.setdefault((*context, *continuation)[:-1], []).append(index)
    for tokens in reads:
        if len(tokens) > session.max_length:
            raise ValueError(
                f"The engine reads at most {session.max_length} tokens; a prompt with its answer has {len(tokens)}. "
                "Shorten the prompt, or compile the engine with a larger max_length."
            )
    order = sorted(reads, key=len)
    at = 0
    while at < len(order):
        batch = [tokens for tokens in order[at : at + BATCH_SIZE] if len(tokens) == len(order[at])]
        at += len(batch)
        num_logits = max(len(requests[index].continuation) for tokens in batch for index in reads[tokens])
        logits = session.prefill(np.array(batch, np.int64), num_logits=num_logits)
        for row, tokens in zip(logits, batch, strict=True):
            for index in reads[tokens]:
                wanted = np.array(requests[index].continuation)
                found[index] = _likelihood(row[-len(wanted) :].astype(np.float64), wanted)
        report(at, len(order), {})
    return [likelihood for likelihood in found if likelihood is not None]


def _likelihood(logits: NDArray[np.float64], continuation: NDArray[np.int64]) -> Likelihood:
    """Args: logits [tokens, vocab_size] float64, of the positions that predict `continuation`."""
    largest = logits.max(axis=-1)
    total = np.log(np.exp(logits - largest[:, None]).sum(axis=-1)) + largest
    if not np.isfinite(total).all():
        raise ValueError("The engine's logits must be finite; got NaN or infinity. Compile it with a higher precision.")
    chosen = logits[np.arange(len(continuation)), continuation]
    return Likelihood(float((chosen - total).sum()), bool((logits.argmax(axis=-1) == continuation).all()))
