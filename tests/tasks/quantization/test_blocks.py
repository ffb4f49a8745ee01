import hashlib
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from tasks.calibration.architectures import ARCHITECTURES, architecture
from tasks.calibration.checkpoints import load_model
from tasks.calibration.layerwise import compress_blocks
from tasks.calibration.statistics import InputGram
from tasks.calibration.tokens import calibration_batches
from tasks.quantization import Gptq, Grid
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.awq import scale_inputs_
from tasks.quantization.blocks import BATCH_SIZE
from tasks.quantization.checkpoint_format import read_weights
from tasks.quantization.gptq import gptq, output_error
from tasks.quantization.summary import QuantizationSummary

METHODS = {
    "gptq": Gptq(weights=Grid(bits=4, group_size=16, symmetric=False, range="mse")),
    "awq": Gptq(weights=Grid(bits=3, group_size=32), awq=True),
    "blocks at once": Gptq(true_sequential=False),
}


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    np.save(directory / "calibration.npy", np.random.default_rng(0).integers(0, 512, (12, 32)).astype(np.int32))
    return directory


def in_memory(checkpoint, data, method):
    """Quantized weights of a model that is in memory as a whole, and the other tensors that changed."""
    model = load_model(checkpoint)
    family = architecture(model.config.model_type)
    layers = dict.fromkeys(family.all_linears(model.config.num_hidden_layers), method.weights)
    found, changed = {}, {}

    def quantize_(layer, weight, inputs):
        found[layer] = method.quantize_for(weight.clone(), method.weights, layer, inputs).weight
        weight.copy_(torch.from_numpy(found[layer].dequantize()))

    compress_blocks(
        model,
        family,
        calibration_batches(data, 512, BATCH_SIZE),
        layers,
        InputGram,
        quantize_,
        step_by_step=method.true_sequential,
        prepare_=(lambda block, inputs: changed.update(scale_inputs_(model, family, block, inputs, layers)))
        if method.awq
        else None,
    )
    return found, changed


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_streamed_integers_are_those_of_a_walk_in_memory(family_checkpoint, data, tmp_path, family, method):
    checkpoint, out = family_checkpoint(family), tmp_path / "out"
    out.mkdir()
    quantize_checkpoint(checkpoint=checkpoint, data=data, method=method, out=out)
    assert not list(out.glob("tmp*"))
    expected, changed = in_memory(checkpoint, data, method)
    weights = read_weights(out)
    assert len(expected) == 3 * len(architecture(family).linears)
    for layer, weight in expected.items():
        found = weights[f"{layer}.weight"]
        assert np.array_equal(found.integers, weight.integers)
        assert np.array_equal(found.scale, weight.scale)
        assert weight.zero_point is None or np.array_equal(found.zero_point, weight.zero_point)
    assert bool(changed) == method.awq
    for name, values in changed.items():
        assert np.array_equal(weights[name], values.numpy())


@pytest.mark.parametrize("tied", [True, False])
def test_the_lm_head_is_rounded_for_what_the_quantized_blocks_give_it(
    tiny_checkpoint, family_checkpoint, data, tmp_path, tied
):
    checkpoint, out = tiny_checkpoint if tied else family_checkpoint("qwen3"), tmp_path / "out"
    out.mkdir()
    method = Gptq(weights=Grid(bits=3, group_size=32), embeddings=Grid(bits=3, group_size=32))
    summary = quantize_checkpoint(checkpoint=checkpoint, data=data, method=method, out=out)
    original, model = load_model(checkpoint), load_model(out)
    inputs = InputGram(original.config.hidden_size)
    with torch.no_grad():
        for batch in calibration_batches(data, 512, BATCH_SIZE):
            # Blocks, quantized, behind the float embedding: a tied one is rounded after them.
            model.set_input_embeddings(original.get_input_embeddings())
            inputs.update(model.base_model(batch).last_hidden_state)
    head = original.get_output_embeddings().weight.detach()
    arguments = {"damping": 0.1 if tied else 0.01, "act_order": True, "block_size": 128}
    expected, damping, _ = gptq(head, inputs.value, method.embeddings, "head", **arguments)
    module = "model.embed_tokens" if tied else "lm_head"
    found = read_weights(out)[f"{module}.weight"]
    assert np.array_equal(found.scale, expected.scale)
    assert (found.integers == expected.integers).mean() > 0.999  # sums in another order
    assert damping == arguments["damping"]
    (layer,) = (layer for layer in summary.layers if layer.name == module)
    assert layer.method == "GPTQ"
    assert layer.output_error == pytest.approx(
        output_error(head, torch.from_numpy(expected.dequantize()), inputs.value), rel=1e-2
    )
    others = {layer.name: layer.method for layer in summary.layers if layer.method != "GPTQ"}
    assert others == ({} if tied else {"model.embed_tokens": "rounded to nearest"})


