"""Sessions with paged attention: blocks, windows, what cannot be paged; and that they measure what is served."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.calibration.checkpoints import copy_tokenizer
from tasks.engines import OpenVino, openvino_session
from tasks.engines.openvino_session import MODEL_FILE, OpenVinoSession
from tasks.engines.proposals import Lookup
from tasks.engines.runtimes import OpenVinoGenAi, SessionRuntime, runtime_of
from tasks.engines.text import Sampling
from tests.tasks.engines import tiny_families
from tests.tasks.engines.tiny_families import reference, tokens

EXACT = OpenVino(precision="float32", activations="float32", kv_cache="float32")
ROUNDED = OpenVino(precision="float32")
FLOAT32_ERROR = 1e-4  # logits are below 7; float32 sums in another order
BLOCK = 32  # tokens
MISTRAL = tiny_families.FAMILIES["mistral"] | {"sliding_window": BLOCK + 8}


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    EXACT.compile(tiny_checkpoint, out)
    return out


@pytest.fixture
def session(bundle: Path) -> OpenVinoSession:
    return EXACT.load(bundle, threads=1)


def compiled(folder: Path, family: str, options: dict[str, Any]) -> tuple[Path, Path]:
    """The checkpoint of a tiny model, with a tokenizer, and its bundle."""
    checkpoint, out = tiny_families.save(family, options, folder / "checkpoint"), folder / "bundle"
    out.mkdir()
    EXACT.compile(checkpoint, out)
    return checkpoint, out


def without_windows(bundle: Path, out: Path) -> Path:
    """The bundle as it was before its graph said how far its layers see."""
    model = openvino.Core().read_model(bundle / MODEL_FILE)
    max_length = model.get_rt_info(["slimline", "max_length"]).astype(int)
    model.set_rt_info({"max_length": max_length}, ["slimline"])
    openvino.save_model(model, out / MODEL_FILE, compress_to_fp16=False)
    return out


def test_sequences_that_outgrow_their_blocks_go_on_as_one_longer_prompt_would(session: OpenVinoSession) -> None:
    """Blocks of the three sequences alternate in memory; another prompt has used them in between."""
    input_ids = tokens(3, 3 * BLOCK + 5)
    whole = session.prefill(input_ids, input_ids.shape[1])
    prompt = BLOCK - 2
    fresh = session.prefill(tokens(1, 4, seed=1))
    np.testing.assert_array_equal(session.prefill(tokens(1, 4, seed=1)), fresh)
    session.prefill(input_ids[:, :prompt])
    for position in range(prompt, input_ids.shape[1]):
        step = session.decode(input_ids[:, position])
        np.testing.assert_allclose(step, whole[:, position], atol=FLOAT32_ERROR, rtol=0)


def test_caches_that_grow_keep_what_they_hold(bundle: Path) -> None:
    """A first prompt of one block, in a session that has no larger caches from a prompt before."""
    input_ids = tokens(2, 2 * BLOCK + 3)
    expected = EXACT.load(bundle, threads=1).prefill(input_ids, input_ids.shape[1])
    session = EXACT.load(bundle, threads=1)
    session.prefill(input_ids[:, :BLOCK])
    for position in range(BLOCK, input_ids.shape[1]):
        step = session.decode(input_ids[:, position])
        np.testing.assert_allclose(step, expected[:, position], atol=FLOAT32_ERROR, rtol=0)


def test_tokens_appended_together_and_after_others_were_forgotten_are_read_as_one_prompt(
    session: OpenVinoSession,
) -> None:
    """The forgotten ones filled the block before and began another."""
    input_ids = tokens(2, 2 * BLOCK)
    expected = session.prefill(input_ids, 5)
    prompt = BLOCK - 3
    session.prefill(input_ids[:, :prompt])
    session.append(tokens(2, 7, seed=1), 7)
    session.rewind(prompt)
    session.append(input_ids[:, prompt:-5])
    np.testing.assert_allclose(session.append(input_ids[:, -5:], 5), expected, atol=FLOAT32_ERROR, rtol=0)
    np.testing.assert_array_equal(session.append(input_ids[:, :3], 2).shape, (2, 2, session.vocab_size))


def test_the_graph_as_it_lies_in_the_bundle_answers_the_same(
    bundle: Path, session: OpenVinoSession, tmp_path: Path
) -> None:
    stateful = EXACT.load(without_windows(bundle, tmp_path), threads=1)
    assert session.facts["attention"] == "paged"
    assert stateful.facts["attention"] == ("stateful: the bundle does not say how far its layers see; compile it again")
    input_ids = tokens(2, 40)
    np.testing.assert_allclose(
        stateful.prefill(input_ids, 7), session.prefill(input_ids, 7), atol=FLOAT32_ERROR, rtol=0
    )
    np.testing.assert_allclose(
        stateful.decode(input_ids[:, 0]), session.decode(input_ids[:, 0]), atol=FLOAT32_ERROR, rtol=0
    )


def test_windows_longer_than_a_block_are_kept(tmp_path: Path) -> None:
    checkpoint, bundle = compiled(tmp_path, "mistral", MISTRAL)
    session = EXACT.load(bundle, threads=1)
    assert session.facts["attention"] == "paged"
    input_ids = tokens(2, 3 * BLOCK)
    expected = reference(checkpoint, input_ids)
    np.testing.assert_allclose(session.prefill(input_ids, 3 * BLOCK), expected, atol=FLOAT32_ERROR, rtol=0)
    session.prefill(input_ids[:, : 3 * BLOCK - 4])
    for position in range(3 * BLOCK - 4, 3 * BLOCK):
        step = session.decode(input_ids[:, position])
        np.testing.assert_allclose(step, expected[:, position], atol=FLOAT32_ERROR, rtol=0)


def test_a_window_that_the_library_does_not_find_is_not_dropped(tmp_path: Path, monkeypatch: Any) -> None:
    """As a version of the library would behave that looks for another form of mask."""
    checkpoint, bundle = compiled(tmp_path, "mistral", MISTRAL)
    monkeypatch.setattr(openvino_session, "_constant_or_none", lambda node: 0)
    session = EXACT.load(bundle, threads=1)
    assert session.facts["attention"].startswith("stateful: this version of openvino finds 3 of 3 layers, or not how")
    expected = reference(checkpoint, tokens(1, 60))
    np.testing.assert_allclose(session.prefill(tokens(1, 60), 60), expected, atol=FLOAT32_ERROR, rtol=0)


def test_capped_scores_are_answered_by_the_session_and_without_proposals(tmp_path: Path) -> None:
    checkpoint, bundle = compiled(tmp_path, "gemma2", tiny_families.GEMMA2)
    why = "its attention scores are capped, which paged attention cannot do"
    runtime = runtime_of(EXACT, bundle, threads=1)
    assert isinstance(runtime, SessionRuntime)
    assert runtime.facts["attention"] == f"stateful: {why}"
    assert greedy(runtime, tokens(1, 20)[0], 12) == greedy_tokens(checkpoint, tokens(1, 20)[0], 12)
    with pytest.raises(ValueError, match=rf"paged attention only; that of .*bundle is stateful: {why}"):
        runtime_of(EXACT, bundle, threads=1, lookup=Lookup())


def greedy(runtime: Any, prompt: np.ndarray, new_tokens: int) -> list[int]:
    found: list[int] = []

    def on_token(index: int, token: int) -> bool:
        found.append(token)
        return False

    runtime.generate([prompt.tolist()], Sampling(max_new_tokens=new_tokens), frozenset(), on_token)
    return found


def greedy_tokens(checkpoint: Path, prompt: np.ndarray, new_tokens: int) -> list[int]:
    """transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.from_numpy(prompt[None])
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [int(token) for token in model.generate(ids, attention_mask=mask, **options)[0, len(prompt) :]]


