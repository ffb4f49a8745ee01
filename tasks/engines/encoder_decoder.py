"""Encoder-decoders (T5, BART, Marian) on any engine: a batch of texts in, the likeliest tokens out, one at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from tasks.engines.encoder import checked_mask
from tasks.engines.graph_runner import GraphRunner
from tasks.quantization.exported_checkpoint import ExportedCheckpoint

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

CHANGES_TOKENS = {
    "repetition_penalty": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "forced_decoder_ids": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
}
"""Settings of generation_config.json that would change greedy tokens and are not followed, and harmless values."""


class Greedy(BaseModel, frozen=True, extra="forbid"):
    """What a model's own generation_config.json says of taking the likeliest token; beams and sampling are not done."""

    decoder_start_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    forced_bos_token_id: int | None = Field(None, description="The first token.")
    forced_eos_token_id: int | None = Field(None, description="The last token where the length allows no more.")
    suppressed_token_ids: tuple[int, ...] = Field((), description="Tokens that are never taken.")
    no_repeat_ngram_size: int = Field(0, ge=0, description="No n tokens in a row come twice; 0: they may.")
    min_new_tokens: int = Field(0, ge=0, description="No sequence ends before.")


def read_greedy(checkpoint: Path, config: dict[str, Any]) -> Greedy:
    """How a checkpoint says that text is generated.

    Raises:
        ValueError: it does not say with which token it starts or ends, or asks for what is not done here.
    """
    file = checkpoint / "generation_config.json"
    settings = dict(config)
    if file.exists():  # then transformers reads nothing else
        tokens = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: config[name] for name in tokens if name in config}
        settings |= json.loads(file.read_text(encoding="utf-8"))
    for name, harmless in CHANGES_TOKENS.items():
        if settings.get(name) not in harmless:
            raise ValueError(
                f"Greedy generation here does not follow `{name}`; {checkpoint} sets it to {settings[name]}. "
                "Remove it from generation_config.json if the model does without."
            )
    start, eos = settings.get("decoder_start_token_id"), settings.get("eos_token_id")
    start = settings.get("bos_token_id") if start is None else start
    if start is None or eos is None:
        missing = "decoder_start_token_id" if start is None else "eos_token_id"
        raise ValueError(f"Generating needs `{missing}`; {checkpoint} has none. Set it in generation_config.json.")
    bad_words = settings.get("bad_words_ids") or []
    if longer := [words for words in bad_words if len(words) > 1]:
        raise ValueError(
            f"Only single tokens can be ruled out; `bad_words_ids` of {checkpoint} has {longer[0]}. "
            "Remove it from generation_config.json if the model does without."
        )
    eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)
    suppressed = {*(words[0] for words in bad_words), *(settings.get("suppress_tokens") or ())} - set(eos_ids)
    pad = settings.get("pad_token_id")
    return Greedy(
        decoder_start_token_id=start,
        eos_token_ids=eos_ids,
        pad_token_id=eos_ids[0] if pad is None else pad,
        forced_bos_token_id=settings.get("forced_bos_token_id"),
        forced_eos_token_id=settings.get("forced_eos_token_id"),
        suppressed_token_ids=tuple(sorted(suppressed)),
        no_repeat_ngram_size=settings.get("no_repeat_ngram_size") or 0,
        # min_length counts the token that the decoder starts with
        min_new_tokens=max(settings.get("min_new_tokens") or 0, (settings.get("min_length") or 0) - 1),
    )


