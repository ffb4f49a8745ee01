"""Greedy text of an engine beside the original's: how many tokens are the same before the first that differs.

Agreement position by position is measured on given text; here each model reads what it wrote itself, so that one token
changes all that follow, as it does for who uses the model.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tasks.engines.generation import Session

Tokens = NDArray[np.int32]

BATCH_SIZE = 8


def continue_greedily(session: "Session", prompts: Tokens, num_tokens: int) -> Tokens:
    """[N, num_tokens] int32: the likeliest tokens after each prompt, one by one; none of them ends it.

    Args:
        session: of any engine.
        prompts: [N, length] int32.
        num_tokens: per prompt.

    Raises:
        ValueError: prompt and tokens are longer than the session's sequences, or a logit is not finite.
    """
    if not num_tokens or not len(prompts):
        return np.zeros((len(prompts), num_tokens), np.int32)
    length = prompts.shape[1]
    if length + num_tokens - 1 > session.max_length:  # the last token is not read
        raise ValueError(
            f"A sequence may have at most {session.max_length} tokens; prompts of {length} and {num_tokens} new ones "
            "do not fit. Lower quality.greedy_tokens, or compile the engine with a larger max_length."
        )
    written = []
    for start in range(0, len(prompts), BATCH_SIZE):
        logits = session.prefill(prompts[start : start + BATCH_SIZE].astype(np.int64))[:, -1]
        tokens = [_likeliest(logits)]
        while len(tokens) < num_tokens:
            tokens.append(_likeliest(session.decode(tokens[-1])))
        written.append(np.stack(tokens, axis=1))
    return np.concatenate(written).astype(np.int32)


def num_matching(candidate: Tokens, original: Tokens) -> NDArray[np.int64]:
    """[N]: tokens of each row [N, num_tokens] before the first that differs; all of them where none does."""
    same = np.cumprod(candidate == original, axis=1)
    return np.asarray(same.sum(axis=1), np.int64)


def _likeliest(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    if not np.isfinite(logits).all():
        raise ValueError("Logits must be finite; got NaN or infinity. Weights or precision are broken.")
    return np.asarray(logits.argmax(axis=-1), np.int64)
