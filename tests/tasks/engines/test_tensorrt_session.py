"""Running plans needs a GPU: those tests are skipped where there is none. What is said in words is tested anywhere."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.engines import PyTorch, TensorRT
from tasks.engines.decoder import read_decoder
from tasks.engines.export import export_decoder
from tasks.engines.parity import compare
from tasks.engines.tensorrt_library import first_gpu, import_library, open_plan, refit_engine
from tasks.engines.tensorrt_session import failure, within_gpu_memory
from tasks.quantization import RoundToNearest
from tasks.quantization.apply import quantize_checkpoint

OPTIONS = {"precision": "float16", "max_batch_size": 4, "max_prompt": 64, "max_length": 96}


def test_torch_out_of_memory_is_told_in_words() -> None:
    import torch

    message = r"^The KV cache must fit into the GPU's free memory; CUDA says: CUDA out of memory\. End"
    with pytest.raises(ValueError, match=message), within_gpu_memory("The KV cache"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of")


def test_other_errors_within_an_allocation_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), within_gpu_memory("The KV cache"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_step_without_memory_can_be_acted_on_and_others_are_failures() -> None:
    problem = failure("Error Code 2: OutOfMemory (Requested size was 1073741824 bytes.)", 8, 1024)
    assert isinstance(problem, ValueError)
    assert "1024 tokens of 8 sequences need more memory" in str(problem)
    assert isinstance(failure("Error Code 1: Cuda Runtime (misaligned address)", 8, 1024), RuntimeError)


@pytest.fixture(params=["tensorrt_rtx", "tensorrt"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of each library that runs on the GPU of this machine."""
    found = OPTIONS | {"library": request.param}
    if problem := TensorRT.model_validate(found).cannot_run():
        pytest.skip(problem)
    return found


def loaded(options: dict[str, Any], checkpoint: Path, out: Path) -> Any:
    out.mkdir()
    engine = TensorRT.model_validate(options)
    engine.compile(checkpoint, out)
    return engine.load(out, threads=1)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 3e-2), ("float32", 1e-3)])