@dataclass
class EncoderDecoderSession:
    """An encoder-decoder's two graphs in one of the engines."""

    encoder: GraphRunner
    decoder: GraphRunner
    greedy: Greedy
    vocab_size: int
    max_length: int | None  # of the source, and of what is generated with the token it starts with
    cache_shape: tuple[int, int]  # heads, features of each
    _steps: "_Steps | None" = field(default=None, init=False)  # of the batch that `prefill` read

    @property
    def facts(self) -> dict[str, str]:
        """What the engine says it computes in."""
        return self.decoder.facts

    def generate(self, input_ids: Ids, attention_mask: Ids | None = None, *, max_new_tokens: int) -> list[list[int]]:
        """The likeliest tokens, one by one, up to and including one that ends the sequence.

        Args:
            input_ids: [batch, length] int64; shorter texts are padded behind.
            attention_mask: [batch, length] int64, 1 where there is a token; None: everywhere.

        Raises:
            ValueError: the batch or a text is empty, longer than the model's positions, or has ids beyond its
                vocabulary; more tokens are asked for than it has positions.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
        if self.max_length is not None and max_new_tokens > self.max_length:
            raise ValueError(
                f"This model can write at most {self.max_length} tokens, its positions; got max_new_tokens "
                f"{max_new_tokens}. Ask for fewer."
            )
        steps = self._start(input_ids, attention_mask)
        tokens = np.full((len(input_ids), 1), self.greedy.decoder_start_token_id, dtype=np.int64)
        is_open = np.ones(len(input_ids), dtype=bool)
        while is_open.any() and tokens.shape[1] <= max_new_tokens:
            chosen = choose(steps.step(tokens[:, -1]), tokens, self.greedy, max_new_tokens)
            chosen = np.where(is_open, chosen, self.greedy.pad_token_id)
            tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
            is_open &= ~np.isin(chosen, self.greedy.eos_token_ids)
        return [_up_to_end(row[1:], self.greedy.eos_token_ids) for row in tokens]

    def score(self, input_ids: Ids, attention_mask: Ids | None, decoder_input_ids: Ids) -> Floats:
        """Logits [batch, length, vocab_size] after each of the tokens [batch, length], read one by one.

        Raises:
            ValueError: see `generate`.
        """
        checked_mask(decoder_input_ids, None, vocab_size=self.vocab_size, max_length=self.max_length)
        steps = self._start(input_ids, attention_mask)
        return np.stack([steps.step(column) for column in decoder_input_ids.T], axis=1)

    def prefill(self, input_ids: Ids) -> Floats:
        """Reads a batch of texts; see `generation.Writes`. `generate_timed` asks so."""
        self._steps = self._start(input_ids, None)
        return self._steps.step(np.full(len(input_ids), self.greedy.decoder_start_token_id))[:, None]

    def decode(self, input_ids: Ids) -> Floats:
        """One more token of the batch that `prefill` read; see `generation.Writes`."""
        assert self._steps is not None, "prefill comes first"
        return self._steps.step(input_ids)

    def close(self) -> None:
        """Frees the weights."""
        self._steps = None
        self.encoder.close()
        self.decoder.close()

    def _start(self, input_ids: Ids, attention_mask: Ids | None) -> "_Steps":
        mask = checked_mask(input_ids, attention_mask, vocab_size=self.vocab_size, max_length=self.max_length)
        source = self.encoder.run({"input_ids": np.asarray(input_ids, np.int64), "attention_mask": mask})
        empty = np.zeros((len(input_ids), self.cache_shape[0], 0, self.cache_shape[1]), dtype=np.float32)
        past = {name: empty for name in self.decoder.inputs if name.startswith("past_")}
        fixed = {name: value for name, value in source.items() if name in self.decoder.inputs}
        return _Steps(self.decoder, {"encoder_attention_mask": mask, **fixed}, past)


@dataclass
class _Steps:
    """A batch that is being written: what its decoder attends to, and its cache."""

    decoder: GraphRunner
    source: dict[str, Any]
    past: dict[str, Any]

    def step(self, input_ids: Ids) -> Floats:
        """Logits [batch, vocab_size] after one more token of each sequence, [batch] int64."""
        inputs = {"input_ids": np.ascontiguousarray(input_ids[:, None]), **self.source, **self.past}
        outputs = self.decoder.run(inputs)
        self.past = {name: outputs[name.replace("past_", "present_")] for name in self.past}
        logits: Floats = self.decoder.array(outputs["logits"])
        return logits


def choose(logits: Floats, tokens: Ids, greedy: Greedy, max_new_tokens: int) -> Ids:
    """The likeliest next token of each sequence that the settings allow, [batch] int64.

    Args:
        logits: [batch, vocab_size] float32; not modified.
        tokens: [batch, length] int64, so far, with the token the decoder starts with.
        max_new_tokens: how many there will be at most.
    """
    num_new = tokens.shape[1] - 1
    scores = logits.copy()
    if greedy.no_repeat_ngram_size:
        for row, sequence in zip(scores, tokens, strict=True):
            row[_repeating(sequence, greedy.no_repeat_ngram_size)] = -np.inf
    scores[:, list(greedy.suppressed_token_ids)] = -np.inf
    if num_new < greedy.min_new_tokens:
        scores[:, list(greedy.eos_token_ids)] = -np.inf
    forced = None
    if num_new == 0 and greedy.forced_bos_token_id is not None:
        forced = greedy.forced_bos_token_id
    if num_new + 1 == max_new_tokens and greedy.forced_eos_token_id is not None:
        forced = greedy.forced_eos_token_id
    chosen: Ids = scores.argmax(-1).astype(np.int64) if forced is None else np.full(len(scores), forced)
    return chosen


def _repeating(sequence: Ids, size: int) -> list[int]:
    """The tokens that would make the last `size` ones of a sequence come a second time."""
    if len(sequence) < size:
        return []
    last = sequence[len(sequence) - size + 1 :]
    starts = range(len(sequence) - size + 1)
    return [int(sequence[at + size - 1]) for at in starts if np.array_equal(sequence[at : at + size - 1], last)]


def _up_to_end(row: Ids, eos_ids: Sequence[int]) -> list[int]:
    ends = np.flatnonzero(np.isin(row, eos_ids))
    return [int(token) for token in (row[: ends[0] + 1] if len(ends) else row)]


class PyTorchEncoderDecoder:
    """transformers' own model, writing token by token with its caches; see `generation.Writes`."""

    def __init__(self, checkpoint: ExportedCheckpoint, greedy: Greedy) -> None:
        self._model: Any = checkpoint.model
        self._start = greedy.decoder_start_token_id
        self.max_length = checkpoint.max_length
        self._source: dict[str, Any] = {}

    def prefill(self, input_ids: Ids) -> Floats:
        """See `generation.Writes`."""
        import torch

        checked_mask(input_ids, None, vocab_size=self._model.config.vocab_size, max_length=self.max_length)
        source = torch.from_numpy(np.ascontiguousarray(input_ids))
        mask = torch.ones_like(source)
        with torch.inference_mode():
            states = self._model.get_encoder()(input_ids=source, attention_mask=mask)
        self._source = {"encoder_outputs": states, "attention_mask": mask, "past_key_values": None}
        return self.decode(np.full(len(input_ids), self._start))[:, None]

    def decode(self, input_ids: Ids) -> Floats:
        """See `generation.Writes`."""
        import torch

        with torch.inference_mode():
            out = self._model(**self._source, decoder_input_ids=torch.from_numpy(input_ids)[:, None], use_cache=True)
        self._source["past_key_values"] = out.past_key_values
        logits: Floats = out.logits[:, -1].numpy()
        return logits

    def close(self) -> None:
        """Frees the weights."""
        self._model = None
        self._source = {}


