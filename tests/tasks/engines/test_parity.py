"""Parity with its theorems: nothing differs from itself, and a known difference has a known size."""

from pathlib import Path

import numpy as np
import pytest

from tasks.engines import OnnxRuntime, OpenVino, PyTorch, TensorRT
from tasks.engines.generation import Ids, Logits
from tasks.engines.parity import EXACT, ROUNDED, Divergence, Tolerance, ask, compare, compare_greedy, tolerance
from tasks.quantization import Activations, Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint


class Table:
    """Logits that depend on the last token only: one row per token, of a table a test can write down."""

    max_length = 100
    facts: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, table: Logits, decoding: Logits | None = None) -> None:
        self._table = table
        self._decoding = table if decoding is None else decoding
        self.vocab_size = table.shape[1]

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        return self._table[input_ids[:, -num_logits:]]

    def decode(self, input_ids: Ids) -> Logits:
        return self._decoding[input_ids]

    def close(self) -> None: ...


TABLE = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
WINDOWS = np.arange(24).reshape(2, 12) % 6


def test_a_session_agrees_with_itself() -> None:
    parity = compare(Table(TABLE), Table(TABLE), WINDOWS)

    assert parity.max_abs_error == parity.mean_abs_error == parity.kl_nats == parity.decode_max_abs_error == 0
    assert parity.top1_agreement == 1
    assert parity.num_positions == 24


def test_a_constant_added_to_every_logit_changes_no_probability() -> None:
    parity = compare(Table(TABLE + 2), Table(TABLE), WINDOWS)

    assert parity.max_abs_error == pytest.approx(2, abs=1e-6)
    assert parity.mean_abs_error == pytest.approx(2, abs=1e-6)
    assert parity.kl_nats == pytest.approx(0, abs=1e-6)
    assert parity.top1_agreement == 1


def test_kl_is_that_of_the_definition_and_has_a_direction() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25]] * 3, np.float32))
    candidate = np.log(np.array([[0.25, 0.5, 0.25]] * 3, np.float32))
    windows = np.array([[0, 1, 2, 0, 1, 2]])

    parity = compare(Table(candidate), Table(reference), windows)

    assert parity.kl_nats == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2), rel=1e-5)
    assert parity.top1_agreement == 0
    peaked = np.log(np.array([[0.9, 0.05, 0.05]] * 3, np.float32))
    there, back = compare(Table(peaked), Table(reference), windows), compare(Table(reference), Table(peaked), windows)
    assert there.kl_nats == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.25 / 0.05), rel=1e-5)
    assert back.kl_nats == pytest.approx(0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.05 / 0.25), rel=1e-5)


def test_agreement_counts_positions() -> None:
    swapped = TABLE.copy()
    swapped[3] = -TABLE[3]  # token 3 is one position of six

    assert compare(Table(swapped), Table(TABLE), WINDOWS).top1_agreement == pytest.approx(5 / 6)


def test_an_error_of_decoding_alone_is_seen() -> None:
    parity = compare(Table(TABLE, decoding=TABLE + 1), Table(TABLE), WINDOWS)

    assert parity.max_abs_error == 0
    assert parity.decode_max_abs_error == pytest.approx(1, abs=1e-6)


def test_greedy_texts_part_where_the_likeliest_tokens_do() -> None:
    """After token t comes t + 1; the other says 5 after 3, which the reference finds 0.25 less likely than 4."""
    table = np.array([[-((t - row - 1) % 6) for t in range(6)] for row in range(6)], np.float32)
    table[3, 5] = -0.25
    other = table.copy()
    other[3, 5] = 0.25
    prompts = np.array([[4], [0], [2]])

    greedy = compare_greedy(prompts, np.array([[5, 0, 1], [1, 2, 3], [3, 5, 0]]), Table(table))

    assert (greedy.num_sequences, greedy.num_same, greedy.num_new_tokens) == (3, 2, 3)
    assert greedy.first_divergence == Divergence(sequence=2, position=1, logit_gap=0.25)
    assert ask(Table(table), np.array([[2, 0]]), num_decoded=1).written.tolist() == [[3]]
    whole = ask(Table(table), np.array([[0, 4, 2, 0, 0, 0]]))
    assert whole.written.tolist() == [[3, 4, 5]]
    assert compare_greedy(np.array([[0, 4, 2]]), whole.written, Table(table)).first_divergence is None


def test_a_tolerance_says_what_is_beyond_it() -> None:
    limits = Tolerance(max_abs_error=0.5, kl_nats=0.1, top1_agreement=0.9)
    assert limits.broken_by(compare(Table(TABLE), Table(TABLE), WINDOWS)) is None

    said = limits.broken_by(compare(Table(TABLE, decoding=TABLE + 1), Table(TABLE), WINDOWS))
    assert said == "decode_max_abs_error is 1, allowed 0.5"
    said = limits.broken_by(compare(Table(-TABLE), Table(TABLE), WINDOWS))
    assert said is not None
    assert "kl_nats is" in said
    assert "top1_agreement is 0.000, at least 0.9 is required" in said


def test_rounding_is_allowed_where_something_is_rounded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    exact = OpenVino(precision="float32", activations="float32", kv_cache="float32")
    assert tolerance(exact, tiny_checkpoint) == tolerance(PyTorch(), tiny_checkpoint) == EXACT
    assert tolerance(OpenVino(precision="float32"), tiny_checkpoint) == ROUNDED
    assert tolerance(OnnxRuntime(precision="float32"), tiny_checkpoint) == ROUNDED
    assert tolerance(TensorRT(precision="float16"), tiny_checkpoint) == ROUNDED
    method = RoundToNearest(weights=Grid(bits=8), activations=Activations())
    quantize_checkpoint(checkpoint=tiny_checkpoint, data=tiny_checkpoint, method=method, out=tmp_path)
    assert tolerance(OnnxRuntime(precision="float32", activations="float32"), tmp_path) == ROUNDED


def test_logits_that_are_no_numbers_are_refused() -> None:
    broken = TABLE.copy()
    broken[2, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        compare(Table(broken), Table(TABLE), WINDOWS)


def test_vocabularies_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="candidate has 5 tokens, the reference 6"):
        compare(Table(TABLE[:, :5]), Table(TABLE), WINDOWS)