def test_plan_answers_as_pytorch_does(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    """Tolerances are those of the type's rounding over four layers; a decode error would be of the logits' size."""
    import torch
    from transformers import AutoModelForCausalLM

    session = loaded(options | {"precision": precision}, tiny_checkpoint, tmp_path / "bundle")
    input_ids = np.random.default_rng(0).integers(0, 512, (2, 12))
    first = session.prefill(input_ids[:, :8], num_logits=8)
    steps = [session.decode(input_ids[:, position]) for position in range(8, 12)]
    logits = np.concatenate([first, np.stack(steps, axis=1)], axis=1)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)(torch.from_numpy(input_ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=tolerance)
    session.close()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method",
    [
        {"weights": {"bits": 8}, "activations": {"static": ["*"]}},
        {"weights": {"format": "float8_e4m3"}, "activations": {"format": "float8_e4m3", "static": ["*"]}},
        {"weights": {"bits": 8}},
        {"weights": {"bits": 8, "group_size": 32}},
        {"weights": {"bits": 4, "group_size": 32}},
        {"weights": {"bits": 4}},
        {"weights": {"bits": 4, "group_size": 32}, "embeddings": {"bits": 8}},
    ],
    ids=["w8a8", "fp8", "w8", "w8g32", "w4g32", "w4", "w4-embedding8"],
)
def test_quantized_plan_answers_as_pytorch_does_on_the_same_integers(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """PyTorch rounds the same inputs to the same grid; float16 moves some over the edge between two of its steps."""
    gpu = first_gpu()
    assert gpu
    if method["weights"].get("format") == "float8_e4m3" and gpu.generation < (8, 9):
        pytest.skip(f"FP8 needs compute capability 8.9; this GPU has {gpu.compute_capability}")
    data, checkpoint = tmp_path / "data", tmp_path / "checkpoint"
    data.mkdir()
    checkpoint.mkdir()
    np.save(data / "calibration.npy", np.random.default_rng(0).integers(0, 512, (16, 32)).astype(np.int32))
    chosen = RoundToNearest.model_validate({"embeddings": None} | method)
    quantize_checkpoint(checkpoint=tiny_checkpoint, data=data, method=chosen, out=checkpoint)
    session = loaded(options, checkpoint, tmp_path / "bundle")
    reference = PyTorch(precision="float32").load(checkpoint, threads=1)
    windows = np.random.default_rng(1).integers(0, 512, (4, 32))
    found = compare(session, reference, windows)
    rounds_inputs = "activations" in method
    assert found.top1_agreement > (0.9 if rounds_inputs else 0.95)
    assert found.kl_nats < (5e-2 if rounds_inputs else 1e-3)
    session.close()


@pytest.mark.gpu
def test_sequences_of_a_batch_do_not_mix(options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    session = loaded(options, tiny_checkpoint, tmp_path / "bundle")
    input_ids = np.random.default_rng(2).integers(0, 512, (4, 10))
    together = [
        session.prefill(input_ids[:, :8])[:, 0],
        session.decode(input_ids[:, 8]),
        session.decode(input_ids[:, 9]),
    ]
    for row in range(4):
        alone = [session.prefill(input_ids[row : row + 1, :8])[:, 0]]
        alone += [session.decode(input_ids[row : row + 1, position]) for position in (8, 9)]
        for ours, theirs in zip(alone, together, strict=True):
            np.testing.assert_allclose(ours[0], theirs[row], atol=3e-2)  # another batch size may have other kernels
    session.close()


@pytest.mark.gpu
def test_plan_reaches_its_bounds_and_refuses_what_is_beyond(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    session = loaded(options, tiny_checkpoint, tmp_path / "bundle")
    assert (session.max_length, session.vocab_size) == (96, 512)
    tokens = np.random.default_rng(3).integers(0, 512, (4, 97))
    assert session.prefill(tokens[:, :64], num_logits=64).shape == (4, 64, 512)
    for position in range(64, 96):
        assert np.isfinite(session.decode(tokens[:, position])).all()
    with pytest.raises(ValueError, match="at most 96 tokens"):
        session.decode(tokens[:, 96])
    with pytest.raises(ValueError, match="at most 64 tokens; got 65"):
        session.prefill(tokens[:, :65])
    with pytest.raises(ValueError, match="at most 4 sequences at once; got 5"):
        session.prefill(np.zeros((5, 8), dtype=np.int64))
    session.close()


@pytest.mark.gpu
def test_compiled_kernels_are_kept_for_the_next_session(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    if options["library"] != "tensorrt_rtx":
        pytest.skip("enterprise TensorRT compiles no kernels at load")
    cache = tmp_path / "kernels"
    session = loaded(options | {"runtime_cache": str(cache)}, tiny_checkpoint, tmp_path / "bundle")
    prompt = np.random.default_rng(4).integers(0, 512, (1, 8))
    first = session.prefill(prompt)
    session.close()
    assert cache.stat().st_size > 0
    session = TensorRT.model_validate(options | {"runtime_cache": str(cache)}).load(tmp_path / "bundle", threads=1)
    np.testing.assert_array_equal(session.prefill(prompt), first)
    session.close()


@pytest.mark.gpu
def test_timings_are_kept_for_the_next_build(options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    if options["library"] != "tensorrt":
        pytest.skip("TensorRT for RTX times nothing when it builds")
    cache = tmp_path / "timings"
    for bundle in ("first", "second"):
        loaded(options | {"timing_cache": str(cache)}, tiny_checkpoint, tmp_path / bundle).close()
        assert cache.stat().st_size > 0


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_plan_whose_weights_can_change_answers_like_one_whose_cannot(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path, option: str
) -> None:
    plain = loaded(options, tiny_checkpoint, tmp_path / "plain")
    other = loaded(options | {option: True}, tiny_checkpoint, tmp_path / "other")
    windows = np.random.default_rng(5).integers(0, 512, (2, 16))
    assert compare(other, plain, windows).max_abs_error < 3e-2  # float16 over four layers
    plain.close()
    other.close()


@pytest.mark.gpu
def test_refitted_plan_answers_with_the_other_weights(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """As docs/tensorrt.md has it."""
    from safetensors.numpy import load_file, save_file

    other = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    weights = load_file(other / "model.safetensors")
    changed = {name: 1.2 * value if "mlp" in name else value for name, value in weights.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    expected = loaded(options, other, tmp_path / "expected")
    bundle = tmp_path / "bundle"
    loaded(options | {"refit": True}, tiny_checkpoint, bundle).close()

    tensorrt = import_library(options["library"])
    _runtime, engine = open_plan(tensorrt, (bundle / "model.plan").read_bytes(), host_code=False)
    export_decoder(read_decoder(other), tmp_path / "new.onnx", precision="float16", max_length=options["max_length"])
    refit_engine(tensorrt, engine, tmp_path / "new.onnx")
    config = engine.create_serialization_config()
    config.clear_flag(tensorrt.SerializationFlag.EXCLUDE_WEIGHTS)
    (bundle / "model.plan").write_bytes(engine.serialize_with_config(config))

    refitted = TensorRT.model_validate(options | {"refit": True}).load(bundle, threads=1)
    windows = np.random.default_rng(6).integers(0, 512, (2, 16))
    assert compare(refitted, expected, windows).max_abs_error < 3e-2  # float16 over four layers
    expected.close()
    refitted.close()
