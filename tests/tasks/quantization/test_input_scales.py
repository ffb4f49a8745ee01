"""Checkpoints whose activations are rounded: against stock transformers alone, and against their definition."""

import json

import numpy as np
import pytest
import torch

from tasks.calibration.architectures import ARCHITECTURES, architecture
from tasks.calibration.checkpoints import load_model
from tasks.calibration.statistics import Histogram
from tasks.engines import PyTorch
from tasks.quantization import Gptq, RoundToNearest
from tasks.quantization.activations import Inputs, fitted
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import Tensors, read_cache_scales, read_inputs, read_weights
from tasks.quantization.input_scales import cache_peaks, kinds_of_inputs

FP8 = {"format": "float8_e4m3"}
STATIC = {"static": ["*"]}
METHODS = {
    "per token": {"activations": {}},
    "static": {"activations": STATIC},
    "static asymmetric": {"activations": STATIC | {"symmetric": False, "range": "mse"}},
    "moving average": {"activations": STATIC | {"range": "moving-average"}},
    "some static, some float": {
        "activations": {"static": ["*.down_proj"], "ignore": ["model.layers.0.*"], "range": "entropy"}
    },
    "smooth": {"activations": STATIC | {"smooth": 0.5, "range": "percentile", "percentile": 99.9}},
    "smooth per token": {"activations": {"smooth": 0.8}, "ignore": ["*.3.mlp.*"]},
    "fp8 per token": {"weights": FP8, "activations": FP8},
    "fp8 static": {"weights": FP8, "activations": FP8 | STATIC, "embeddings": None},
    "fp8 weights": {"weights": FP8},
    "kv cache": {"kv_cache": "int8"},
    "fp8 kv cache": {"kv_cache": "float8_e4m3", "activations": STATIC},
    "gptq": {"method": "gptq", "weights": {"bits": 8}, "activations": {"smooth": 0.5}, "kv_cache": "int8"},
}
CALIBRATION = np.random.default_rng(0).integers(0, 512, (18, 32)).astype(np.int32)


def quantized(checkpoint, tmp_path, options, calibration=CALIBRATION):
    out, data = tmp_path / "out", tmp_path / "data"
    out.mkdir()
    data.mkdir()
    np.save(data / "calibration.npy", calibration)
    kind = Gptq if options.get("method") == "gptq" else RoundToNearest
    return out, quantize_checkpoint(checkpoint=checkpoint, data=data, method=kind.model_validate(options), out=out)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_stock_transformers_computes_what_we_do(tiny_checkpoint, tmp_path, options):
    check_against_stock_transformers(tiny_checkpoint, tmp_path, options)


