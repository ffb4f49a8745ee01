"""The ONNX Runtime graph against PyTorch on the same weights, and its integers against the checkpoint's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from pydantic import ValidationError
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tasks.engines import onnxruntime_graph
from tasks.engines.decoder import Decoder, Layer, Weight, read_decoder
from tasks.engines.onnxruntime import CACHE_STEP, OnnxRuntime, OnnxRuntimeSession, session_options
from tasks.engines.onnxruntime_graph import GRAPH_FILE, WEIGHTS_FILE
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.activations import Inputs, per_token
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight
from tests.tasks.engines.tiny_families import reference, tokens

EXACT = OnnxRuntime(precision="float32", activations="float32")
FAST = OnnxRuntime(precision="float32")
FLOAT32_ERROR = 1e-4  # logits are below 5; float32 sums in another order
GRIDS = {
    "int8": Grid(bits=8),
    "int8 full range": Grid(bits=8, full_range=True),
    "uint8": Grid(bits=8, symmetric=False),
    "int8 groups": Grid(bits=8, group_size=16),
    "uint8 groups": Grid(bits=8, symmetric=False, group_size=32),
    "int4": Grid(bits=4, group_size=32),
    "int4 full range": Grid(bits=4, group_size=32, full_range=True),
    "uint4": Grid(bits=4, symmetric=False, group_size=16),
    "int4 rows": Grid(bits=4),
    "uint3": Grid(bits=3, symmetric=False, group_size=64),
    "int6": Grid(bits=6),
    "uint4 real zero points": Grid(bits=4, symmetric=False, group_size=32, zero_point="real"),
    "uint8 rows, real zero points": Grid(bits=8, symmetric=False, zero_point="real"),
}


def quantized(checkpoint: Path, out: Path, grid: Grid, ignore: tuple[str, ...] = ()) -> Path:
    out.mkdir()
    embeddings = grid.model_copy(update={"zero_point": "integer"})
    method = RoundToNearest(weights=grid, embeddings=embeddings, ignore=ignore)
    quantize_checkpoint(checkpoint=checkpoint, data=checkpoint, method=method, out=out)
    return out


def compiled(checkpoint: Path, out: Path, options: OnnxRuntime = EXACT) -> OnnxRuntimeSession:
    out.mkdir()
    options.compile(checkpoint, out)
    return options.load(out, threads=1)


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeSession:
    return compiled(tiny_checkpoint, tmp_path_factory.mktemp("float") / "bundle")


def test_logits_are_those_of_pytorch(tiny_checkpoint: Path, session: OnnxRuntimeSession) -> None:
    input_ids = tokens(3, 40)

    logits = session.prefill(input_ids, num_logits=40)

    assert logits.shape == (3, 40, 512)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference(tiny_checkpoint, input_ids), atol=FLOAT32_ERROR, rtol=0)


@pytest.mark.parametrize("start", [1, 30, 255])
def test_decoding_continues_the_prompt_as_one_longer_prompt_would(start: int, session: OnnxRuntimeSession) -> None:
    """From 255, the cache is full after one token, and grows."""
    input_ids = tokens(3, start + 6)
    together = session.prefill(input_ids, num_logits=start + 6)

    first = session.prefill(input_ids[:, :start])
    steps = [session.decode(input_ids[:, position]) for position in range(start, start + 6)]

    np.testing.assert_allclose(np.stack([first[:, 0], *steps], 1), together[:, start - 1 :], atol=FLOAT32_ERROR, rtol=0)


def test_tokens_appended_together_and_after_others_were_forgotten_are_read_as_one_prompt(
    session: OnnxRuntimeSession,
) -> None:
    """The forgotten ones outgrew the cache's room."""
    input_ids, prompt = tokens(1, CACHE_STEP + 12), CACHE_STEP - 2
    expected = session.prefill(input_ids, 5)
    session.prefill(input_ids[:, :8])
    session.append(input_ids[:, 8:prompt])
    session.append(tokens(1, 7, seed=1), 7)
    session.rewind(prompt)
    session.append(input_ids[:, prompt:-5])
    np.testing.assert_allclose(session.append(input_ids[:, -5:], 5), expected, atol=FLOAT32_ERROR, rtol=0)