class EncoderDecoderParity(BaseModel, frozen=True, extra="forbid"):
    """Differences from PyTorch over the tokens that PyTorch's model writes itself, greedily."""

    max_abs_error: float = Field(description="Largest difference of a logit.")
    mean_abs_error: float
    top1_agreement: float = Field(description="Fraction of positions where both find the same token likeliest.")
    num_positions: int


def compare_with_pytorch(
    candidate: EncoderDecoderSession,
    checkpoint: ExportedCheckpoint,
    input_ids: Ids,
    attention_mask: Ids | None = None,
    *,
    num_tokens: int = 16,
) -> EncoderDecoderParity:
    """How far `candidate` is from transformers' model on a batch of texts; see `EncoderDecoderSession.generate`.

    Raises:
        ValueError: the candidate's answers are not finite.
    """
    import torch

    model: Any = checkpoint.model
    source = torch.from_numpy(input_ids)
    mask = torch.ones_like(source) if attention_mask is None else torch.from_numpy(attention_mask)
    with torch.inference_mode():
        written = torch.full((len(source), 1), candidate.greedy.decoder_start_token_id)
        for _ in range(num_tokens):  # all of it again for every token: no cache that could be wrong in the same way
            theirs = model(input_ids=source, attention_mask=mask, decoder_input_ids=written, use_cache=False).logits
            written = torch.cat([written, theirs[:, -1:].argmax(-1)], dim=1)
    ours = candidate.score(input_ids, attention_mask, written[:, :-1].numpy())
    if not np.isfinite(ours).all():
        raise ValueError("The engine's logits are not finite. Compile it with a higher precision.")
    difference = np.abs(ours - theirs.numpy())
    return EncoderDecoderParity(
        max_abs_error=float(difference.max()),
        mean_abs_error=float(difference.mean(dtype=np.float64)),
        top1_agreement=float((ours.argmax(-1) == theirs.numpy().argmax(-1)).mean()),
        num_positions=ours.shape[0] * ours.shape[1],
    )
