"""The libraries that generate, on real bundles of a tiny model: greedy tokens are those of transformers."""

import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.engines import Engine, OnnxRuntime, OpenVino, TensorRT
from tasks.engines.compiling import compile_engine, load_generator
from tasks.engines.generation import Ids, Logits
from tasks.engines.proposals import Lookup, Pace
from tasks.engines.runtimes import SessionRuntime, runtime_of
from tasks.engines.text import Sampling, TextGenerator

ENGINES: dict[str, Engine] = {
    "onnxruntime": OnnxRuntime(precision="float32", activations="float32"),
    "openvino": OpenVino(precision="float32", activations="float32", kv_cache="float32"),
}
PROMPTS = ("def main():", "import os", "class Thing:\n    def")


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


def generated(session: Counting, prompts: list[list[int]], eos_ids: tuple[int, ...] = (), **options: float) -> list:
    batch_size = int(options.pop("batch_size", 8))
    tokens: list[list[int]] = [[] for _ in prompts]

    def on_token(index: int, token: int) -> bool:
        tokens[index].append(token)
        return False

    sampling = Sampling.model_validate(options)
    SessionRuntime(session, batch_size=batch_size).generate(prompts, sampling, frozenset(eos_ids), on_token)
    return tokens


def test_each_prompt_continues_by_itself_and_equal_lengths_share_a_batch() -> None:
    session = Counting()
    assert generated(session, [[1], [5, 6], [3], [7, 8]], max_new_tokens=3) == [
        [2, 3, 4],
        [7, 8, 9],
        [4, 5, 6],
        [9, 10, 11],
    ]
    assert session.batches == [(2, 1), (2, 2)]


def test_a_sequence_ends_with_its_end_token_and_the_others_go_on() -> None:
    assert generated(Counting(), [[1], [4]], max_new_tokens=4, eos_ids=(3,)) == [[2, 3], [5, 6, 7, 8]]


def test_samples_depend_on_the_seed_and_not_on_the_batch() -> None:
    prompts = [[1], [2], [3]]
    together = generated(Counting(), prompts, max_new_tokens=6, temperature=2.0, seed=7)
    assert together == generated(Counting(), prompts, max_new_tokens=6, temperature=2.0, seed=7, batch_size=1)
    assert together != generated(Counting(), prompts, max_new_tokens=6, temperature=2.0, seed=8)


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    data = tmp_path_factory.mktemp("data")
    np.save(data / "evaluation.npy", np.random.default_rng(0).integers(0, 512, (1, 32)).astype(np.int32))
    made = {}
    for name, engine in ENGINES.items():
        made[name] = tmp_path_factory.mktemp(name)
        summary = compile_engine(checkpoint=tiny_checkpoint, data=data, engine=engine, threads=1, out=made[name])
        assert not summary.notes
    return made


@pytest.fixture(scope="module")
def greedy(tiny_checkpoint: Path) -> Callable[[list[int], int], list[int]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)

    def tokens(prompt: list[int], max_new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
        return [int(token) for token in out[0, len(prompt) :]]

    return tokens


def answers(generator: TextGenerator, prompts: tuple[str, ...], sampling: Sampling) -> list[list[int]]:
    found, _ = generator.answer([generator.encode(prompt) for prompt in prompts], sampling)
    return [list(answer.tokens) for answer in found]


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_tokens_are_those_of_transformers(engine, bundles, greedy) -> None:
    generator = load_generator(bundles[engine], threads=1)

    found = answers(generator, PROMPTS, Sampling(max_new_tokens=24))

    assert found == [greedy(generator.encode(prompt), 24) for prompt in PROMPTS]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("helper", ["lookup", "draft"])
def test_proposed_tokens_change_no_answer_and_save_passes(engine, helper, bundles, greedy, monkeypatch) -> None:
    """The draft is the model itself, so that all it proposes is accepted; and as it saves no time, it never pauses."""
    monkeypatch.setattr(Pace, "ALLOWANCE", math.inf)
    options = {"lookup": Lookup()} if helper == "lookup" else {"draft": bundles[engine]}
    generator = load_generator(bundles[engine], threads=1, **options)
    prompts = ["def main():", "a b c d e f a b c d e f a b c d"]
    encoded = [generator.encode(prompt) for prompt in prompts]

    for ids in encoded:
        (answer,), work = generator.answer([ids], Sampling(max_new_tokens=48))

        assert list(answer.tokens) == greedy(ids, 48)
        assert work.num_accepted is not None
        if helper == "draft":
            assert work.num_accepted >= 20
            assert work.num_steps <= 27


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_repeat_with_their_seed(engine, bundles) -> None:
    generator = load_generator(bundles[engine], threads=1)
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50, "top_p": 0.95}

    first = answers(generator, PROMPTS[:1], Sampling(seed=1, **options))

    assert first == answers(generator, PROMPTS[:1], Sampling(seed=1, **options))
    assert first != answers(generator, PROMPTS[:1], Sampling(seed=2, **options))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_ended_answer_leaves_the_others_alone(engine, bundles, greedy) -> None:
    generator = load_generator(bundles[engine], threads=1)
    encoded = [generator.encode(prompt) for prompt in PROMPTS]
    seen: list[int] = []

    def listen(index: int, text: str) -> bool:
        seen.append(index)
        return index == 1

    found, _ = generator.answer(encoded, Sampling(max_new_tokens=24), listen)

    assert len(found[1].tokens) < 24
    assert [list(found[i].tokens) for i in (0, 2)] == [greedy(encoded[i], 24) for i in (0, 2)]
    assert {0, 1, 2} == set(seen)


