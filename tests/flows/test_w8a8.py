"""From a recipe with rounded activations to an engine's bundle, against stock transformers alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flows.recipe import RecipeError, parse
from tasks.engines.compiling import compile_engine, load_bundle
from tasks.quantization.apply import quantize_checkpoint

ONNX_RUNTIME = {"engine": "onnxruntime", "precision": "float32"}
FP8 = {"format": "float8_e4m3"}


def recipe(quantization, engine):
    return parse(
        {"name": "tiny", "source": ".", "engines": [engine], "candidates": {"w8a8": {"quantization": quantization}}}
    )


def test_recipe_to_onnx_runtime_answers_as_stock_transformers_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = recipe(
        {
            "method": "rtn",
            "embeddings": None,
            "activations": {"static": ["*"], "range": "mse", "smooth": 0.5},
            "kv_cache": "int8",
        },
        ONNX_RUNTIME,
    )
    data, checkpoint, bundle = (tmp_path / name for name in ("data", "checkpoint", "bundle"))
    for directory in (data, checkpoint, bundle):
        directory.mkdir()
    ids = np.random.default_rng(0).integers(0, 512, (20, 32)).astype(np.int32)
    np.save(data / "calibration.npy", ids[:16])
    np.save(data / "evaluation.npy", ids[16:])
    method = found.candidates["w8a8"].quantization
    quantize_checkpoint(checkpoint=tiny_checkpoint, data=data, method=method, out=checkpoint)
    summary = compile_engine(checkpoint=checkpoint, data=data, engine=found.engines[0], threads=1, out=bundle)

    assert summary.facts["products"] == "1 FusedMatMul, 16 MatMulIntegerToFloat"
    assert summary.facts["kv_cache"] == "int8"
    assert summary.parity is not None
    assert summary.parity.max_abs_error < 1e-4
    session, _ = load_bundle(bundle, threads=1)
    tokens = ids[16:].astype(np.int64)
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(checkpoint)(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(session.prefill(tokens, 32), stock, atol=1e-4)
    assert json.loads((checkpoint / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]


@pytest.mark.parametrize(
    ("quantization", "engine", "message"),
    [
        ({"weights": FP8, "activations": FP8}, ONNX_RUNTIME, "ONNX Runtime's CPU provider has no FP8 products"),
        ({"weights": FP8}, {"engine": "openvino", "precision": "float32"}, "OpenVINO's CPU plugin has no FP8 products"),
        ({"kv_cache": "float8_e4m3"}, ONNX_RUNTIME, "keeps no FP8 KV cache"),
        ({"activations": {}}, {"engine": "openvino", "precision": "float32"}, "by groups of 32 as they come"),
        ({"kv_cache": "int8"}, {"engine": "openvino", "precision": "float32"}, "takes no calibrated scales"),
        ({"activations": {}}, {"engine": "tensorrt", "precision": "float16"}, "no scale per token"),
        (
            {"activations": {"static": ["*"], "symmetric": False}},
            {"engine": "tensorrt", "precision": "float16"},
            "no zero points, those of inputs neither",
        ),
        ({"kv_cache": "int8"}, {"engine": "tensorrt", "precision": "float16"}, "keeps a float KV cache"),
    ],
)
def test_what_an_engine_lacks_is_said_when_the_recipe_is_read(quantization, engine, message) -> None:
    with pytest.raises(RecipeError, match=f"w8a8.*{message}"):
        recipe({"method": "rtn"} | quantization, engine)
