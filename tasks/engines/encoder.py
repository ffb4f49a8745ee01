"""Encoders (BERT's family) on any engine: a batch of token ids in, hidden states, embeddings or logits out."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from tasks.engines.exported_graph import Pooling, encoder_answers, encoder_function, encoder_inputs, read_pooling
from tasks.engines.generation import without_garbage_collection
from tasks.engines.graph_runner import GraphRunner
from tasks.quantization.exported_checkpoint import ExportedCheckpoint, read_checkpoint

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

SPANS = ("start_logits", "end_logits")  # one number for each token


class Encoder(Protocol):
    """A loaded encoder."""

    answers: tuple[str, ...]  # what `encode` gives, by name
    max_length: int | None  # special tokens included; None: positions are relative

    def encode(
        self, input_ids: Ids, attention_mask: Ids | None = None, token_type_ids: Ids | None = None
    ) -> dict[str, Floats]:
        """What the model says of a batch of sequences.

        Args:
            input_ids: [batch, length] int64; shorter sequences are padded behind, with any id of the vocabulary.
            attention_mask: [batch, length] int64, 1 where there is a token; None: everywhere.
            token_type_ids: [batch, length] int64; None: 0 everywhere.

        Returns:
            float32 by name: last_hidden_state [batch, length, features], sentence_embedding [batch, features], logits …
            What is said of padding means nothing.

        Raises:
            ValueError: the batch or a sequence is empty, longer than the model's positions, or has ids beyond its
                vocabulary.
        """

    def close(self) -> None:
        """Frees the weights; the session is not used again."""


@dataclass
class EncoderSession:
    """An encoder's graph in one of the engines."""

    runner: GraphRunner
    answers: tuple[str, ...]
    vocab_size: int
    num_token_types: int  # 1 or fewer: the graph does not take them
    max_length: int | None

    @property
    def facts(self) -> dict[str, str]:
        """What the engine says it computes in."""
        return self.runner.facts

    def encode(
        self, input_ids: Ids, attention_mask: Ids | None = None, token_type_ids: Ids | None = None
    ) -> dict[str, Floats]:
        """What the model says of a batch of sequences; see `Encoder.encode`."""
        mask = checked_mask(input_ids, attention_mask, vocab_size=self.vocab_size, max_length=self.max_length)
        inputs = {"input_ids": np.asarray(input_ids, np.int64), "attention_mask": mask}
        types = _checked_types(token_type_ids, input_ids, self.num_token_types)
        if "token_type_ids" in self.runner.inputs:
            inputs["token_type_ids"] = types
        outputs = self.runner.run(inputs)
        return {name: self.runner.array(outputs[name]) for name in self.answers}

    def close(self) -> None:
        """Frees the weights."""
        self.runner.close()


class PyTorchEncoder:
    """The reference: transformers' own forward pass."""

    def __init__(self, checkpoint: ExportedCheckpoint, pooling: Pooling | None) -> None:
        self._model: Any = checkpoint.model
        self._pooling = pooling
        self.max_length = checkpoint.max_length
        self.answers = encoder_answers(self._model, pooling)

    def encode(
        self, input_ids: Ids, attention_mask: Ids | None = None, token_type_ids: Ids | None = None
    ) -> dict[str, Floats]:
        """What the model says of a batch of sequences; see `Encoder.encode`."""
        import torch

        config = self._model.config
        mask = checked_mask(input_ids, attention_mask, vocab_size=config.vocab_size, max_length=self.max_length)
        types = _checked_types(token_type_ids, input_ids, getattr(config, "type_vocab_size", 1))
        values = [torch.from_numpy(value) for value in (input_ids, mask, types)][: len(encoder_inputs(self._model))]
        with torch.inference_mode():
            found = encoder_function(self._model, self._pooling)(*values)
        return {name: value.numpy() for name, value in zip(self.answers, found, strict=True)}

    def close(self) -> None:
        """Frees the weights."""
        self._model = None