@pytest.mark.parametrize("method", ["per token", "smooth", "fp8 weights", "kv cache"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_stock_transformers_computes_every_family_as_we_do(family_checkpoint, tmp_path, family, method):
    if method == "kv cache" and not architecture(family).cache_scales:
        with pytest.raises(ValueError, match=f"left out for the family {family}.*got int8"):
            quantized(family_checkpoint(family), tmp_path, METHODS[method])
        return
    if (family, method) == ("opt", "per token"):
        pytest.skip(
            "compressed-tensors 0.20 finds no tokens in inputs [tokens, features], which OPT's fc1 and fc2 read"
        )
    check_against_stock_transformers(family_checkpoint(family), tmp_path, METHODS[method])


def check_against_stock_transformers(checkpoint, tmp_path, options):
    from transformers import AutoModelForCausalLM

    out, _ = quantized(checkpoint, tmp_path, options)
    input_ids = np.random.default_rng(1).integers(0, 512, (2, 24))
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(out)(torch.from_numpy(input_ids)).logits.numpy()
        unrounded = load_model(out)(torch.from_numpy(input_ids)).logits.numpy()
    ours = PyTorch().load(out, threads=1)
    assert np.array_equal(ours.prefill(input_ids, 24), stock)
    if options.keys() & {"activations", "kv_cache"}:
        assert np.abs(stock - unrounded).max() > 0.01
    ours.prefill(input_ids[:, :20])
    steps = [ours.decode(input_ids[:, position]) for position in range(20, 24)]
    close = np.abs(np.stack(steps, 1) - stock[:, 20:])
    assert np.median(close) < 0.02  # one position sums in another order, which moves what lies halfway by a step


def test_config_says_w8a8_as_vllm_reads_it(tiny_checkpoint, tmp_path):
    out, _ = quantized(tiny_checkpoint, tmp_path, {"activations": STATIC, "kv_cache": "int8", "embeddings": None})
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["format"] == group["format"] == "int-quantized"
    assert group["targets"] == ["Linear"]
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    assert group["weights"] == eight | {"strategy": "channel"}
    assert group["input_activations"] == config["kv_cache_scheme"] == eight | {"strategy": "tensor"}
    assert config["ignore"] == ["model.embed_tokens", "lm_head"]
    with Tensors(out) as tensors:
        assert tensors.tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.int8
        scale = tensors.tensor("model.layers.0.mlp.up_proj.input_scale")
        assert (scale.shape, scale.dtype) == ((1,), torch.float32)
        assert tensors.shape("model.layers.3.self_attn.v_scale") == [1]


def test_scales_are_those_of_the_inputs_with_quantized_weights(tiny_checkpoint, tmp_path):
    out, summary = quantized(tiny_checkpoint, tmp_path, METHODS["static asymmetric"])
    model, name = load_model(out), "model.layers.2.mlp.down_proj"
    histogram = Histogram()
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: histogram.update(args[0]))
    with torch.no_grad():
        for batch in torch.from_numpy(CALIBRATION).long().split(8):
            model(batch)
    options = RoundToNearest.model_validate(METHODS["static asymmetric"]).activations
    expected = fitted(histogram, options)
    assert read_inputs(out)[name] == read_weights(out)[f"{name}.weight"].inputs == expected
    (layer,) = (layer for layer in summary.layers if layer.name == name)
    assert layer.inputs == "static"
    assert histogram.minimum * 0.7 > layer.input_range[0] >= histogram.minimum * 1.1
    assert 0 < layer.input_relative_error < 0.05


def test_layers_choose_for_themselves(tiny_checkpoint, tmp_path):
    out, summary = quantized(tiny_checkpoint, tmp_path, METHODS["some static, some float"])
    inputs = read_inputs(out)
    assert "model.layers.0.mlp.down_proj" not in inputs
    assert inputs["model.layers.1.mlp.up_proj"] == Inputs("int8")
    assert inputs["model.layers.1.mlp.down_proj"].scale > 0
    kinds = {layer.name: layer.inputs for layer in summary.layers}
    assert kinds["model.layers.0.mlp.down_proj"] == kinds["model.embed_tokens"] == "float"
    assert kinds["model.layers.1.mlp.up_proj"] == "per token"


def test_cache_scales_are_the_largest_keys_and_values(tiny_checkpoint, tmp_path):
    out, _ = quantized(tiny_checkpoint, tmp_path, METHODS["kv cache"])
    model, batch = load_model(out), torch.from_numpy(CALIBRATION).long()
    with torch.no_grad():
        cache = model(batch, use_cache=True).past_key_values
    scales = read_cache_scales(out)
    assert scales.format == "int8"
    for layer, (key, value), peaks in zip(
        cache.layers, scales.of_blocks, cache_peaks(model, batch.split(8)), strict=True
    ):
        assert peaks == pytest.approx((float(layer.keys.abs().max()), float(layer.values.abs().max())), rel=1e-5)
        assert (key * 127, value * 127) == pytest.approx(peaks, rel=1e-6)


def test_summary_counts_the_scales(tiny_checkpoint, tmp_path):
    out, summary = quantized(tiny_checkpoint, tmp_path, METHODS["static"])
    with Tensors(out) as tensors:
        size_bytes = sum(tensors.tensor(name).nbytes for name in tensors.names)
    assert summary.size_bytes == size_bytes
    assert {file.name for file in out.glob("*.safetensors*")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }


@pytest.mark.parametrize("options", [METHODS["static"], METHODS["kv cache"], METHODS["smooth per token"]])
def test_calibration_that_is_too_short_is_an_error(tiny_checkpoint, tmp_path, options):
    with pytest.raises(ValueError, match=r"at least 512 tokens; got 480\. Raise data\.num_calibration_sequences"):
        quantized(tiny_checkpoint, tmp_path, options, CALIBRATION[:15])


def test_per_token_needs_no_calibration(tiny_checkpoint, tmp_path):
    quantized(tiny_checkpoint, tmp_path, METHODS["per token"], CALIBRATION[:0])


def test_patterns_that_match_nothing_are_refused():
    layers = architecture("llama").all_linears(2)
    for option in ("static", "ignore"):
        options = RoundToNearest.model_validate({"activations": {option: ["*.up"]}}).activations
        with pytest.raises(ValueError, match=rf"`activations\.{option}` must match a layer; '\*\.up' matches none"):
            kinds_of_inputs(options, layers, layers)
    options = RoundToNearest.model_validate({"activations": {"ignore": ["*"]}}).activations
    with pytest.raises(ValueError, match=r"`activations\.ignore` \(\*\) leaves none"):
        kinds_of_inputs(options, layers, layers)
