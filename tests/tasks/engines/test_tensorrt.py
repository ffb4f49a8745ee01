"""Options, and plans built for real by TensorRT for RTX, which needs no GPU for it; running one needs a GPU."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tasks.engines import TensorRT, tensorrt
from tasks.engines.compiling import compile_engine, load_bundle, read_manifest
from tasks.engines.decoder import read_decoder
from tasks.engines.export import export_decoder
from tasks.engines.tensorrt_library import build_plan
from tasks.engines.tensorrt_plan import Gpu, profiles, read_record
from tasks.quantization import Activations, Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight

OPTIONS = TensorRT(precision="float16", max_batch_size=4, max_prompt=64, max_length=96)
needs_builder = pytest.mark.skipif(
    OPTIONS.missing() is not None, reason=OPTIONS.missing() or "TensorRT for RTX is installed"
)
RTX_3090 = Gpu(name="NVIDIA GeForce RTX 3090", compute_capability="8.6")


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    OPTIONS.model_copy(update={"compute_capabilities": ("8.6", "8.9")}).compile(tiny_checkpoint, out)
    return out


@needs_builder
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_plan_of_a_float_checkpoint_is_built_without_a_gpu(
    tiny_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    options = TensorRT(precision=precision, max_length=96, max_prompt=64)
    options.compile(tiny_checkpoint, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.plan", "plan.json"]
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
    export_decoder(dataclasses.replace(decoder, layers=layers), tmp_path / "m.onnx", precision="float16", max_length=96)
    sizes = profiles(decoder, max_batch_size=4, max_prompt=64, max_length=96)
    assert len(build_plan(tmp_path / "m.onnx", sizes, OPTIONS).plan) > 0


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


def test_enterprise_library_is_not_touched_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "unusable", lambda _: None)
    monkeypatch.setattr(tensorrt, "first_gpu", lambda: None)
    reason = TensorRT(precision="float16", library="tensorrt").missing()
    assert reason is not None
    assert "needs an NVIDIA GPU even to build" in reason


@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_plan_whose_weights_change_is_not_built_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    monkeypatch.setattr(tensorrt, "unusable", lambda _: None)
    monkeypatch.setattr(tensorrt, "first_gpu", lambda: None)
    options = TensorRT.model_validate({"precision": "float16", option: True})
    with pytest.raises(ValueError, match=f"A plan with `{option}` is built on a machine with an NVIDIA GPU"):
        options.compile(tmp_path, tmp_path)


@needs_builder
@pytest.mark.parametrize(
    ("capability", "options", "message"),
    [
        (None, {}, "needs an NVIDIA GPU"),
        ("9.0", {}, r"this GPU has 9\.0. Use library 'tensorrt'"),
        ("8.6", {"compute_capabilities": ["8.9", "12.0"]}, r"for compute capability 8\.9, 12\.0; this GPU has 8\.6"),
    ],
)
def test_loading_without_a_supported_gpu_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: str | None,
    options: dict[str, Any],
    message: str,
) -> None:
    gpu = Gpu(name="a GPU", compute_capability=capability) if capability else None
    monkeypatch.setattr(tensorrt, "first_gpu", lambda: gpu)
    engine = TensorRT.model_validate({"precision": "float16"} | options)
    assert not engine.executable
    with pytest.raises(ValueError, match=message):
        engine.load(tmp_path, threads=1)


@needs_builder
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.6.2.1"}, r"very version that built it, TensorRT for RTX 1\.6\.2\.1; this is 1\.7\.1"),
        ({"compute_capabilities": ["8.9"]}, r"capability 8\.9, for which it was built; this is .*RTX 3090 \(8\.6\)"),
        (
            {"float8": True, "compute_capabilities": []},
            r"runs on 8\.9 and later; this is NVIDIA GeForce RTX 3090 \(8\.6\)",
        ),
        ({"library": "tensorrt"}, "The plan was built by TensorRT; "),
    ],
)
def test_plan_for_another_version_or_gpu_is_refused_before_the_runtime_sees_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    record = json.loads((bundle / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(record | changes))
    monkeypatch.setattr(tensorrt, "first_gpu", lambda: RTX_3090)
    monkeypatch.setattr(TensorRT, "cannot_run", lambda self: None)
    monkeypatch.setattr(tensorrt, "TensorRTSession", lambda *_, **__: pytest.fail("the runtime was asked"))
    with pytest.raises(ValueError, match=message):
        OPTIONS.load(tmp_path, threads=1)


@needs_builder
def test_plan_is_loaded_where_its_record_says(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "first_gpu", lambda: RTX_3090)
    monkeypatch.setattr(TensorRT, "cannot_run", lambda self: None)
    monkeypatch.setattr(tensorrt, "TensorRTSession", lambda directory, record, **_: (directory, record))
    assert OPTIONS.load(bundle, threads=1) == (bundle, read_record(bundle))


@needs_builder
def test_bundle_is_built_and_says_why_it_was_not_run(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "first_gpu", lambda: None)
    summary = compile_engine(checkpoint=tiny_checkpoint, data=tmp_path, engine=OPTIONS, threads=1, out=tmp_path)
    assert summary.status == "built, not run here"
    assert "needs an NVIDIA GPU" in str(summary.why_not_run)
    assert {"model.plan", "plan.json", "tokenizer.json"} <= read_manifest(tmp_path).files.keys()
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        load_bundle(tmp_path, threads=1)


@needs_builder
def test_plan_records_what_it_was_built_with(bundle: Path) -> None:
    import tensorrt_rtx

    record = read_record(bundle)
    assert (record.library, record.version) == ("tensorrt_rtx", tensorrt_rtx.__version__)
    assert record.compute_capabilities == ("8.6", "8.9")
    assert record.built_on is None
    assert not record.float8
    assert set(record.products) == {"Half × Half"}


def test_precision_has_to_be_named() -> None:
    with pytest.raises(ValidationError, match="precision"):
        TensorRT()


def test_prompt_longer_than_the_sequence_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_prompt must be at most max_length, 512; got 1024"):
        TensorRT(precision="float32", max_length=512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"timing_cache": "t"},
            "`timing_cache` is an option of library 'tensorrt'; got 'tensorrt_rtx'.*`runtime_cache`",
        ),
        ({"version_compatible": True}, "`version_compatible` is an option of library 'tensorrt'; .*very version"),
        ({"hardware_compatibility": "ampere_plus"}, "`hardware_compatibility` is .* those in `compute_capabilities`"),
        ({"library": "tensorrt", "runtime_cache": "r"}, "`runtime_cache` is an option of library 'tensorrt_rtx'"),
        ({"library": "tensorrt", "compute_capabilities": ["8.9"]}, "builds for the GPU of its machine"),
        ({"compute_capabilities": ["9.0"]}, "'7.5', '8.0', '8.6', '8.9', '12.0' or '12.1'"),
        ({"compute_capabilities": ["8.9", "8.9"]}, "names each once; got 8.9, 8.9"),
        ({"compute_capabilities": ["8.6", "8.9"], "refit": True}, "a plan for one compute capability; got 8.6, 8.9"),
        ({"dla_core": 0}, "dla_core"),
    ],
)
def test_option_that_would_be_ignored_is_refused_when_it_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TensorRT.model_validate({"precision": "float16"} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"runtime_cache": "r", "compute_capabilities": ["7.5"]},
        {"compute_capabilities": ["8.9"], "refit": True, "strip_weights": True},
        {"library": "tensorrt", "timing_cache": "t", "version_compatible": True, "refit": True},
        {"library": "tensorrt", "hardware_compatibility": "same_compute_capability"},
    ],
)
def test_options_of_a_library_survive_the_manifest(options: dict[str, Any]) -> None:
    engine = TensorRT.model_validate({"precision": "float16"} | options)
    assert TensorRT.model_validate(json.loads(engine.model_dump_json())) == engine


@pytest.mark.parametrize(
    ("capabilities", "grid", "activations", "message"),
    [
        (["8.6", "8.9"], {"format": "float8_e4m3"}, None, "FP8 needs compute capability 8.9 or later; .* names 8.6"),
        (["8.6"], {}, {"format": "float8_e4m3", "static": ["*"]}, "FP8 needs compute capability 8.9 or later"),
        (["7.5", "8.0"], {"bits": 4}, None, "INT4 needs compute capability 8.0 or later; .* names 7.5"),
        (["7.5"], {"bits": 8}, None, None),
        (["8.9", "12.0"], {"format": "float8_e4m3"}, {"format": "float8_e4m3", "static": ["*"]}, None),
        ([], {"bits": 4}, None, None),
    ],
)
def test_numbers_that_a_gpu_cannot_multiply_are_refused_with_the_recipe(
    capabilities: list[str], grid: dict[str, Any], activations: dict[str, Any] | None, message: str | None
) -> None:
    engine = TensorRT.model_validate({"precision": "float16", "compute_capabilities": capabilities})
    inputs = Activations.model_validate(activations) if activations else None
    problem = engine.cannot_hold(Grid.model_validate(grid)) or engine.cannot_round(inputs, None)
    if message is None:
        assert problem is None
    else:
        with pytest.raises(ValueError, match=message):
            raise ValueError(problem)


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
    record = read_record(tmp_path / "out")
    inputs = {"int8": "Int8 × Int8", "float8_e4m3": "FP8 × FP8"}[kind]
    assert record.products[inputs] == 2 * 4 * 4  # phases, layers; q, k and v are one product, gate and up another
    assert record.float8 == (kind == "float8_e4m3")


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


@needs_builder
@pytest.mark.parametrize(
    ("weights", "capability", "message"),
    [({"format": "float8_e4m3"}, "8.6", "FP8 needs compute capability 8.9"), ({"bits": 4}, "7.5", "INT4 needs")],
)
def test_checkpoint_that_a_gpu_cannot_multiply_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, weights: dict[str, Any], capability: str, message: str
) -> None:
    checkpoint = rounded(tiny_checkpoint, tmp_path, weights=weights)
    options = TensorRT.model_validate({"precision": "float16", "compute_capabilities": [capability]})
    with pytest.raises(ValueError, match=message):
        options.compile(checkpoint, tmp_path / "data")
    assert not (tmp_path / "data" / "model.plan").exists()
