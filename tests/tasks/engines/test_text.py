"""Answers: their text as it comes, where they end, and what is refused; on a runtime that can be checked by eye."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from tasks.engines.text import OnToken, Sampling, TextGenerator, Work


class Reciting:
    """Says the same tokens after every prompt."""

    max_length = 40
    facts: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> Work:
        for index in range(len(prompts)):
            for token in self._tokens[: sampling.max_new_tokens]:
                if on_token(index, token) or token in eos_ids:
                    break
        return Work(num_steps=0)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path):  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def answered(tokenizer, text: str, **options):  # type: ignore[no-untyped-def]
    """The answer that recites `text`, and the pieces in which it came."""
    pieces: list[str] = []
    generator = TextGenerator(Reciting(tokenizer.encode(text)), tokenizer, [0])
    (answer,), _ = generator.answer([[5]], Sampling(**options), lambda _, piece: pieces.append(piece))
    return answer, pieces


@pytest.mark.parametrize("text", ["def main():\n    pass", "na\u00efve \U0001f600\U0001f680 caf\u00e9", " a  b\t\n"])
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer, text: str):
    answer, pieces = answered(tokenizer, text, max_new_tokens=39)
    assert answer.text == "".join(pieces) == text
    assert len(pieces) > 1
    assert not any("\ufffd" in piece for piece in pieces)
    assert answer.finish_reason == "length"
    assert answer.num_prompt_tokens == 1


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer) -> None:
    whole = tokenizer.encode("a\U0001f600")
    answer, pieces = answered(tokenizer, "a\U0001f600", max_new_tokens=len(whole) - 1)
    assert answer.text == "".join(pieces) == tokenizer.decode(whole[:-1])
    assert "\ufffd" in answer.text


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("STOP",), "say "), (("P now",), "say STO"), (("never", "y S"), "sa"), (("nowhere",), "say STOP now")],
)
def test_a_stop_text_ends_the_answer_before_itself(tokenizer, stop, expected) -> None:
    answer, pieces = answered(tokenizer, "say STOP now", stop=stop, max_new_tokens=39)
    assert answer.text == "".join(pieces) == expected
    assert answer.finish_reason == ("length" if stop == ("nowhere",) else "stop")
    assert len(answer.tokens) <= len(tokenizer.encode("say STOP now"))


def test_what_may_begin_a_stop_text_is_held_back_and_not_lost(tokenizer) -> None:
    answer, pieces = answered(tokenizer, "ends with STO", stop=("STOP",), max_new_tokens=39)
    assert answer.text == "".join(pieces) == "ends with STO"


def test_the_end_token_ends_the_answer_and_is_no_text(tokenizer) -> None:
    generator = TextGenerator(Reciting([*tokenizer.encode("ab"), 0, 9, 9]), tokenizer, [0])
    (answer,), _ = generator.answer([[5]], Sampling(max_new_tokens=20))
    assert (answer.text, answer.finish_reason, answer.tokens[-1]) == ("ab", "stop", 0)


def test_a_listener_can_end_an_answer(tokenizer) -> None:
    generator = TextGenerator(Reciting(tokenizer.encode("one two three four")), tokenizer, [0])
    (answer,), _ = generator.answer([[5]], Sampling(max_new_tokens=20), lambda _, piece: True)
    assert 0 < len(answer.tokens) <= 2


def test_a_prompt_may_fill_the_model_exactly(tokenizer) -> None:
    generator = TextGenerator(Reciting([7] * 9), tokenizer, [0])
    generator.answer([[1] * 38], Sampling(max_new_tokens=3))  # the third is not read back
    with pytest.raises(ValueError, match="at most 40 tokens; prompt 1 has 38 and 4 new"):
        generator.answer([[1], [1] * 38], Sampling(max_new_tokens=4))
    with pytest.raises(ValueError, match="prompt 1 has none"):
        generator.answer([[1], []], Sampling(max_new_tokens=4))


def test_a_chat_follows_the_models_template(tokenizer) -> None:
    generator = TextGenerator(Reciting([7]), tokenizer, [0])
    with pytest.raises(ValueError, match="this one has none"):
        generator.encode_chat([{"role": "user", "content": "hi"}])
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    try:
        assert tokenizer.decode(generator.encode_chat([{"role": "user", "content": "hi"}])) == "[hi]>"
        with pytest.raises(ValueError, match="refuses the messages: no system"):
            generator.encode_chat([{"role": "system", "content": "hi"}])
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 5}, "temperature 0 samples nothing"),
        ({"top_p": 0.5}, "temperature 0 samples nothing"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"stop": ("",)}, "must have a character"),
        ({"max_tokens": 5}, "max_tokens"),
    ],
)
def test_nonsense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Sampling.model_validate(options)
