"""An engine that goes wrong at one block is told to, whatever the engine."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tasks.calibration.checkpoints import copy_tokenizer
from tasks.engines import Engine, OnnxRuntime, OpenVino
from tasks.engines.blame import cut, first_difference
from tasks.engines.compiling import compile_engine
from tasks.engines.decoder import Decoder, read_decoder
from tasks.engines.parity import EXACT, compare, tolerance
from tasks.engines.pytorch import PyTorch
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint

ENGINES: dict[str, Engine] = {
    "onnxruntime": OnnxRuntime(precision="float32", activations="float32"),
    "openvino": OpenVino(precision="float32", activations="float32", kv_cache="float32"),
}
WINDOWS = np.random.default_rng(0).integers(0, 512, (2, 24))


def wrong_at(block: int):  # type: ignore[no-untyped-def]
    """A reader of checkpoints that scales what one block's feed-forward reads, if the model has that block."""

    def read(checkpoint: Path) -> Decoder:
        decoder = read_decoder(checkpoint)
        layers = list(decoder.layers)
        if block < len(layers):
            norm = layers[block].feed_forward_norm
            louder = dataclasses.replace(norm, gain=norm.gain * 1.05)
            layers[block] = dataclasses.replace(layers[block], feed_forward_norm=louder)
        return dataclasses.replace(decoder, layers=tuple(layers))

    return read


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", [0, 1, 3])
def test_the_block_that_is_wrong_is_named(engine, block, tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(f"tasks.engines.{engine}.read_decoder", wrong_at(block))

    name, why = first_difference(tiny_checkpoint, ENGINES[engine], WINDOWS, EXACT, threads=1)

    assert name.startswith(f"model.layers.{block}")
    assert ("model.embed_tokens" in name) == (block == 0)
    assert "kl_nats is" in why or "only" in why or "all blocks" in why


def test_compiling_refuses_a_wrong_engine_by_its_first_wrong_block(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tasks.engines.onnxruntime.read_decoder", wrong_at(2))
    with pytest.raises(ValueError, match=r"must answer as PyTorch does.*first layer that differs is model\.layers\.2"):
        compile_engine(checkpoint=tiny_checkpoint, data=None, engine=ENGINES["onnxruntime"], threads=1, out=tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_family_that_cannot_be_cut_is_refused_for_its_answers_all_the_same(
    tmp_path, tiny_checkpoint, monkeypatch
) -> None:
    """GPT-2 has no row that says where its blocks are."""
    config = GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data.mul_(6)
    model.save_pretrained(checkpoint)
    copy_tokenizer(tiny_checkpoint, checkpoint)
    out.mkdir()
    monkeypatch.setattr("tasks.engines.onnxruntime.read_decoder", wrong_at(1))
    with pytest.raises(ValueError, match=r"must answer as PyTorch does.*cannot be told for this family"):
        compile_engine(checkpoint=checkpoint, data=None, engine=ENGINES["onnxruntime"], threads=1, out=out)


@pytest.mark.parametrize("grid", [None, Grid(bits=4, group_size=16)])
def test_a_cut_checkpoint_is_the_model_without_its_last_blocks(grid, tiny_checkpoint, tmp_path) -> None:
    """With all blocks kept it is the model; with fewer, stock transformers loads it and says the same as an engine."""
    checkpoint = tiny_checkpoint
    if grid:
        checkpoint = tmp_path / "quantized"
        checkpoint.mkdir()
        method = RoundToNearest(weights=grid, embeddings=Grid(bits=8), ignore=("*.1.mlp.*",))
        quantize_checkpoint(checkpoint=tiny_checkpoint, data=tiny_checkpoint, method=method, out=checkpoint)
    for num_layers in (4, 1):
        part = tmp_path / str(num_layers)
        part.mkdir()
        cut(checkpoint, num_layers, part)
        logits = PyTorch(precision="float32").load(part, threads=1).prefill(WINDOWS, 24)
        if num_layers == 4:
            whole = PyTorch(precision="float32").load(checkpoint, threads=1).prefill(WINDOWS, 24)
            np.testing.assert_array_equal(logits, whole)
        else:
            bundle = tmp_path / "bundle"
            bundle.mkdir()
            engine = ENGINES["onnxruntime"]
            engine.compile(part, bundle)
            found = compare(engine.load(bundle, threads=1), PyTorch(precision="float32").load(part, threads=1), WINDOWS)
            assert tolerance(engine, part).broken_by(found) is None
