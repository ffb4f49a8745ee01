"""Benchmarks of encoders and encoder-decoders, beside transformers' own."""

import shutil

import numpy as np
import pandas as pd
import pytest

from tasks.engines import OnnxRuntime
from tasks.engines.exported_graph import missing
from tasks.validation.benchmarks import Embeddings, Translation
from tasks.validation.benchmarks.embeddings import nearest
from tasks.validation.benchmarks.measuring import ask_original, measure_benchmark

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def compiled(transformer_checkpoint, save_words, tmp_path_factory):
    """Makes (checkpoint, bundle) of a class, with a tokenizer of as many words as the models have."""
    from tasks.engines.compiling import compile_engine

    def make(class_name):
        checkpoint, out = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("bundle")
        shutil.copytree(transformer_checkpoint(class_name), checkpoint, dirs_exist_ok=True)
        save_words(checkpoint, eos_token="w1")
        engine = OnnxRuntime(precision="float32", activations="float32")
        compile_engine(checkpoint=checkpoint, data=None, engine=engine, threads=1, out=out)
        return checkpoint, out

    return make


def _damage(checkpoint, size):
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    weights = load_file(checkpoint / "model.safetensors")
    for name, value in weights.items():
        if value.ndim == 2 and "layer" in name:
            weights[name] = value + rng.normal(0, size * value.std(), value.shape).astype(np.float32)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def texts(write_lines):
    rng = np.random.default_rng(0)
    return write_lines({"text": " ".join(f"w{n}" for n in rng.integers(2, 96, rng.integers(1, 60)))} for _ in range(30))


def test_embeddings_stay_the_originals_in_an_engine_and_leave_it_when_damaged(compiled, texts, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    checkpoint, bundle = compiled("BertModel")
    benchmark = Embeddings(task="embeddings", data=str(texts), num_neighbours=5)
    reference = tmp_path / "reference"
    reference.mkdir()
    original = ask_original(checkpoint=checkpoint, benchmark=benchmark, data=texts, threads=1, out=reference)
    assert original.figures == {}
    summary = measure_benchmark(bundle=bundle, reference=reference, benchmark=benchmark, threads=1, out=tmp_path)
    assert summary.metrics["cosine"].value.value == pytest.approx(1, abs=1e-6)
    assert summary.metrics["retrieval_agreement"].value.value == 1
    assert summary.metrics["cosine"].degradation is None

    items = pd.read_parquet(tmp_path / "items.parquet")
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint)
    ids = tokenizer(items["prompt"][0], return_tensors="pt", truncation=True, max_length=40)["input_ids"]
    expected = model(ids).last_hidden_state[0].mean(dim=0).detach().numpy()
    np.testing.assert_allclose(items["embedding"][0], expected, atol=1e-5)

    _damage(checkpoint, 0.3)  # now the bundle is what differs from it
    ask_original(checkpoint=checkpoint, benchmark=benchmark, data=texts, threads=1, out=reference)
    summary = measure_benchmark(bundle=bundle, reference=reference, benchmark=benchmark, threads=1, out=tmp_path)
    assert summary.metrics["cosine"].value.high < 0.999
    assert summary.metrics["retrieval_agreement"].value.high < 1


def test_neighbours_are_the_most_similar_others():
    angles = np.radians([0, 10, 30, 180])
    unit = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert nearest(unit, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]


def test_too_few_texts_and_models_that_do_not_embed_are_refused(compiled, texts, tiny_checkpoint, tmp_path):
    benchmark = Embeddings(task="embeddings", data=str(texts), num_neighbours=30)
    with pytest.raises(ValueError, match="num_neighbours 30 needs more texts than that to search in; got 30"):
        benchmark.items(texts)
    benchmark = Embeddings(task="embeddings", data=str(texts))
    with pytest.raises(ValueError, match=r"Embeddings need an encoder .*; got 'llama'"):
        ask_original(checkpoint=tiny_checkpoint, benchmark=benchmark, data=texts, threads=1, out=tmp_path)


def test_an_encoder_decoder_translates_as_transformers_does(compiled, write_lines, tmp_path):
    rng = np.random.default_rng(1)
    file = write_lines(
        {"source": " ".join(f"w{n}" for n in rng.integers(2, 96, 7)), "reference": "w3 w4 w5"} for _ in range(6)
    )
    checkpoint, bundle = compiled("MarianMTModel")
    benchmark = Translation(task="translation", data=str(file), prompt="{source}", max_new_tokens=8)
    reference = tmp_path / "reference"
    reference.mkdir()
    ask_original(checkpoint=checkpoint, benchmark=benchmark, data=file, threads=1, out=reference)
    measure_benchmark(bundle=bundle, reference=reference, benchmark=benchmark, threads=1, out=tmp_path)
    items = pd.read_parquet(tmp_path / "items.parquet")
    assert list(items["answer"]) == list(items["original_answer"])
    assert items["answer"].str.len().min() > 0
