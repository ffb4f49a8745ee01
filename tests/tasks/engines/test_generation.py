"""What no engine reads, and which token comes next."""

import numpy as np
import pytest

from tasks.engines.generation import Ids, check_prompt, check_step, choose


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, index]) for index in range(count)]


def drawn(logits: np.ndarray, count: int = 4000, **options: float) -> np.ndarray:
    """The share of each token among samples."""
    tokens = choose(np.tile(logits.astype(np.float32), (count, 1)), generators(count), **options)  # type: ignore[arg-type]
    return np.bincount(tokens, minlength=len(logits)) / count


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = np.array([[0.0, 3.0, 2.0], [5.0, 3.0, 2.0]], dtype=np.float32)
    np.testing.assert_array_equal(choose(logits, generators(2), temperature=0), [1, 0])


def test_samples_have_the_softmax_distribution() -> None:
    expected = np.exp(-np.arange(20.0))  # logits fall by 2, temperature 2
    share = drawn(-2.0 * np.arange(20), temperature=2.0)
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.025)  # three standard errors


def test_top_k_samples_from_the_likeliest_alone() -> None:
    share = drawn(np.array([0.0, 1.0, 0.5, -1.0]), temperature=1.0, top_k=2)
    expected = np.exp([0, 1.0, 0.5, 0]) * [0, 1, 1, 0]
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.025)
    np.testing.assert_allclose(drawn(np.zeros(3), temperature=1.0, top_k=9), 1 / 3, atol=0.025)


def test_top_p_samples_from_the_smallest_set_that_has_it() -> None:
    probabilities = np.array([0.2, 0.5, 0.05, 0.25])
    np.testing.assert_allclose(
        drawn(np.log(probabilities), temperature=1.0, top_p=0.7), [0, 2 / 3, 0, 1 / 3], atol=0.025
    )
    np.testing.assert_allclose(drawn(np.log(probabilities), temperature=1.0, top_p=0.5), [0, 1, 0, 0], atol=0)


def test_a_sample_depends_on_its_generator_and_not_on_the_batch() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    together = choose(logits, generators(3), temperature=2.0)
    apart = [choose(logits[[i]], [generators(3)[i]], temperature=2.0)[0] for i in range(3)]
    np.testing.assert_array_equal(together, apart)
    assert (choose(logits, generators(3, seed=1), temperature=2.0) != together).any()


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
