import json
import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.calibration.architectures import ARCHITECTURES
from tasks.pruning import Magnitude, PruningMethod, Wanda, Width
from tasks.pruning.apply import prune_checkpoint
from tasks.pruning.sparsity import SemiStructured, Unstructured

METHODS = get_args(get_args(PruningMethod)[0])


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    np.save(directory / "calibration.npy", np.random.default_rng(0).integers(0, 512, (10, 16)).astype(np.int32))
    return directory


@pytest.fixture
def prune(tiny_checkpoint, data, tmp_path):
    def run(method, checkpoint=tiny_checkpoint, name="out"):
        out = tmp_path / name
        out.mkdir()
        return out, prune_checkpoint(checkpoint=checkpoint, data=data, method=method, out=out)

    return run


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_stock_transformers_loads_what_every_method_writes(prune, tiny_checkpoint, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, summary = prune(kind())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) == summary.num_parameters
    assert (
        sum(int(p.count_nonzero()) for p in model.parameters()) == summary.num_nonzero < summary.num_parameters_before
    )
    assert model.config.intermediate_size == summary.intermediate_size
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(out)("def f")["input_ids"]
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 10000
    assert summary.untouched == []
    assert summary.size_bytes == (out / "model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_stock_transformers_loads_every_family(prune, family_checkpoint, family, kind):
    from transformers import AutoModelForCausalLM

    out, summary = prune(kind(), checkpoint=family_checkpoint(family))
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert sum(int(p.count_nonzero()) for p in model.parameters()) == summary.num_nonzero
    assert summary.num_nonzero < summary.num_parameters_before
    assert summary.untouched == []
    assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_every_method_gives_the_same_bytes_again(prune, kind):
    first, _ = prune(kind(), name="first")
    second, _ = prune(kind(), name="second")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "kind", [kind for kind in METHODS if "sparsity" in kind.model_fields], ids=lambda k: k.__name__
)
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_sparsity_is_what_was_asked_for_in_every_layer(prune, kind, fraction):
    _, summary = prune(kind(sparsity=Unstructured(sparsity=fraction)))
    assert summary.sparsity == fraction
    assert {layer.sparsity for layer in summary.layers} == {fraction}
    assert len(summary.layers) == 4 * 7


@pytest.mark.parametrize(
    "kind", [kind for kind in METHODS if "sparsity" in kind.model_fields], ids=lambda k: k.__name__
)
def test_pattern_holds_in_every_layer(prune, kind):
    out, summary = prune(kind(sparsity=SemiStructured(n=1, m=4)))
    tensors = load_file(out / "model.safetensors")
    for layer in summary.layers:
        weight = tensors[f"{layer.name}.weight"]
        assert ((weight.view(weight.shape[0], -1, 4) != 0).sum(dim=2) == 1).all()


def test_width_shrinks_the_checkpoint(prune):
    _, summary = prune(Width(keep=0.5))
    removed = 4 * 3 * 64 * 64
    assert (summary.intermediate_size_before, summary.intermediate_size) == (128, 64)
    assert summary.num_parameters == summary.num_parameters_before - removed
    assert summary.size_bytes_before - summary.size_bytes == pytest.approx(4 * removed, rel=0.01)
    assert {layer.num_weights / layer.num_weights_before for layer in summary.layers} == {0.5}


def test_ignored_layers_stay_as_they_were(prune, tiny_checkpoint):
    out, summary = prune(Wanda(ignore=("*.down_proj",)))
    before, after = load_file(tiny_checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(after["model.layers.2.mlp.down_proj.weight"], before["model.layers.2.mlp.down_proj.weight"])
    assert not any(layer.name.endswith("down_proj") for layer in summary.layers)


def test_layers_that_lost_no_weight_are_reported(prune, tiny_checkpoint, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(1)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    _, summary = prune(Magnitude(threshold=0.01), copy)
    assert summary.untouched == ["model.layers.1.mlp.up_proj"]
    assert "1 of 28 layers lost no weight" in caplog.text


def test_a_threshold_below_every_weight_is_refused(prune):
    with pytest.raises(ValueError, match="none of 28 layers lost a weight"):
        prune(Magnitude(threshold=1e-12))


def test_tokens_of_another_vocabulary_are_refused(prune, data):
    np.save(data / "calibration.npy", np.full((2, 8), 512, dtype=np.int32))
    with pytest.raises(ValueError, match="below the model's 512 tokens; got 512"):
        prune(Wanda())


def test_weights_that_are_not_finite_are_refused(prune, tiny_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of 8192 weights of model\.layers\.1\.mlp\.up_proj\.weight are NaN or"):
        prune(Wanda(), copy)


def test_a_pattern_that_does_not_fit_names_the_layer(prune):
    with pytest.raises(ValueError, match=r"divisible by 5; got 64 in model\.layers\.0\.self_attn\.q_proj"):
        prune(Wanda(sparsity=SemiStructured(n=1, m=5)))
