"""Carrying the integers of a quantized source over, from the source's file to the engine's bundle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.calibration.checkpoints import import_checkpoint, load_model
from tasks.calibration.source_quantization import DESCRIPTION, FOLDER
from tasks.engines.onnxruntime import OnnxRuntime
from tasks.engines.openvino import OpenVino
from tasks.engines.parity import compare
from tasks.engines.pytorch import PyTorch
from tasks.engines.tensorrt import TensorRT
from tasks.quantization import Activations, FromSource, Gptq, Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight, read_weights
from tasks.quantization.source_weights import from_gguf

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
UP = "model.layers.1.mlp.up_proj"
INT4 = Grid(bits=4, group_size=32)


def imported(source: Path, tmp_path: Path) -> Path:
    out = tmp_path / "imported"
    out.mkdir()
    import_checkpoint(source=str(source), out=out)
    return out


def carried(checkpoint: Path, tmp_path: Path, method=FromSource(), name="carried"):  # noqa: B008
    out = tmp_path / name
    out.mkdir()
    return out, quantize_checkpoint(checkpoint=checkpoint, data=tmp_path, method=method, out=out)


def logits(checkpoint: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(checkpoint)(torch.arange(3, 40)[None]).logits


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path, write_gguf: Callable[..., None]) -> Callable[..., Path]:
    """Imports a GGUF of the tiny Llama with matrices of the types given by patterns."""

    def make(kinds: dict[str, str]) -> Path:
        write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", kinds=kinds)
        return imported(tmp_path / "tiny.gguf", tmp_path)

    return make


def test_a_block_by_hand() -> None:
    """d = -0.5 and the bytes 0x80, 0x91, …: low halves 0, 1, … are the first 16 integers, high ones the others."""
    low = np.arange(16, dtype=np.uint8)
    high = np.array([8, 9, *[8] * 14], dtype=np.uint8)
    block = np.concatenate([np.array([-0.5], "<f2").view(np.uint8), low | high << 4])
    weight = from_gguf(block[None], "Q4_0")
    assert weight.integers.tolist() == [[*range(-8, 8), 0, 1, *[0] * 14]]
    assert weight.scale.tolist() == [[-0.5]]
    assert weight.zero_point is None
    assert weight.dequantize()[0, :2].tolist() == [4.0, 3.5]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_mean_what_gguf_says_they_do(kind: str) -> None:
    """Bit by bit, also for blocks that no quantizer writes: any scale, offset and integers."""
    random = np.random.default_rng(0)
    width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = random.integers(0, 256, (24, 4, width), dtype=np.uint8)
    halves = random.normal(size=(24, 4, 2)).astype("<f2")
    halves[0, 0], halves[1, 1] = (0, 0.25), (-0.0, 3)  # a scale of zero
    blocks[:, :, :4] = halves.view(np.uint8)
    if kind in ("Q4_0", "Q5_0", "Q8_0"):
        blocks[:, :, 2:4] = random.integers(0, 256, (24, 4, 2))
    rows = blocks.reshape(24, -1)
    weight = from_gguf(rows, kind)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(weight.dequantize(), expected)
    assert np.isfinite(weight.scale).all()
    assert (weight.scale != 0).all()
    assert (weight.zero_point is None) == (kind in ("Q4_0", "Q5_0", "Q8_0"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_is_carried_over_to_the_engine(
    kind: str, tiny_checkpoint: Path, tmp_path: Path, source: Callable[..., Path]
) -> None:
    table = "Q8_0" if kind.endswith("_1") else kind
    floats = source({"model.embed_tokens.weight": table, "*": kind})
    out, summary = carried(floats, tmp_path)

    weights, original = read_weights(out), load_file(tiny_checkpoint / "model.safetensors")
    for name in (f"{UP}.weight", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        weight = weights[name]
        assert isinstance(weight, QuantizedWeight)
        its = gguf.GGMLQuantizationType[table if "embed" in name else kind]
        blocks = gguf.quants.quantize(original[name].numpy(), its)
        assert np.array_equal(weight.dequantize(), gguf.quants.dequantize(blocks, its)), name
        assert weight.group_size == 32
    assert all(np.array_equal(w, original[n].numpy()) for n, w in weights.items() if isinstance(w, np.ndarray))
    assert summary.relative_error == 0
    assert summary.notes == []
    assert summary.left_float == {}
    per_weight = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5}  # as in GGUF
    assert {layer.bits_per_weight for layer in summary.layers} == {per_weight[kind], per_weight[table]}
    torch.testing.assert_close(logits(out), logits(floats), rtol=0, atol=1e-4 if kind.endswith("_1") else 0)

    reference = PyTorch().load(floats, threads=1)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 24))
    for engine in (
        OnnxRuntime(precision="float32", activations="float32"),
        OpenVino(precision="float32", activations="float32", kv_cache="float32"),
    ):
        bundle = tmp_path / f"bundle-{engine.engine}"
        bundle.mkdir()
        engine.compile(out, bundle)
        session = engine.load(bundle, threads=1)
        parity = compare(session, reference, tokens)
        session.close()
        assert parity.max_abs_error < 5e-3, (engine.engine, parity)
        assert parity.top1_agreement == 1, (engine.engine, parity)


@pytest.mark.parametrize("kind", KINDS)
def test_integer_products_of_a_gguf_stay_near(kind: str, tmp_path: Path, source: Callable[..., Path]) -> None:
    floats = source({"model.embed_tokens.weight": "Q8_0", "*": kind})
    out, _ = carried(floats, tmp_path)
    engine, bundle = OnnxRuntime(precision="float32"), tmp_path / "bundle"
    bundle.mkdir()
    engine.compile(out, bundle)
    session, reference = engine.load(bundle, threads=1), PyTorch().load(floats, threads=1)
    parity = compare(session, reference, np.random.default_rng(0).integers(0, 512, (2, 24)))
    session.close()
    assert parity.kl_nats < 1e-3


def test_rows_of_qwen_stay_in_their_order(
    family_checkpoint: Callable[..., Path], tmp_path: Path, write_gguf: Callable[..., None]
) -> None:
    write_gguf(family_checkpoint("qwen2"), tmp_path / "tiny.gguf", kinds={"*": "Q4_0"})
    floats = imported(tmp_path / "tiny.gguf", tmp_path)
    out, summary = carried(floats, tmp_path)
    assert summary.relative_error == 0
    assert {"model.embed_tokens", "lm_head"} < {layer.name for layer in summary.layers}
    assert torch.equal(logits(out), logits(floats))


@pytest.mark.parametrize(
    "method",
    [
        RoundToNearest(weights=INT4, embeddings=Grid(group_size=None)),
        RoundToNearest(weights=Grid(bits=8, symmetric=False), embeddings=None, ignore=("*.0.*",)),
        RoundToNearest(weights=Grid(bits=4, symmetric=False, group_size=32, zero_point="real")),
        FromSource,
    ],
    ids=["int4", "int8 asymmetric, some float", "real zero points", "bfloat16 scales"],
)
def test_compressed_tensors_are_carried_over(tiny_checkpoint: Path, tmp_path: Path, method) -> None:
    halves = method is FromSource
    theirs, _ = carried(tiny_checkpoint, tmp_path, RoundToNearest(weights=INT4) if halves else method, "theirs")
    if halves:  # as llm-compressor stores those of a bfloat16 model
        tensors = load_file(theirs / "model.safetensors")
        for name in tensors:
            if name.endswith("_scale"):
                tensors[name] = tensors[name].bfloat16()
        save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    floats = imported(theirs, tmp_path)
    out, summary = carried(floats, tmp_path)
    before, after = read_weights(theirs), read_weights(out)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        found = after[name]
        if isinstance(weight, np.ndarray):
            assert np.array_equal(weight, found), name
            continue
        assert isinstance(found, QuantizedWeight)
        assert (found.bits, found.group_size) == (weight.bits, weight.group_size)
        assert np.array_equal(found.integers, weight.integers), name
        assert np.array_equal(found.scale, weight.scale)
        assert np.array_equal(found.dequantize(), weight.dequantize())
    assert summary.relative_error < 1e-7
    assert torch.equal(logits(out), logits(theirs))


def test_a_changed_weight_is_refused_by_name(tmp_path: Path, source: Callable[..., Path]) -> None:
    floats = source({"*": "Q4_0"})
    tensors = load_file(floats / "model.safetensors")
    tensors[f"{UP}.weight"][3, :5] += 1e-3
    save_file(tensors, floats / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{UP} must be as it was imported .*; 5 of its 8192 weights .*GGUF Q4_0"):
        carried(floats, tmp_path)


def test_a_float_source_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"keeps no integers of one: it came as floats, .* Use `method: rtn` or `gptq`"
    ):
        carried(imported(tiny_checkpoint, tmp_path), tmp_path)


def test_forms_that_cannot_be_carried_are_refused_or_rounded(tmp_path: Path, source: Callable[..., Path]) -> None:
    """Two of them: a type of GGUF with scales of two levels, and a table with real zero points."""
    floats = source({"model.embed_tokens.weight": "Q4_1", "*": "Q8_0"})
    description = floats / FOLDER / DESCRIPTION
    record = json.loads(description.read_text())
    record["types"][f"{UP}.weight"] = "Q6_K"  # gguf has no quantizer for it
    description.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"2 of 29 quantized layers .* first is {UP} \(GGUF Q6_K\): its scales are"):
        carried(floats, tmp_path)
    with pytest.raises(ValueError, match=r"1 of 25 .* first is model\.embed_tokens \(GGUF Q4_1\): .* no real zero"):
        carried(floats, tmp_path, FromSource(ignore=("*.up_proj",)), "ignored")
    _, summary = carried(floats, tmp_path, FromSource(otherwise=INT4), "otherwise")
    errors = {layer.name: layer.relative_error for layer in summary.layers}
    assert {name for name, error in errors.items() if error} == {UP, "model.embed_tokens"}
    (note,) = summary.notes
    assert note.startswith("The source was quantized (GGUF Q4_1, GGUF Q6_K); re-quantizing 2 of its layers")


def test_layers_that_are_ignored_or_floats_stay_floats(tmp_path: Path, source: Callable[..., Path]) -> None:
    floats = source({"*.v_proj.weight": "F32", "*": "Q4_0"})
    out, summary = carried(floats, tmp_path, FromSource(ignore=("model.layers.0.*",), otherwise=INT4))
    weights = read_weights(out)
    kept = {name.removesuffix(".weight") for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
    assert kept == {layer.name for layer in summary.layers}
    assert not any(name.startswith("model.layers.0.") or "v_proj" in name for name in kept)
    assert len(summary.left_float) == 7 + 3
    with pytest.raises(ValueError, match="has none of these layers quantized"):
        carried(floats, tmp_path, FromSource(ignore=("*.[qko]_proj", "*.mlp.*", "*embed*", "lm_head")), "none")


@pytest.mark.parametrize("method", [RoundToNearest(weights=INT4), Gptq(weights=INT4)], ids=["rtn", "gptq"])
def test_the_summary_says_what_another_method_cost(method, tmp_path: Path, source: Callable[..., Path]) -> None:
    floats = source({"*": "Q4_0"})
    np.save(tmp_path / "calibration.npy", np.random.default_rng(0).integers(0, 512, (12, 32)).astype(np.int32))
    _, summary = carried(floats, tmp_path, method)
    (note,) = (note for note in summary.notes if "re-quantizing" in note)
    assert note == (
        "The source was quantized (GGUF Q4_0); re-quantizing 29 of its layers changed their weights by "
        f"{summary.relative_error:.2%} (relative error)."
    )


def test_what_loses_nothing_costs_nothing(tmp_path: Path, source: Callable[..., Path]) -> None:
    floats = source({"*": "Q8_0"})
    _, summary = carried(floats, tmp_path, RoundToNearest(weights=Grid(group_size=32), embeddings=Grid(group_size=32)))
    assert summary.notes == []


def test_the_kept_integers_do_not_count_as_the_models_size(
    tiny_checkpoint: Path, tmp_path: Path, write_gguf: Callable[..., None]
) -> None:
    write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", kinds={"*": "Q4_0"})
    out = tmp_path / "out"
    out.mkdir()
    summary = import_checkpoint(source=str(tmp_path / "tiny.gguf"), out=out)
    shutil.rmtree(out / FOLDER)
    assert summary.size_bytes == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def test_tensorrt_refuses_negative_scales_of_8_bits(tmp_path: Path, source: Callable[..., Path]) -> None:
    pytest.importorskip("tensorrt_rtx")
    out, _ = carried(source({"model.embed_tokens.weight": "Q8_0", "*": "Q5_0"}), tmp_path)
    engine = TensorRT(precision="float16", max_length=64, max_prompt=32)
    with pytest.raises(ValueError, match=r"layer 0's q has scales down to -0\.\d+, as `full_range` and GGUF's Q5_0"):
        engine.compile(out, tmp_path)


def test_tables_of_other_layers_have_integer_zero_points() -> None:
    with pytest.raises(ValueError, match="the `zero_point` of `otherwise` must be integer"):
        FromSource(otherwise=Grid(bits=4, symmetric=False, zero_point="real"))
    with pytest.raises(ValueError, match="`otherwise` must be of integers"):
        FromSource(otherwise=Grid(format="float8_e4m3"))


def test_rounded_inputs_of_the_source_are_left_out_and_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "calibration.npy", np.random.default_rng(0).integers(0, 512, (20, 32)).astype(np.int32))
    method = RoundToNearest(embeddings=None, activations=Activations(static=("*",)))
    theirs, _ = carried(tiny_checkpoint, tmp_path, method, "theirs")
    out, summary = carried(imported(theirs, tmp_path), tmp_path)
    before, after = (read_weights(each)[f"{UP}.weight"] for each in (theirs, out))
    assert isinstance(before, QuantizedWeight)
    assert isinstance(after, QuantizedWeight)
    assert np.array_equal(before.integers, after.integers)
    assert (before.inputs is not None, after.inputs) == (True, None)
    assert summary.notes == ["The source rounds the inputs of linear layers too; that is not carried over."]


def test_floats_of_8_bits_are_rounded_or_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    method = RoundToNearest(weights=Grid(format="float8_e4m3"), embeddings=None)
    theirs, _ = carried(tiny_checkpoint, tmp_path, method, "theirs")
    floats = imported(theirs, tmp_path)
    with pytest.raises(
        ValueError, match=r"28 of 28 .*compressed-tensors float8\): its floats of 8 bits are no integers"
    ):
        carried(floats, tmp_path)
    _, summary = carried(floats, tmp_path, FromSource(otherwise=Grid()), "otherwise")
    assert "re-quantizing 28 of its layers" in summary.notes[0]