def test_a_prompt_knows_nothing_of_the_one_before(session: OnnxRuntimeSession) -> None:
    fresh = session.prefill(tokens(2, 12))
    for batch_size, length in ((2, 30), (5, 30), (2, 300)):
        session.prefill(tokens(batch_size, length, seed=1))
        session.decode(tokens(batch_size, 1, seed=2)[:, 0])
        np.testing.assert_allclose(session.prefill(tokens(2, 12)), fresh, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_logits", [1, 5])
def test_only_the_last_positions_are_computed_when_asked(num_logits: int, session: OnnxRuntimeSession) -> None:
    every = session.prefill(tokens(2, 12), num_logits=12)

    last = session.prefill(tokens(2, 12), num_logits=num_logits)

    assert last.shape == (2, num_logits, 512)
    np.testing.assert_allclose(last, every[:, -num_logits:], atol=FLOAT32_ERROR, rtol=0)


def test_logits_are_not_overwritten_by_the_next_call(session: OnnxRuntimeSession) -> None:
    session.prefill(tokens(2, 12))
    first = session.decode(tokens(2, 1)[:, 0])
    kept = first.copy()
    session.decode(tokens(2, 1, seed=3)[:, 0])

    np.testing.assert_array_equal(first, kept)


def test_a_sequence_is_refused_beyond_max_length(tiny_checkpoint: Path, tmp_path: Path) -> None:
    short = compiled(tiny_checkpoint, tmp_path / "short", OnnxRuntime(precision="float32", max_length=10))
    assert short.max_length == 10
    with pytest.raises(ValueError, match="at most 10 tokens; got 11"):
        short.prefill(tokens(1, 11))
    short.prefill(tokens(1, 9))
    assert np.isfinite(short.decode(tokens(1, 1)[:, 0])).all()
    with pytest.raises(ValueError, match="it has 10 and got one more"):
        short.decode(tokens(1, 1)[:, 0])


def test_max_length_is_at_most_the_models(session: OnnxRuntimeSession) -> None:
    assert session.max_length == 512


def test_a_step_must_continue_the_last_prompt(tiny_checkpoint: Path, tmp_path: Path) -> None:
    fresh = compiled(tiny_checkpoint, tmp_path / "fresh")
    with pytest.raises(ValueError, match="each of the 0 sequences"):
        fresh.decode(tokens(1, 1)[:, 0])
    fresh.prefill(tokens(3, 4))
    with pytest.raises(ValueError, match=r"each of the 3 sequences.*got \[2\]"):
        fresh.decode(tokens(2, 1)[:, 0])


@pytest.mark.parametrize("name", GRIDS)
def test_quantized_weights_compute_what_pytorch_computes_with_them(
    name: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", GRIDS[name])
    input_ids = tokens(2, 20)
    expected = reference(checkpoint, input_ids)

    exact = compiled(checkpoint, tmp_path / "exact").prefill(input_ids, 20)
    fast = compiled(checkpoint, tmp_path / "fast", FAST).prefill(input_ids, 20)

    np.testing.assert_allclose(exact, expected, atol=FLOAT32_ERROR, rtol=0)
    # per channel above 4 bits, inputs of 16 bits; else of 8 bits, off by 1/254 of the largest in their block
    grid = GRIDS[name]
    by_position = grid.group_size is None and grid.bits > 4 and grid.zero_point == "integer"
    tolerance = 0.002 if by_position else 0.15
    assert 0 < np.abs(fast - expected).max() < tolerance * np.abs(expected).max()


def test_layers_left_alone_stay_float_beside_quantized_ones(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Neighbours on different grids cannot be stacked: v and up are float here, q, k and gate are not."""
    ignore = ("*.1.self_attn.v_proj", "*.2.mlp.up_proj")
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", Grid(bits=8), ignore)
    mixed = compiled(checkpoint, tmp_path / "mixed")
    input_ids = tokens(2, 20)

    np.testing.assert_allclose(mixed.prefill(input_ids, 20), reference(checkpoint, input_ids), atol=FLOAT32_ERROR)


def stored_integers(bundle: Path) -> dict[str, np.ndarray]:
    """Every quantized product's integers [out, in] by the name of its node, as signed or unsigned as the graph says."""
    graph = onnx.load(bundle / GRAPH_FILE).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]].T
        if node.op_type == "MatMulIntegerToFloat":
            found[node.input[1].removesuffix(".columns")] = values[node.input[1]].T
        if node.op_type == "MatMulNBits":
            bits = next(a.i for a in node.attribute if a.name == "bits")
            packed = values[node.input[1]]
            halves = [packed] if bits == 8 else [packed & 15, packed >> 4]
            rows = np.stack(halves, axis=-1).reshape(len(packed), -1).astype(np.int16)
            asymmetric = len(node.input) > 3 and node.input[3] != ""
            found[node.input[1].removesuffix(".integers")] = rows if asymmetric else rows - (1 << (bits - 1))
    return found


def checkpoint_integers(decoder: Decoder) -> dict[str, np.ndarray]:
    def stacked(layer: Layer, names: tuple[str, ...]) -> np.ndarray:
        return np.concatenate([integers(getattr(layer, name)) for name in names])

    def integers(weight: Weight) -> np.ndarray:
        assert isinstance(weight, QuantizedWeight)
        if weight.has_real_zero_point:  # counted from the middle, which the graph adds to the offsets
            return weight.integers.astype(np.int16) - (1 << (weight.bits - 1))
        return weight.integers

    parts = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
    return {"embedding": integers(decoder.embedding)} | {
        f"layers.{index}.{name}": stacked(layer, members)
        for index, layer in enumerate(decoder.layers)
        for name, members in parts.items()
    }


@pytest.mark.parametrize("name", GRIDS)
def test_integers_are_exactly_the_checkpoints(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", GRIDS[name])
    FAST.compile(checkpoint, tmp_path)

    stored, expected = stored_integers(tmp_path), checkpoint_integers(read_decoder(checkpoint))

    assert stored.keys() == expected.keys()
    for product, integers in expected.items():
        np.testing.assert_array_equal(stored[product], integers, err_msg=product)


def test_weights_are_stored_at_their_quantized_size_and_a_tied_table_once(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", Grid(bits=8))
    FAST.compile(checkpoint, tmp_path)
    tensors = onnx.load(tmp_path / GRAPH_FILE, load_external_data=False).graph.initializer
    stored = sum(int(e.value) for tensor in tensors for e in tensor.external_data if e.key == "length")

    num_quantized = 512 * 64 + 4 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    rows = 512 + 4 * (64 * 2 + 32 * 2 + 128 * 2 + 64)
    floats = 9 * 64 + 2 * 512 * 8  # norms, rotary tables
    assert stored == num_quantized + 4 * (rows + floats)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < stored + 4096 * len(tensors)


def test_compiling_twice_writes_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", Grid(bits=4, group_size=32))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        FAST.compile(checkpoint, tmp_path / name)

    for file in (GRAPH_FILE, WEIGHTS_FILE):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_positions_of_zeros_and_of_outliers_survive_integer_products(tmp_path: Path) -> None:
    """x = scale (high + low / 254): a row of zeros has no scale, and 1000 beside 0.01 needs both halves."""
    rng = np.random.default_rng(0)
    integers = rng.integers(-127, 128, (48, 32)).astype(np.int8)
    weight = QuantizedWeight(integers, np.full((48, 1), 0.01, np.float32), None, 8, None)
    with (tmp_path / WEIGHTS_FILE).open("wb") as file:
        graph = onnxruntime_graph._GraphWriter(file, "int8")
        graph.constant("rest", np.array([-1]))
        graph.linear("product", [weight], [None], "x")
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "product",
            [onnx.helper.make_tensor_value_info("x", 1, ["rows", 1, 32])],
            [onnx.helper.make_tensor_value_info("product", 1, ["rows", 1, 48])],
            graph.initializers,
        ),
        opset_imports=[onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "model.onnx")
    x = rng.normal(size=(4, 1, 32)).astype(np.float32)
    x[1] = 0
    x[2, 0, 5] = 1000
    x[3] *= 1e-30

    (y,) = onnxruntime.InferenceSession(tmp_path / "model.onnx", session_options(1)).run(None, {"x": x})

    expected = x @ weight.dequantize().T
    assert (y[1] == 0).all()
    # every input is off by at most max |x| / 64516, every weight at most 1.27
    bound = np.abs(x).max(-1, keepdims=True) / 64516 * np.abs(weight.dequantize()).sum(1) + 1e-6 * np.abs(expected)
    assert (np.abs(y - expected) <= bound).all()


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mistral with a window": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", [None, Grid(bits=8), Grid(bits=4, group_size=32)])
def test_other_families_compute_what_pytorch_computes(family: str, grid: Grid | None, tmp_path: Path) -> None:
    configuration, model_class, options = FAMILIES[family]
    torch.manual_seed(1)
    model = model_class(
        configuration(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            **options,
        )
    )
    with torch.no_grad():  # biases and gains that matter
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    checkpoint = tmp_path / "float"
    model.save_pretrained(checkpoint)
    if grid:
        checkpoint = quantized(checkpoint, tmp_path / "quantized", grid)
    input_ids = tokens(2, 24)
    expected = reference(checkpoint, input_ids)
    session = compiled(checkpoint, tmp_path / "bundle")

    np.testing.assert_allclose(session.prefill(input_ids, 24), expected, atol=2 * FLOAT32_ERROR, rtol=0)
    session.prefill(input_ids[:, :20])
    for position in range(20, 24):
        step = session.decode(input_ids[:, position])
        np.testing.assert_allclose(step, expected[:, position], atol=2 * FLOAT32_ERROR, rtol=0)


def test_groups_onnx_runtime_cannot_hold_are_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", Grid(bits=4, group_size=8))
    with pytest.raises(ValueError, match="divisible by 16; got 8 of 64"):
        FAST.compile(checkpoint, tmp_path)


def test_precision_must_be_named() -> None:
    with pytest.raises(ValidationError, match="precision"):
        OnnxRuntime()  # type: ignore[call-arg]


def test_facts_say_what_multiplies(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", Grid(bits=8))
    facts = compiled(checkpoint, tmp_path / "bundle", FAST).facts

    assert facts["products"] == "17 MatMulIntegerToFloat"
    assert facts["provider"] == "CPUExecutionProvider"
    assert json.loads(json.dumps(facts)) == facts


def test_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FAST.missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    assert "pip install 'slimline[onnxruntime]'" in str(FAST.missing())


def rounded(checkpoint: Path, tmp_path: Path, **options: Any) -> Path:
    out, data = tmp_path / "w8a8", tmp_path / "data"
    out.mkdir()
    data.mkdir()
    np.save(data / "calibration.npy", tokens(16, 32).astype(np.int32))
    method = RoundToNearest.model_validate({"embeddings": None} | options)
    quantize_checkpoint(checkpoint=checkpoint, data=data, method=method, out=out)
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("options", [EXACT, FAST])
def test_static_inputs_are_rounded_as_the_checkpoint_says(
    symmetric: bool, options: OnnxRuntime, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    activations = {"static": ["*"], "symmetric": symmetric, "ignore": ["*.3.mlp.up_proj"], "range": "moving-average"}
    checkpoint = rounded(tiny_checkpoint, tmp_path, activations=activations, ignore=["*.3.mlp.up_proj"])
    input_ids = tokens(2, 24, seed=1)

    logits = compiled(checkpoint, tmp_path / "bundle", options).prefill(input_ids, num_logits=24)

    np.testing.assert_allclose(logits, reference(checkpoint, input_ids), atol=FLOAT32_ERROR, rtol=0)


def test_inputs_per_token_are_rounded_to_8_bits_and_no_more(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of the largest input of a token, x / scale = 127.5: halfway, so the last bit of x decides between two integers.

    Hence within a step here or there, and nearer to the rounded model than that is to the unrounded one.
    """
    checkpoint = rounded(tiny_checkpoint, tmp_path, activations={})
    input_ids = tokens(4, 24, seed=1)
    expected, unrounded = reference(checkpoint, input_ids), reference(tiny_checkpoint, input_ids)

    logits = compiled(checkpoint, tmp_path / "bundle", FAST).prefill(input_ids, num_logits=24)

    assert np.abs(logits - expected).mean() < 0.5 * np.abs(expected - unrounded).mean()


def test_one_product_per_token_is_the_checkpoints_to_the_last_digit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((40, 1, 64)).astype(np.float32)
    x[3] = 0
    weight = QuantizedWeight(
        generator.integers(-127, 128, (48, 64), dtype=np.int8),
        np.full((48, 1), 0.01, np.float32),
        None,
        8,
        None,
        Inputs("int8"),
    )
    with (tmp_path / WEIGHTS_FILE).open("wb") as file:
        graph = onnxruntime_graph._GraphWriter(file, "int8")
        graph.constant("rest", np.array([-1]))
        graph.linear("y", [weight], [None], "x")
    value = onnx.helper.make_tensor_value_info
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "product",
            [value("x", onnx.TensorProto.FLOAT, ["tokens", 1, 64])],
            [value("y", onnx.TensorProto.FLOAT, ["tokens", 1, 48])],
            initializer=graph.initializers,
        ),
        opset_imports=[onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(onnxruntime_graph.MICROSOFT, 1)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / GRAPH_FILE)

    (y,) = onnxruntime.InferenceSession(tmp_path / GRAPH_FILE, session_options(1)).run(None, {"x": x})

    expected = per_token(torch.from_numpy(x), "int8").numpy() @ weight.dequantize().T
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert not y[3].any()


@pytest.mark.parametrize("start", [1, 30, 255])
def test_int8_kv_cache_is_that_of_pytorch_and_a_quarter_as_large(
    start: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = rounded(tiny_checkpoint, tmp_path, kv_cache="int8", ignore=["*.mlp.*"])
    input_ids = tokens(2, start + 4, seed=1)
    session = compiled(checkpoint, tmp_path / "bundle", EXACT)

    first = session.prefill(input_ids[:, :start])[:, 0]
    steps = [session.decode(input_ids[:, position]) for position in range(start, start + 4)]

    expected = reference(checkpoint, input_ids)[:, start - 1 :]
    close = np.abs(np.stack([first, *steps], 1) - expected)
    assert np.median(close) < FLOAT32_ERROR
    assert close.max() < 1e-2  # a key halfway between two integers goes to either
    session.prefill(input_ids[:1, :start])
    together = session.append(input_ids[:1, start:], 4)
    assert np.median(np.abs(together - expected[:1, 1:])) < FLOAT32_ERROR
    assert session.facts["kv_cache"] == "int8"
    assert {buffer.dtype for buffer in session._buffers} == {np.dtype(np.int8)}


def test_fp8_is_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = rounded(tiny_checkpoint, tmp_path, weights={"format": "float8_e4m3"})
    with pytest.raises(ValueError, match="no FP8 products; layer 0's q is float8_e4m3"):
        compiled(checkpoint, tmp_path / "bundle")
