"""Encoders and encoder-decoders as bundles: compiled, compared, used, refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from tasks.engines import Engine, OnnxRuntime, OpenVino, TensorRT
from tasks.engines.compiling import compile_engine, load_bundle, load_generator, read_manifest, tune_bundle
from tasks.engines.exported import load_exported
from tasks.engines.exported_bundle import compile_for
from tasks.engines.exported_graph import missing
from tasks.engines.proposals import Lookup
from tasks.engines.text import Sampling

ENGINES: dict[str, Engine] = {
    "onnxruntime": OnnxRuntime(precision="float32", activations="float32"),
    "openvino": OpenVino(precision="float32", activations="float32"),
}
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def bundle(
    transformer_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, Path]]:
    """Makes (checkpoint, bundle) of a class for an engine, with a tokenizer of as many words as the models have."""
    words = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(96)}, unk_token="<9>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<9>", eos_token="<1>", pad_token="<0>")
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(class_name: str, engine: str) -> tuple[Path, Path]:
        if (class_name, engine) not in made:
            checkpoint, out = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("bundle")
            shutil.copytree(transformer_checkpoint(class_name), checkpoint, dirs_exist_ok=True)
            tokenizer.save_pretrained(checkpoint)
            compile_engine(checkpoint=checkpoint, data=None, engine=ENGINES[engine], threads=1, out=out)
            made[class_name, engine] = checkpoint, out
        return made[class_name, engine]

    return make


@pytest.mark.parametrize("engine", ENGINES)
def test_an_encoder_decoder_writes_what_transformers_writes(engine: str, bundle) -> None:
    checkpoint, out = bundle("T5ForConditionalGeneration", engine)
    generator = load_generator(out, threads=1)
    prompts = [[5, 9, 90, 1], [7, 3, 4, 8, 60, 1]]
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)

    answers, _ = generator.answer(prompts, Sampling(max_new_tokens=10))

    for prompt, answer in zip(prompts, answers, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, num_beams=1)
        assert list(answer.tokens) == [int(token) for token in expected[0, 1:]]
    assert read_manifest(out).status == "run"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_encoder_is_compiled_compared_and_loaded(engine: str, bundle) -> None:
    checkpoint, out = bundle("BertModel", engine)
    ids = np.array([[5, 9, 90, 1]])

    answers = load_exported(out, engine, 1).encode(ids)  # type: ignore[arg-type]

    expected = AutoModel.from_pretrained(checkpoint)(torch.from_numpy(ids)).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(answers["last_hidden_state"], expected, atol=1e-4, rtol=0)
    assert {"config.json", "tokenizer.json", "exported.json"} <= set(read_manifest(out).files)


def test_what_an_encoder_cannot_do_is_said(bundle) -> None:
    _, out = bundle("BertModel", "onnxruntime")
    with pytest.raises(ValueError, match="An encoder writes no text"):
        load_generator(out, threads=1)
    with pytest.raises(ValueError, match="no session of a decoder"):
        load_bundle(out, threads=1)
    with pytest.raises(ValueError, match="searched for decoders"):
        tune_bundle(bundle=out, max_threads=1)


def test_what_an_encoder_decoder_cannot_do_is_said(bundle) -> None:
    _, out = bundle("T5ForConditionalGeneration", "onnxruntime")
    with pytest.raises(ValueError, match="proposed to decoders"):
        load_generator(out, threads=1, lookup=Lookup())
    with pytest.raises(ValueError, match=r"got temperature 0\.5"):
        load_generator(out, threads=1).answer([[5, 1]], Sampling(temperature=0.5, max_new_tokens=2))


def test_options_that_would_be_ignored_and_other_engines_are_refused(bundle, tmp_path: Path) -> None:
    checkpoint, _ = bundle("BertModel", "onnxruntime")
    with pytest.raises(ValueError, match="kv_cache 'float16' would be ignored"):
        compile_for(checkpoint, OpenVino(precision="float32", kv_cache="float16"), tmp_path)
    with pytest.raises(ValueError, match="got 'tensorrt'"):
        compile_for(checkpoint, TensorRT(precision="float16"), tmp_path)
    assert not list(tmp_path.iterdir())
