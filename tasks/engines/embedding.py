"""Texts in, a vector of each out: what an encoder is asked for by search and clustering."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.engines.encoder import Encoder, Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 16


def embed(
    encoder: Encoder, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]
) -> Iterator[NDArray[np.float64]]:
    """The embedding [features] of each text: the model's own pooling where it has one, else the mean over its tokens.

    Texts longer than the model reads are cut.

    Raises:
        ValueError: the model gives tokens or classes only; a text has no token.
    """
    name = next((name for name in ("sentence_embedding", "last_hidden_state") if name in encoder.answers), None)
    if name is None:
        raise ValueError(
            f"Embeddings need an encoder that gives hidden states; this one gives {', '.join(encoder.answers)}"
            ". Compile the model without its head."
        )
    for start in range(0, len(texts), BATCH_SIZE):
        ids, mask = _padded(tokenizer, texts[start : start + BATCH_SIZE], encoder.max_length)
        answer = encoder.encode(ids, mask)[name]
        if answer.ndim == 3:
            answer = (answer * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        yield from answer.astype(np.float64)


def _padded(tokenizer: Any, texts: Sequence[str], longest: int | None) -> tuple[Ids, Ids]:
    """Ids and mask [batch, length] of texts, shorter ones padded behind, longer ones cut."""
    rows = tokenizer(list(texts), truncation=longest is not None, max_length=longest)["input_ids"]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise ValueError(f"A text must have at least one token; {text!r:.60} has none.")
    width = max(len(row) for row in rows)
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int64)
    ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int64)
    return ids, mask
