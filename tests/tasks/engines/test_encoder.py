"""Encoders in ONNX Runtime and OpenVINO against transformers on the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.engines.encoder import EncoderParity, EncoderSession, PyTorchEncoder, compare_encoders
from tasks.engines.exported import load_exported, write_graphs
from tasks.engines.exported_graph import Pooling

FLOAT32_ERROR = 2e-5  # answers are below 10; float32 sums in another order
MEAN = Pooling("mean", normalize=True)
MODELS = {"BertForMaskedLM": None, "RobertaForQuestionAnswering": None, "DistilBertModel": MEAN}
ENGINES = ("onnxruntime", "openvino")


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three texts of 24, 17 and 1 tokens, padded."""
    input_ids = np.random.default_rng(seed).integers(3, 96, (3, 24))
    mask = (np.arange(24) < np.array([[24], [17], [1]])).astype(np.int64)
    return input_ids, mask


@pytest.fixture(scope="module")
def session(exported: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., EncoderSession]:
    sessions: dict[tuple[str, str], EncoderSession] = {}

    def load(model: str, engine: str) -> EncoderSession:
        if (model, engine) not in sessions:
            found = exported(model, MODELS[model])
            out = tmp_path_factory.mktemp("bundle")
            write_graphs(found.graphs, found.source, engine, out)
            sessions[model, engine] = load_exported(out, engine, 1)
        return sessions[model, engine]

    return load


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_float_graph_says_what_transformers_says(
    model: str, engine: str, session: Callable[..., EncoderSession], exported: Callable[..., Any]
) -> None:
    reference = PyTorchEncoder(exported(model, MODELS[model]).source, MODELS[model])
    parity = compare_encoders(session(model, engine), reference, *batch())
    assert parity.max_abs_error < FLOAT32_ERROR
    assert parity.min_cosine > 1 - 1e-6
    assert parity.num_sequences == 3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_padding_changes_no_answer(model: str, engine: str, session: Callable[..., EncoderSession]) -> None:
    input_ids, mask = batch()
    together = session(model, engine).encode(input_ids, mask)
    for row, length in enumerate(mask.sum(1)):
        alone = session(model, engine).encode(input_ids[row : row + 1, :length])
        for name, answer in alone.items():
            same = together[name][row]
            same = same if name == "sentence_embedding" else same[:length]
            np.testing.assert_allclose(same, answer[0], atol=FLOAT32_ERROR)


def test_sentence_embedding_is_the_normalized_mean_over_the_tokens(session: Callable[..., EncoderSession]) -> None:
    input_ids, mask = batch()
    found = session("DistilBertModel", "onnxruntime").encode(input_ids, mask)
    mean = np.stack(
        [hidden[:length].mean(0) for hidden, length in zip(found["last_hidden_state"], mask.sum(1), strict=True)]
    )
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(found["sentence_embedding"], expected, atol=1e-6)


def test_token_types_are_heeded(session: Callable[..., EncoderSession], exported: Callable[..., Any]) -> None:
    input_ids, mask = batch()
    types = (np.arange(24) >= 9).astype(np.int64)[None].repeat(3, axis=0)
    bert = session("BertForMaskedLM", "onnxruntime")
    expected = PyTorchEncoder(exported("BertForMaskedLM").source, None).encode(input_ids, mask, types)["logits"]
    np.testing.assert_allclose(bert.encode(input_ids, mask, types)["logits"][0], expected[0], atol=FLOAT32_ERROR)
    assert np.abs(bert.encode(input_ids, mask)["logits"][0] - expected[0]).max() > 0.1


@pytest.mark.parametrize(
    ("input_ids", "mask", "types", "message"),
    [
        (np.zeros((0, 4), np.int64), None, None, r"at least one token; got \[0, 4\]"),
        (np.zeros((2, 0), np.int64), None, None, r"at least one token; got \[2, 0\]"),
        (np.zeros(4, np.int64), None, None, r"must be \[batch, length\].*got \[4\]"),
        (np.full((1, 41), 3), None, None, "at most 40 tokens, the model's positions; got 41"),
        (np.full((1, 4), 96), None, None, "below the vocabulary's 96; got 96 to 96"),
        (np.full((1, 4), -1), None, None, "below the vocabulary's 96; got -1 to -1"),
        (np.full((2, 4), 3), np.ones((2, 3), np.int64), None, r"shape of the ids, \[2, 4\]; got \[2, 3\]"),
        (np.full((2, 4), 3), np.array([[1, 0, 0, 0], [0, 0, 0, 0]]), None, "row 1 is not. Leave empty"),
        (np.full((1, 4), 3), np.full((1, 4), 2), None, "row 0 is not"),
        (np.full((1, 4), 3), None, np.full((1, 4), 2), "below 2; got .* 2 to 2"),
    ],
)
def test_bad_batch_is_refused(
    input_ids: np.ndarray,
    mask: np.ndarray | None,
    types: np.ndarray | None,
    message: str,
    session: Callable[..., EncoderSession],
) -> None:
    with pytest.raises(ValueError, match=message):
        session("BertForMaskedLM", "onnxruntime").encode(input_ids, mask, types)


class Constant:
    """Two texts of 2 and 1 tokens."""

    answers = ("last_hidden_state",)

    def __init__(self, hidden: list[list[list[float]]]) -> None:
        self.hidden = np.array(hidden, dtype=np.float32)

    def encode(self, *_: object) -> dict[str, np.ndarray]:
        return {"last_hidden_state": self.hidden}

    def close(self) -> None:
        """Nothing to free."""


def test_parity_of_a_case_by_hand_leaves_padding_out() -> None:
    ours = Constant([[[1, 0], [1, 0]], [[0, 2], [9, 9]]])
    theirs = Constant([[[1, 0], [1, 4]], [[0, 2], [5, 5]]])
    mask = np.array([[1, 1], [1, 0]])
    parity = compare_encoders(ours, theirs, np.zeros((2, 2), np.int64), mask)
    # means of the first text: (1, 0) and (1, 2), whose cosine is 1 / sqrt(5)
    assert parity.min_cosine == pytest.approx(5**-0.5)
    assert parity == EncoderParity(max_abs_error=4, mean_abs_error=4 / 6, min_cosine=parity.min_cosine, num_sequences=2)


def test_answers_that_are_not_finite_are_refused() -> None:
    ours, theirs = Constant([[[np.nan, 0]]]), Constant([[[1, 0]]])
    with pytest.raises(ValueError, match="last_hidden_state is not finite"):
        compare_encoders(ours, theirs, np.zeros((1, 1), np.int64))


def test_different_answers_cannot_be_compared() -> None:
    ours, theirs = Constant([[[1]]]), Constant([[[1]]])
    theirs.answers = ("logits",)
    with pytest.raises(ValueError, match="candidate gives last_hidden_state, the reference logits"):
        compare_encoders(ours, theirs, np.zeros((1, 1), np.int64))


def test_session_ends(exported: Callable[..., Any], tmp_path: Path) -> None:
    found = exported("BertForMaskedLM")
    write_graphs(found.graphs, found.source, "onnxruntime", tmp_path)
    session = load_exported(tmp_path, "onnxruntime", 1)
    assert session.facts["threads"] == "1"
    session.close()
    with pytest.raises(AttributeError):
        session.encode(batch()[0])
