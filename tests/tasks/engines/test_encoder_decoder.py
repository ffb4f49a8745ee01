"""Encoder-decoders in ONNX Runtime and OpenVINO against transformers' own generation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.engines.encoder_decoder import (
    EncoderDecoderSession,
    Greedy,
    PyTorchEncoderDecoder,
    choose,
    compare_with_pytorch,
    read_greedy,
)
from tasks.engines.exported import load_exported, write_graphs

FLOAT32_ERROR = 2e-4  # T5's logits are up to 30; float32 sums in another order
MODELS = ("T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel")
ENGINES = ("onnxruntime", "openvino")
NUM_TOKENS = 22  # more than 16: OpenVINO's attention takes another path there


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Three texts of 24, 9 and 1 tokens, padded."""
    input_ids = np.random.default_rng(0).integers(3, 90, (3, 24))
    mask = (np.arange(24) < np.array([[24], [9], [1]])).astype(np.int64)
    return input_ids, mask


@pytest.fixture(scope="module")
def session(exported: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    sessions: dict[tuple[str, str], Any] = {}

    def load(model: str, engine: str) -> Any:
        if (model, engine) not in sessions:
            found = exported(model)
            out = tmp_path_factory.mktemp("bundle")
            config = json.loads((found.checkpoint / "config.json").read_text())
            write_graphs(found.graphs, found.source, engine, out, greedy=read_greedy(found.checkpoint, config))
            sessions[model, engine] = load_exported(out, engine, 1)
        return sessions[model, engine]

    return load


def up_to_end(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_the_same_token_by_token_in_an_engine_and_in_pytorch_with_its_caches(
    model: str, session: Callable[..., EncoderDecoderSession], exported: Callable[..., Any]
) -> None:
    found = exported(model)
    input_ids, _ = batch()
    config = json.loads((found.checkpoint / "config.json").read_text())
    greedy = read_greedy(found.checkpoint, config)
    ours, theirs = session(model, "onnxruntime"), PyTorchEncoderDecoder(found.source, greedy)
    tokens = np.full((len(input_ids), 1), greedy.decoder_start_token_id)
    logits = [ours.prefill(input_ids)[:, -1], theirs.prefill(input_ids)[:, -1]]
    for step in range(3):
        with torch.inference_mode():  # all of it again, without a cache
            out = found.source.model(
                input_ids=torch.from_numpy(input_ids), decoder_input_ids=torch.from_numpy(tokens), use_cache=False
            )
        expected = out.logits[:, -1].numpy()
        for each in logits:
            np.testing.assert_allclose(each, expected, atol=FLOAT32_ERROR)
        chosen = np.random.default_rng(step).integers(3, 90, len(input_ids))
        tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
        logits = [ours.decode(chosen), theirs.decode(chosen)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_padded_batch_gets_the_tokens_that_transformers_generates(
    model: str, engine: str, session: Callable[..., EncoderDecoderSession], exported: Callable[..., Any]
) -> None:
    input_ids, mask = batch()
    theirs = exported(model).source.model
    settings = json.loads((exported(model).checkpoint / "generation_config.json").read_text())
    settings = {name: settings[name] for name in settings if name not in ("transformers_version", "_from_model_config")}
    written = theirs.generate(
        torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=NUM_TOKENS,
        **settings | {"num_beams": 1, "do_sample": False},
    )
    expected = [up_to_end(row[1:], settings["eos_token_id"]) for row in written.tolist()]
    found = session(model, engine).generate(input_ids, mask, max_new_tokens=NUM_TOKENS)
    assert found == expected
    assert len({*found[0]}) > 3, "the model repeats itself; nothing is shown"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers_without_a_cache(
    model: str, engine: str, session: Callable[..., EncoderDecoderSession], exported: Callable[..., Any]
) -> None:
    parity = compare_with_pytorch(session(model, engine), exported(model).source, *batch(), num_tokens=NUM_TOKENS)
    assert parity.max_abs_error < FLOAT32_ERROR
    assert parity.top1_agreement == 1
    assert parity.num_positions == 3 * NUM_TOKENS


@pytest.mark.parametrize("model", MODELS)
def test_text_alone_gets_what_it_gets_in_a_padded_batch(
    model: str, session: Callable[..., EncoderDecoderSession]
) -> None:
    input_ids, mask = batch()
    together = session(model, "onnxruntime").generate(input_ids, mask, max_new_tokens=12)
    for row, length in enumerate(mask.sum(1)):
        alone = session(model, "onnxruntime").generate(input_ids[row : row + 1, :length], max_new_tokens=12)
        assert alone == [together[row]]


@pytest.mark.parametrize(
    ("input_ids", "max_new_tokens", "message"),
    [
        (np.full((1, 41), 3), 4, "at most 40 tokens, the model's positions; got 41"),
        (np.zeros((0, 4), np.int64), 4, "at least one token"),
        (np.full((1, 4), 96), 4, "below the vocabulary's 96"),
        (np.full((1, 4), 3), 0, "at least 1; got 0"),
        (np.full((1, 4), 3), 41, "at most 40 tokens, its positions; got max_new_tokens 41"),
    ],
)
def test_bad_request_is_refused(
    input_ids: np.ndarray, max_new_tokens: int, message: str, session: Callable[..., EncoderDecoderSession]
) -> None:
    with pytest.raises(ValueError, match=message):
        session("BartForConditionalGeneration", "onnxruntime").generate(input_ids, max_new_tokens=max_new_tokens)


def test_as_many_tokens_as_there_are_positions_can_be_written(session: Callable[..., EncoderDecoderSession]) -> None:
    [written] = session("MarianMTModel", "onnxruntime").generate(np.full((1, 40), 3), max_new_tokens=40)
    assert 1 <= len(written) <= 40


GREEDY = Greedy(decoder_start_token_id=0, eos_token_ids=(1,), pad_token_id=0)
LOGITS = np.array([[0.0, 5.0, 4.0, 3.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("greedy", "tokens", "expected"),
    [
        (GREEDY, [0], 1),
        (GREEDY.model_copy(update={"min_new_tokens": 1}), [0], 2),
        (GREEDY.model_copy(update={"min_new_tokens": 1}), [0, 2], 1),
        (GREEDY.model_copy(update={"suppressed_token_ids": (1, 2)}), [0], 3),
        (GREEDY.model_copy(update={"forced_bos_token_id": 3}), [0], 3),
        (GREEDY.model_copy(update={"forced_bos_token_id": 3}), [0, 3], 1),
        (GREEDY.model_copy(update={"forced_eos_token_id": 3}), [0, 2, 2, 2], 3),  # the last of four
        (GREEDY.model_copy(update={"no_repeat_ngram_size": 2}), [0, 2, 1, 3, 2], 2),  # 2, 1 has been
        (GREEDY.model_copy(update={"no_repeat_ngram_size": 1}), [0, 1], 2),
        (GREEDY.model_copy(update={"no_repeat_ngram_size": 3}), [0, 2], 1),
    ],
)
def test_settings_change_the_choice_by_hand(greedy: Greedy, tokens: list[int], expected: int) -> None:
    max_new_tokens = 4 if greedy.forced_eos_token_id else 9
    assert choose(LOGITS, np.array([tokens]), greedy, max_new_tokens).tolist() == [expected]
    assert LOGITS.tolist() == [[0, 5, 4, 3]]


def test_generation_config_is_read(transformer_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = transformer_checkpoint("BartForConditionalGeneration")
    assert read_greedy(checkpoint, json.loads((checkpoint / "config.json").read_text())) == Greedy(
        decoder_start_token_id=2,
        eos_token_ids=(2,),
        pad_token_id=1,
        forced_bos_token_id=7,
        forced_eos_token_id=2,
        min_new_tokens=5,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 1.3}, "does not follow `repetition_penalty`; .* sets it to 1.3"),
        ({"bad_words_ids": [[4, 5]]}, r"single tokens can be ruled out; .* has \[4, 5\]"),
        ({"eos_token_id": None}, "needs `eos_token_id`"),
        ({"decoder_start_token_id": None, "bos_token_id": None}, "needs `decoder_start_token_id`"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    settings: dict[str, object], message: str, transformer_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(transformer_checkpoint("MarianMTModel"), checkpoint)
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        read_greedy(checkpoint, {})
