"""The generation loop: against transformers on a real model, and case by case on one that can be checked by eye."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.engines.generation import Ids, Logits, check_prompt, check_step, generate, generate_tokens
from tasks.engines.pytorch import PyTorch


class Counting:
    """After token t, t + 1 is likeliest and t + 2 second; records the batches it was given."""

    vocab_size = 20
    max_length = 12
    facts: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        self.batches.append(input_ids.shape)
        return self._logits(input_ids[:, -num_logits:])

    def decode(self, input_ids: Ids) -> Logits:
        return self._logits(input_ids[:, None])[:, 0]

    def close(self) -> None: ...

    def _logits(self, tokens: Ids) -> Logits:
        places = (np.arange(self.vocab_size) - tokens[..., None] - 1) % self.vocab_size
        return (-2.0 * places).astype(np.float32)


def test_greedy_text_is_that_of_transformers(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    prompts = ["def main():", "import os", "class Thing"]
    session = PyTorch(precision="float32").load(tiny_checkpoint, threads=1)

    texts = generate(session, tokenizer, prompts, max_new_tokens=12)

    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_each_prompt_continues_by_itself_and_equal_lengths_share_a_batch() -> None:
    session = Counting()

    tokens = generate_tokens(session, [[1], [5, 6], [3], [7, 8]], max_new_tokens=3)

    assert tokens == [[2, 3, 4], [7, 8, 9], [4, 5, 6], [9, 10, 11]]
    assert session.batches == [(2, 1), (2, 2)]


def test_a_sequence_ends_with_its_end_token_and_the_others_go_on() -> None:
    assert generate_tokens(Counting(), [[1], [4]], max_new_tokens=4, eos_ids=[3]) == [[2, 3], [5, 6, 7, 8]]


def test_samples_depend_on_the_seed_and_not_on_the_batch() -> None:
    prompts = [[1], [2], [3]]
    together = generate_tokens(Counting(), prompts, max_new_tokens=6, temperature=2.0, seed=7)
    apart = generate_tokens(Counting(), prompts, max_new_tokens=6, temperature=2.0, seed=7, batch_size=1)
    other = generate_tokens(Counting(), prompts, max_new_tokens=6, temperature=2.0, seed=8)

    assert together == apart
    assert together != other


def test_samples_have_the_softmax_distribution() -> None:
    tokens = generate_tokens(Counting(), [[0]] * 4000, max_new_tokens=1, temperature=2.0, batch_size=500)
    expected = np.exp(-np.arange(20.0))  # of 1, 2, 3, …: logits fall by 2, temperature 2
    share = np.bincount([t for (t,) in tokens], minlength=20)[1:4] / 4000

    np.testing.assert_allclose(share, (expected / expected.sum())[:3], atol=0.025)  # three standard errors


def test_a_sequence_may_fill_the_session_exactly() -> None:
    assert len(generate_tokens(Counting(), [[1] * 10], max_new_tokens=3)[0]) == 3  # the third is not read back
    with pytest.raises(ValueError, match="at most 12 tokens; a prompt of 10 and 4 new"):
        generate_tokens(Counting(), [[1] * 10], max_new_tokens=4)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {"max_new_tokens": 1}, "prompt 1 has none"),
        ([[1]], {"max_new_tokens": 0}, "at least 1; got 0"),
        ([[1]], {"max_new_tokens": 1, "temperature": -1.0}, "got -1.0"),
        ([[1]], {"max_new_tokens": 1, "temperature": float("nan")}, "got nan"),
    ],
)
def test_nonsense_is_refused(prompts: list[list[int]], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_tokens(Counting(), prompts, **options)  # type: ignore[arg-type]


def test_prompts_and_steps_no_engine_can_read_are_refused() -> None:
    def prompt(ids: Ids, num_logits: int = 1) -> None:
        check_prompt(ids, num_logits, vocab_size=10, max_length=4)

    prompt(np.array([[1, 2, 3, 9]]), 4)
    with pytest.raises(ValueError, match=r"got \[3\]"):
        prompt(np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="at most 4 tokens; got 5"):
        prompt(np.ones((1, 5), np.int64))
    with pytest.raises(ValueError, match="1 and the prompt's 2 tokens; got 3"):
        prompt(np.array([[1, 2]]), 3)
    with pytest.raises(ValueError, match="vocabulary's 10; got 1 to 10"):
        prompt(np.array([[1, 10]]))
    check_step(np.array([1, 2]), batch_size=2, length=3, max_length=4)
    with pytest.raises(ValueError, match=r"each of the 2 sequences.*got \[3\]"):
        check_step(np.array([1, 2, 3]), batch_size=2, length=3, max_length=4)
    with pytest.raises(ValueError, match="it has 4 and got one more"):
        check_step(np.array([1, 2]), batch_size=2, length=4, max_length=4)