def checked_mask(input_ids: Ids, attention_mask: Ids | None, *, vocab_size: int, max_length: int | None) -> Ids:
    """The attention mask of a batch that a model can read: `attention_mask`, or ones.

    Raises:
        ValueError: it cannot.
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"A batch must be [batch, length] with at least one token; got {list(input_ids.shape)}.")
    mask = np.ones(input_ids.shape, np.int64) if attention_mask is None else np.asarray(attention_mask, np.int64)
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"The attention mask must have the shape of the ids, {list(input_ids.shape)}; got {list(mask.shape)}."
        )
    if not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
        raise ValueError(
            "The attention mask must be 1 where there is a token, else 0, with a token in every row; "
            f"row {_first_bad_row(mask)} is not. Leave empty sequences out."
        )
    if max_length is not None and input_ids.shape[1] > max_length:
        raise ValueError(
            f"A sequence may have at most {max_length} tokens, the model's positions; got {input_ids.shape[1]}. "
            "Truncate it."
        )
    if input_ids.min() < 0 or input_ids.max() >= vocab_size:
        raise ValueError(
            f"Token ids must be below the vocabulary's {vocab_size}; got {input_ids.min()} to {input_ids.max()}. "
            "Use the tokenizer of this model."
        )
    return mask


def _first_bad_row(mask: Ids) -> int:
    bad = ~np.isin(mask, (0, 1)).all(axis=1) | ~mask.any(axis=1)
    return int(bad.argmax())


def load_pytorch_encoder(checkpoint: Path, *, threads: int) -> PyTorchEncoder:
    """transformers' own model of a checkpoint, with the attention that transformers chooses."""
    import torch

    torch.set_num_threads(threads)
    return PyTorchEncoder(read_checkpoint(checkpoint, attention=None), read_pooling(checkpoint))


def _checked_types(token_type_ids: Ids | None, input_ids: Ids, num_token_types: int) -> Ids:
    if token_type_ids is None:
        return np.zeros(input_ids.shape, np.int64)
    types = np.asarray(token_type_ids, np.int64)
    if types.shape != input_ids.shape or types.min() < 0 or types.max() >= max(num_token_types, 1):
        raise ValueError(
            f"Token types must be {list(input_ids.shape)} and below {max(num_token_types, 1)}; got {list(types.shape)}"
            f", {types.min()} to {types.max()}. Leave them out, or use the tokenizer of this model."
        )
    return types


def encode_timed(encoder: Encoder, input_ids: Ids) -> float:
    """Seconds until everything is said of a batch of sequences [batch, length] without padding."""
    mask = np.ones(input_ids.shape, np.int64)
    with without_garbage_collection():
        started_at = time.perf_counter()
        encoder.encode(input_ids, mask)
        return time.perf_counter() - started_at


class EncoderParity(BaseModel, frozen=True, extra="forbid"):
    """Differences between two encoders, over everything they say of `num_sequences` sequences; padding left out."""

    max_abs_error: float
    mean_abs_error: float
    min_cosine: float = Field(
        description="Of the two vectors of a sequence, the least similar: its embedding, its logits, or the mean over "
        "its positions."
    )
    num_sequences: int


def compare_encoders(
    candidate: Encoder, reference: Encoder, input_ids: Ids, attention_mask: Ids | None = None
) -> EncoderParity:
    """How far `candidate` is from `reference` on a batch; see `Encoder.encode`.

    Raises:
        ValueError: their answers are of different kinds, or the candidate's are not finite.
    """
    if candidate.answers != reference.answers:
        raise ValueError(
            f"Both must give the same answers; the candidate gives {', '.join(candidate.answers)}, "
            f"the reference {', '.join(reference.answers)}."
        )
    ours, theirs = (encoder.encode(input_ids, attention_mask) for encoder in (candidate, reference))
    mask = np.ones(input_ids.shape, np.int64) if attention_mask is None else attention_mask
    largest, total, count, least = 0.0, 0.0, 0, 1.0
    for name in candidate.answers:
        first, second = ours[name], theirs[name]
        if not np.isfinite(_of_tokens(name, first, mask)).all():
            raise ValueError(f"The engine's {name} is not finite. Compile it with a higher precision.")
        difference = np.abs(_of_tokens(name, first, mask) - _of_tokens(name, second, mask))
        largest = max(largest, float(difference.max()))
        total += float(difference.sum(dtype=np.float64))
        count += difference.size
        if name == candidate.answers[-1]:
            least = float(_cosines(*(_per_sequence(name, answer, mask) for answer in (first, second))).min())
    return EncoderParity(
        max_abs_error=largest, mean_abs_error=total / count, min_cosine=least, num_sequences=len(input_ids)
    )


def _of_tokens(name: str, answer: Floats, mask: Ids) -> Floats:
    return answer[mask > 0] if answer.ndim == 3 or name in SPANS else answer


def _per_sequence(name: str, answer: Floats, mask: Ids) -> Floats:
    """[batch, features]: the mean over a sequence's tokens; of one number for each of them, the numbers."""
    if name in SPANS:
        return np.where(mask > 0, answer, 0)
    if answer.ndim == 3:
        weights = mask[:, :, None] / mask.sum(1)[:, None, None]
        mean: Floats = (answer * weights).sum(1)
        return mean
    return answer


def _cosines(first: Floats, second: Floats) -> Floats:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: Floats = (first * second).sum(1) / norms
    return cosines
