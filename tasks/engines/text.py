"""Text from a bundle: prompts in, answers out, as a whole or as they come, whatever library generates the tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, Field, model_validator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""A turn of a chat: `role` ("system", "user", "assistant") and `content`."""

OnToken = Callable[[int, int], bool]
"""Told (index of the prompt, new token) in order; answers whether that sequence is to end here."""

OnText = Callable[[int, str], bool | None]
"""Told (index of the prompt, new text); True ends that sequence."""


class Sampling(BaseModel, frozen=True, extra="forbid"):
    """How tokens are chosen, and when a text ends."""

    max_new_tokens: int = Field(128, ge=1, description="Per prompt.")
    temperature: float = Field(0.0, ge=0, description="0: always the likeliest token.")
    top_k: int = Field(0, ge=0, description="Sample from so many of the likeliest tokens; 0: from all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the likeliest tokens that together have at least this probability."
    )
    seed: int = Field(0, ge=0, description="Of the sampling.")
    stop: tuple[str, ...] = Field((), description="Texts that end an answer; they are not part of it.")

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "Sampling":
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError(
                f"top_k and top_p choose what is sampled from; temperature 0 samples nothing. Got top_k {self.top_k} "
                f"and top_p {self.top_p:g}: give a temperature above 0, or leave them out"
            )
        if "" in self.stop:
            raise ValueError("a text in `stop` must have a character; got an empty one, which would end every answer")
        return self


class Work(BaseModel, frozen=True):
    """What generating took."""

    num_steps: int = Field(description="Passes of the model after the prompts', over all sequences together.")
    num_proposed: int | None = Field(None, description="Tokens that a draft or a lookup proposed; None: nobody did.")
    num_accepted: int | None = Field(None, description="Those of them that the model itself would have chosen.")


class Runtime(Protocol):
    """A library that generates tokens with a loaded bundle."""

    @property
    def max_length(self) -> int:
        """The longest sequence, prompt and new tokens together."""

    @property
    def facts(self) -> dict[str, str]:
        """What it says it computes in."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> Work:
        """Generates after every prompt until it holds one of `eos_ids`, `max_new_tokens`, or `on_token` ends it."""

    def close(self) -> None:
        """Frees the model."""


class Answer(BaseModel, frozen=True):
    """What the model wrote after one prompt."""

    text: str
    tokens: tuple[int, ...] = Field(description="Of the text, the token that ended it included.")
    num_prompt_tokens: int
    finish_reason: Literal["stop", "length"] = Field(
        description="stop: it ended by itself, or before a text of `stop`; length: at max_new_tokens."
    )


class TextGenerator:
    """Prompts in, answers out."""

    def __init__(self, runtime: Runtime, tokenizer: "PreTrainedTokenizerBase", eos_ids: Sequence[int]) -> None:
        self.runtime = runtime
        self.tokenizer: Any = tokenizer
        self._eos_ids = frozenset(eos_ids)

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt, with those that the tokenizer adds."""
        return list(self.tokenizer.encode(prompt))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a chat, up to where the assistant's answer begins.

        Raises:
            ValueError: the model has no chat template, or it refuses the messages.
        """
        return encode_chat(self.tokenizer, messages)

    def answer(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_text: OnText | None = None
    ) -> tuple[list[Answer], Work]:
        """What the model writes after each prompt.

        Args:
            prompts: token ids of each, as `encode` and `encode_chat` give them.
            on_text: told each answer's text as it comes; in the order of the answer, its last piece without what
                `stop` cuts off.

        Raises:
            ValueError: a prompt is empty, or too long with `max_new_tokens` for the model.
        """
        for index, prompt in enumerate(prompts):
            self.check(index, prompt, sampling.max_new_tokens)
        writers = [_Writer(self.tokenizer, sampling.stop) for _ in prompts]

        def on_token(index: int, token: int) -> bool:
            writer = writers[index]
            text = writer.add(token, is_end=token in self._eos_ids)
            ended = bool(on_text(index, text)) if on_text and text else False
            return writer.stopped or ended

        work = self.runtime.generate(prompts, sampling, self._eos_ids, on_token)
        answers = []
        for index, (prompt, writer) in enumerate(zip(prompts, writers, strict=True)):
            rest = writer.finish()
            if on_text and rest:
                on_text(index, rest)
            stopped = writer.stopped or bool(writer.tokens and writer.tokens[-1] in self._eos_ids)
            answers.append(
                Answer(
                    text=writer.text,
                    tokens=tuple(writer.tokens),
                    num_prompt_tokens=len(prompt),
                    finish_reason="stop" if stopped else "length",
                )
            )
        return answers, work

    def check(self, index: int, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Refuses a prompt, the `index`-th, that the model cannot take.

        Raises:
            ValueError: it is empty, too long with `max_new_tokens`, or holds what is no token.
        """
        if not prompt:
            raise ValueError(f"A prompt must have at least one token; prompt {index} has none.")
        longest = self.runtime.max_length
        if len(prompt) + max_new_tokens - 1 > longest:  # the last new token is not read back
            raise ValueError(
                f"A sequence may have at most {longest} tokens; prompt {index} has {len(prompt)} and {max_new_tokens} "
                "new ones do not fit. Ask for fewer, or compile the engine with a larger max_length."
            )
        vocab_size = len(self.tokenizer)
        if strange := [token for token in prompt if not 0 <= token < vocab_size]:
            raise ValueError(f"Tokens must be from 0 to {vocab_size - 1}; prompt {index} holds {strange[0]}.")

    def close(self) -> None:
        """Frees the model."""
        self.runtime.close()


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """See `TextGenerator.encode_chat`."""
    if not tokenizer.chat_template:
        raise ValueError("A chat needs a model with a chat template; this one has none. Give a plain prompt.")
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:
        raise ValueError(f"The model's chat template refuses the messages: {error}") from error
    return list(tokenizer.encode(text, add_special_tokens=False))


@dataclass
class _Writer:
    """Text from tokens as they come.

    A token may be part of a character, and a character's text may depend on the token before it; so a piece is decoded
    together with the piece before it, and held back while it ends inside a character. What may be the beginning of a
    text of `stop` is held back too.
    """

    tokenizer: Any
    stop: tuple[str, ...]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    stopped: bool = False
    _known: list[int] = field(default_factory=list)  # tokens of the last piece
    _new: list[int] = field(default_factory=list)  # tokens that have no text yet
    _held: str = ""

    def add(self, token: int, *, is_end: bool) -> str:
        """The text that is certain now; "" where none is."""
        self.tokens.append(token)
        if is_end:
            return ""
        self._new.append(token)
        text = self._text_of_new()
        if not text or text.endswith("\ufffd"):
            return ""
        self._known, self._new = self._new, []
        return self._release(self._held + text)

    def finish(self) -> str:
        """What was held back, at the end of the sequence."""
        if self.stopped:
            return ""
        piece = self._release(self._held + self._text_of_new())
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _text_of_new(self) -> str:
        return self._decode(self._known + self._new)[len(self._decode(self._known)) :]

    def _release(self, text: str) -> str:
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped = True
            piece, self._held = text[: min(found)], ""
        else:
            length = max((_overlap(text, stop) for stop in self.stop), default=0)
            piece, self._held = text[: len(text) - length], text[len(text) - length :]
        self.text += piece
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`, of which it holds not all."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