@pytest.mark.parametrize("engine", ENGINES)
def test_callers_in_several_threads_get_their_own_answers(engine, bundles, greedy) -> None:
    generator = load_generator(bundles[engine], threads=1)
    found: dict[int, list[list[int]]] = {}

    def ask(index: int) -> None:
        found[index] = answers(generator, (PROMPTS[index],), Sampling(max_new_tokens=16))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert found == {i: [greedy(generator.encode(prompt), 16)] for i, prompt in enumerate(PROMPTS)}


def test_a_bundle_is_a_model_directory_of_onnx_runtime_genai(bundles, greedy) -> None:
    """Loaded and used as the library's own documentation does it, two prompts of different length at once."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(bundles["onnxruntime"]))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    prompts = ["def main():", "class Thing:\n    def"]
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=max(lengths) + 12, batch_size=2)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(tokenizer.encode_batch(prompts))
    while not generator.is_done():
        generator.generate_next_token()

    for index, prompt in enumerate(prompts):
        ids = [int(token) for token in tokenizer.encode(prompt)]
        assert [int(token) for token in generator.get_sequence(index)][max(lengths) :] == greedy(ids, 12)


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_a_bundle_is_a_model_directory_of_openvino_genai(backend, bundles, greedy) -> None:
    """The hint is needed with a float32 KV cache: where there is bfloat16, it is that pipeline's own precision."""
    import openvino_genai
    from transformers import AutoTokenizer

    options = {"ATTENTION_BACKEND": backend, "INFERENCE_PRECISION_HINT": "f32"}
    pipeline = openvino_genai.LLMPipeline(bundles["openvino"], "CPU", **options)
    tokenizer = AutoTokenizer.from_pretrained(bundles["openvino"])
    config = openvino_genai.GenerationConfig(max_new_tokens=12, apply_chat_template=False)

    texts = pipeline.generate(list(PROMPTS), config).texts  # of different length

    expected = [greedy(tokenizer.encode(prompt), 12) for prompt in PROMPTS]
    assert texts == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]


def test_a_generation_library_that_is_not_installed_is_named(bundles, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(ValueError, match=r"needs openvino-genai here.*pip install 'slimline\[openvino\]'"):
        load_generator(bundles["openvino"], threads=1)


def test_both_a_lookup_and_a_draft_are_refused(bundles) -> None:
    with pytest.raises(ValueError, match="not by both"):
        load_generator(bundles["openvino"], threads=1, lookup=Lookup(), draft=bundles["openvino"])


def test_a_draft_for_another_engine_is_refused(bundles) -> None:
    with pytest.raises(ValueError, match=r"compiled for the engine of the model, onnxruntime; .* is for openvino"):
        load_generator(bundles["onnxruntime"], threads=1, draft=bundles["openvino"])


def test_engines_without_proposals_say_which_have_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engines 'onnxruntime' and 'openvino'; got 'tensorrt'"):
        runtime_of(TensorRT(precision="float16"), tmp_path, threads=1, lookup=Lookup())
