"""Plans built for real by TensorRT for RTX, which needs no GPU for it; running one needs a GPU."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from tasks.engines import tensorrt
from tasks.engines.decoder import read_decoder
from tasks.engines.tensorrt import DECODE, PREFILL, TensorRT, build_plan
from tasks.quantization import RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight

OPTIONS = TensorRT(precision="float16", max_batch_size=4, max_prompt=64, max_length=96)
needs_builder = pytest.mark.skipif(
    OPTIONS.missing() is not None, reason=OPTIONS.missing() or "TensorRT for RTX is installed"
)
needs_gpu = pytest.mark.skipif(not OPTIONS.executable, reason="needs a GPU that TensorRT for RTX runs on")


@needs_builder
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_plan_of_a_float_checkpoint_is_built_without_a_gpu(
    tiny_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    options = TensorRT(precision=precision, max_length=96, max_prompt=64)
    options.compile(tiny_checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.plan"]
    weights_bytes = (tiny_checkpoint / "model.safetensors").stat().st_size // (2 if precision == "float16" else 1)
    assert (tmp_path / "model.plan").stat().st_size > weights_bytes


@needs_builder
@pytest.mark.parametrize(
    ("bits", "group_size", "step"), [(8, None, 0.01), (8, 32, 0.01), (4, None, 0.01), (4, 32, 0.01), (4, 32, -0.01)]
)
def test_plan_of_symmetric_integers_is_built(
    tiny_checkpoint: Path, tmp_path: Path, bits: int, group_size: int | None, step: float
) -> None:
    decoder = read_decoder(tiny_checkpoint)
    integers = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (128, 64), dtype=np.int8)
    scale = np.full((128, 64 // (group_size or 64)), step, dtype=np.float32)
    up = QuantizedWeight(integers=integers, scale=scale, zero_point=None, bits=bits, group_size=group_size)
    layers = (dataclasses.replace(decoder.layers[0], up=up), *decoder.layers[1:])
    tensorrt.export_decoder(
        dataclasses.replace(decoder, layers=layers), tmp_path / "m.onnx", precision="float16", max_length=96
    )
    assert len(build_plan(tmp_path / "m.onnx", decoder, OPTIONS)) > 0


@needs_builder
def test_zero_points_are_refused_before_anything_is_built(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = read_decoder(tiny_checkpoint)
    up = QuantizedWeight(
        integers=np.zeros((128, 64), dtype=np.uint8),
        scale=np.ones((128, 1), dtype=np.float32),
        zero_point=np.full((128, 1), 7, dtype=np.uint8),
        bits=4,
        group_size=None,
    )
    layers = (*decoder.layers[:2], dataclasses.replace(decoder.layers[2], up=up), decoder.layers[3])
    monkeypatch.setattr(tensorrt, "read_decoder", lambda _: dataclasses.replace(decoder, layers=layers))
    with pytest.raises(ValueError, match=r"layer 2's up is asymmetric\. Quantize with `symmetric: true`"):
        OPTIONS.compile(tiny_checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_builder
def test_parser_error_names_the_node(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x"], ["y"], name="odd one", domain="com.microsoft")],
        "g",
        [value],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"TensorRT cannot read 1 node\(s\).*MatMulNBits 'odd one'"):
        build_plan(tmp_path / "m.onnx", read_decoder(tiny_checkpoint), OPTIONS)


def test_profiles_cover_every_prompt_and_every_step(tiny_checkpoint: Path) -> None:
    profiles = tensorrt._profiles(read_decoder(tiny_checkpoint), OPTIONS)
    smallest, typical, largest = profiles[PREFILL]["input_ids"]
    assert (smallest, typical, largest) == ((1, 1), (1, 64), (4, 64))
    assert profiles[PREFILL]["past_key_values.3.value"][2] == (4, 2, 0, 16)
    assert profiles[PREFILL]["logit_indices"] == ((1,), (1,), (64,))
    assert profiles[DECODE]["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert profiles[DECODE]["past_key_values.0.key"] == ((1, 2, 1, 16), (1, 2, 95, 16), (4, 2, 95, 16))
    assert profiles[DECODE]["attention_mask"][2] == (4, 96)
    assert len(profiles[DECODE]) == 4 + 2 * 4


def test_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt_rtx" else object())
    assert OPTIONS.missing() == (
        "The engine 'tensorrt' needs tensorrt_rtx. Install it: pip install 'slimline[tensorrt-rtx]'"
    )
    assert not OPTIONS.executable


def test_enterprise_library_is_not_touched_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(tensorrt, "compute_capability", lambda: None)
    reason = TensorRT(precision="float16", library="tensorrt").missing()
    assert reason is not None
    assert "needs an NVIDIA GPU even to build" in reason


@needs_builder
@pytest.mark.parametrize(
    ("capability", "message"), [(None, "needs an NVIDIA GPU"), ((9, 0), r"this GPU has 9\.0. Use library 'tensorrt'")]
)
def test_loading_without_a_supported_gpu_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, message: str
) -> None:
    monkeypatch.setattr(tensorrt, "compute_capability", lambda: capability)
    assert not OPTIONS.executable
    with pytest.raises(ValueError, match=message):
        OPTIONS.load(tmp_path, threads=1)


def test_precision_has_to_be_named() -> None:
    with pytest.raises(ValidationError, match="precision"):
        TensorRT()


def test_prompt_longer_than_the_sequence_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_prompt must be at most max_length, 512; got 1024"):
        TensorRT(precision="float32", max_length=512)


@pytest.mark.gpu
@needs_gpu
def test_plan_generates_what_pytorch_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    OPTIONS.compile(tiny_checkpoint, tmp_path)
    session = OPTIONS.load(tmp_path, threads=1)
    input_ids = np.random.default_rng(0).integers(0, 512, (2, 12))
    first = session.prefill(input_ids[:, :8], num_logits=8)
    steps = [session.decode(input_ids[:, position]) for position in range(8, 12)]
    logits = np.concatenate([first, np.stack(steps, axis=1)], axis=1)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)(torch.from_numpy(input_ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=3e-2)  # float16 over four layers
    session.close()


def rounded(checkpoint: Path, tmp_path: Path, **options: object) -> Path:
    out, data = tmp_path / "w8a8", tmp_path / "data"
    out.mkdir()
    data.mkdir()
    np.save(data / "calibration.npy", np.random.default_rng(0).integers(0, 512, (16, 32)).astype(np.int32))
    method = RoundToNearest.model_validate({"embeddings": None} | options)
    quantize_checkpoint(checkpoint=checkpoint, data=data, method=method, out=out)
    return out


@needs_builder
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3"])
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_plan_of_static_w8a8_is_built(tiny_checkpoint: Path, tmp_path: Path, kind: str, precision: str) -> None:
    weights = {"format": kind} if kind == "float8_e4m3" else {"bits": 8}
    checkpoint = rounded(tiny_checkpoint, tmp_path, weights=weights, activations={"format": kind, "static": ["*"]})
    (tmp_path / "out").mkdir()
    TensorRT(precision=precision, max_length=96, max_prompt=64).compile(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "model.plan").stat().st_size > 0


@needs_builder
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": {"static": ["*.mlp.*"]}}, "layer 0's q are per token"),
        ({"activations": {"static": ["*"], "symmetric": False}}, "layer 0's q are asymmetric"),
        ({"kv_cache": "int8"}, "keeps a float KV cache; this one is int8"),
    ],
)
def test_rounding_that_tensorrt_lacks_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    checkpoint = rounded(tiny_checkpoint, tmp_path, **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        OPTIONS.compile(checkpoint, tmp_path / "out")