@pytest.mark.parametrize("kv_cache", ["float32", "uint8"])
def test_what_is_measured_is_what_openvino_genai_serves(kv_cache: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Tokens and their probabilities, with a window that is left behind; the rounded cache too, to the last digits."""
    checkpoint = tiny_families.save("mistral", MISTRAL, tmp_path / "checkpoint")
    copy_tokenizer(tiny_checkpoint, checkpoint)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    engine = EXACT.model_copy(update={"kv_cache": kv_cache})
    assert engine.compile(checkpoint, bundle) == ()
    for name in ("config.json", "generation_config.json"):
        (bundle / name).write_bytes((checkpoint / name).read_bytes())
    prompt = tokens(1, 2 * BLOCK)

    served, log_probs = served_by_genai(engine, bundle, prompt, 24)
    assert len(served) == 24

    session = engine.load(bundle, threads=1)
    assert session.facts["attention"] == "paged"
    logits = session.prefill(prompt)[:, -1]
    for token, log_prob in zip(served, log_probs, strict=True):
        own = logits[0] - np.log(np.exp(logits[0] - logits[0].max()).sum()) - logits[0].max()
        assert (int(own.argmax()), own[token]) == (token, pytest.approx(log_prob, abs=1e-5))
        logits = session.decode(np.array([token]))
    assert kv_cache != "float32" or served == greedy_tokens(checkpoint, prompt[0], 24)


def served_by_genai(
    engine: OpenVino, bundle: Path, prompt: np.ndarray, new_tokens: int
) -> tuple[list[int], list[float]]:
    """Greedy tokens, and the log-probability that the pipeline reports for each."""
    runtime = runtime_of(engine, bundle, threads=1)
    assert isinstance(runtime, OpenVinoGenAi)
    config = runtime._config(Sampling(max_new_tokens=new_tokens), frozenset())
    config.logprobs, config.ignore_eos = 1, True
    handle = runtime._pipeline.add_request(0, openvino.Tensor(prompt), config)
    while not handle.get_status().name.startswith("FINISHED"):
        runtime._pipeline.step()
    (output,) = handle.read_all()
    return list(output.generated_ids), list(output.generated_log_probs)