def test_an_lm_head_that_was_not_finished_is_the_only_thing_left_to_do(tiny_checkpoint, data, tmp_path, monkeypatch):
    run = partial(quantize_checkpoint, checkpoint=tiny_checkpoint, data=data, method=Gptq(), work_dir=tmp_path / "work")
    (tmp_path / "whole").mkdir()
    run(out=tmp_path / "whole")
    (tmp_path / "work" / "head.safetensors").unlink()
    monkeypatch.setattr("tasks.calibration.layerwise.compress_blocks", None)
    (tmp_path / "resumed").mkdir()
    assert run(out=tmp_path / "resumed").resumed_from_block == 4
    assert sha256(tmp_path / "resumed") == sha256(tmp_path / "whole")


STAGE = """
import os, signal
from pathlib import Path
import numpy as np
import tasks.calibration.streaming, tasks.quantization.blocks as blocks, tasks.quantization.gptq as gptq
from tasks.quantization import Gptq
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.summary import QuantizationSummary

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def dying(*, moment: str, checkpoint: Path, data: Path, method: Gptq, out: Path, work_dir: Path, report=None) -> None:
    if moment == "in a block":
        count, real = iter(range(1000)), gptq.gptq
        gptq.gptq = lambda *a, **k: die() if next(count) == 7 * 2 + 3 else real(*a, **k)
    if moment == "while hidden states are written":
        batches, real = iter(range(1000)), np.save
        np.save = lambda *a, **k: die() if next(batches) == 2 * 2 + 1 else real(*a, **k)
    if moment == "while a block is written":
        real = blocks.save_whole
        def half(file, tensors, metadata):
            if file.name == "block-2.safetensors":
                file.with_suffix(".partial").write_bytes(b"half of it")
                die()
            real(file, tensors, metadata)
        blocks.save_whole = half
    if moment == "while the head is written":
        real = blocks.save_whole
        blocks.save_whole = lambda file, *a: die() if file.name == "head.safetensors" else real(file, *a)
    quantize_checkpoint(checkpoint=checkpoint, data=data, method=method, out=out, work_dir=work_dir, report=report)
"""
MOMENTS = {
    "in a block": 2,
    "while hidden states are written": 1,
    "while a block is written": 2,
    "while the head is written": 4,
}


def sha256(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_stage_goes_on_after_its_last_block_and_ends_with_the_same_bytes(
    tiny_checkpoint, data, tmp_path, killing, moment
):
    arguments = {"checkpoint": tiny_checkpoint, "data": data, "method": METHODS["awq"]}
    stage = killing(STAGE, "tasks.quantization.apply:quantize_checkpoint", QuantizationSummary, arguments)
    whole = stage.run("whole", "calm")
    assert whole.resumed_from_block is None
    stage.killed("killed", moment)
    finished = MOMENTS[moment]
    assert len(list((tmp_path / "killed").glob("block-*.safetensors"))) == finished

    blocks = []
    resumed = stage.run("resumed", "killed", lambda step, total, _: blocks.append(step) if total == 4 else None)
    assert blocks == list(range(finished + 1, 5))
    assert resumed.resumed_from_block == finished
    assert resumed == whole.model_copy(update={"resumed_from_block": finished})
    assert sha256(tmp_path / "resumed") == sha256(tmp_path / "whole")


def test_a_walk_that_was_finished_is_not_walked_again(tiny_checkpoint, data, tmp_path, monkeypatch):
    work_dir, found = tmp_path / "work", []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        summary = quantize_checkpoint(
            checkpoint=tiny_checkpoint, data=data, method=Gptq(), out=tmp_path / name, work_dir=work_dir
        )
        found.append((sha256(tmp_path / name), summary.layers))
        monkeypatch.setattr("tasks.calibration.layerwise.compress_blocks", None)
    assert found[0] == found[1]
    assert summary.resumed_from_block == 4


def test_a_work_directory_of_other_arguments_is_refused(tiny_checkpoint, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run = partial(quantize_checkpoint, data=data, out=out, work_dir=tmp_path / "work")
    run(checkpoint=tiny_checkpoint, method=Gptq())
    with pytest.raises(ValueError, match="holds the work of one with other method"):
        run(checkpoint=tiny_checkpoint, method=Gptq(damping=0.02))
    np.save(data / "calibration.npy", np.zeros((2, 8), np.int32))
    with pytest.raises(ValueError, match="one with other calibration"):
        run(checkpoint=tiny_checkpoint, method=Gptq())
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    with pytest.raises(ValueError, match="one with other checkpoint, calibration"):
        run(checkpoint=copy, method=Gptq())


def test_a_checkpoint_that_lacks_a_weight_is_refused(tiny_checkpoint, data, tmp_path):
    from safetensors.torch import load_file, save_file

    copy, out = tmp_path / "copy", tmp_path / "out"
    out.mkdir()
    shutil.copytree(tiny_checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    norm = tensors.pop("model.layers.2.input_layernorm.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks 1: model\.layers\.2\.input_layernorm\.weight"):
        quantize_checkpoint(checkpoint=copy, data=data, method=Gptq(), out=out)
    tensors["model.layers.2.input_layernorm.weight"] = norm[:32].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"input_layernorm\.weight must be \[64\]; got \[32\]"):
        quantize_checkpoint(checkpoint=copy, data=data, method=Gptq(), out=out)
