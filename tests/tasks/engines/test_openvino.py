"""The OpenVINO graph against PyTorch on the same weights, and the compiled graph against what it is built to become."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from pydantic import ValidationError
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tasks.engines.decoder import read_decoder
from tasks.engines.openvino import OpenVino
from tasks.engines.openvino_graph import build_model
from tasks.engines.openvino_session import MODEL_FILE, OpenVinoSession
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight, StoredWeight, read_weights
from tests.tasks.engines.tiny_families import reference, tokens

EXACT = OpenVino(precision="float32", activations="float32", kv_cache="float32")
FLOAT32_ERROR = 1e-4  # logits are below 5; float32 sums in another order
GRIDS = {
    "int8": Grid(bits=8),
    "int8 full range": Grid(bits=8, full_range=True),
    "uint8": Grid(bits=8, symmetric=False),
    "int4": Grid(bits=4, group_size=32),
    "int4 full range": Grid(bits=4, group_size=32, full_range=True),
    "uint4": Grid(bits=4, symmetric=False, group_size=32),
    "uint4 real": Grid(bits=4, symmetric=False, group_size=32, zero_point="real"),
}
NUM_LAYERS = 4
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
VNNI = any(flag in CPU_FLAGS for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))
BFLOAT16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def element_type(grid: str) -> str:
    """OpenVINO's name of the integers of one of `GRIDS`."""
    return grid.split()[0].replace("int", "i").replace("ui", "u")


def quantized(checkpoint: Path, out: Path, grid: Grid) -> Path:
    out.mkdir()
    method = RoundToNearest(weights=grid, embeddings=grid.model_copy(update={"zero_point": "integer"}))
    quantize_checkpoint(checkpoint=checkpoint, data=checkpoint, method=method, out=out)
    return out


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("float")
    EXACT.compile(tiny_checkpoint, out)
    return out


@pytest.fixture
def session(bundle: Path) -> OpenVinoSession:
    return EXACT.load(bundle, threads=1)


def compiled_layers(bundle: Path, options: OpenVino) -> list[dict[str, str]]:
    """What each node of the executed graph is, by the plugin's own account."""
    layers: list[dict[str, str]] = []
    real = openvino.Core.compile_model

    def spy(core: openvino.Core, *arguments: Any) -> Any:
        compiled = real(core, *arguments)
        for node in compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            layers.append({key: info[key].astype(str) for key in ("layerType", "originalLayersNames")})
            layers[-1]["precision"] = info["runtimePrecision"].astype(str)
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino.Core, "compile_model", spy)
        options.load(bundle, threads=1)
    return layers


def constants(bundle: Path) -> dict[str, Any]:
    model = openvino.Core().read_model(bundle / MODEL_FILE)
    return {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}


def unpacked(constant: Any) -> np.ndarray:
    """The integers of a constant, two to a byte for i4 and u4, low half first."""
    kind = constant.get_element_type()
    if kind not in (openvino.Type.i4, openvino.Type.u4):
        return np.array(constant.data)
    stored = np.array(constant.data).reshape(-1).view(np.uint8)
    halves = np.stack([stored & 15, stored >> 4], axis=1).reshape(-1)[: int(np.prod(list(constant.shape)))]
    return (halves ^ 8).astype(np.int8) - 8 if kind == openvino.Type.i4 else halves


def test_logits_are_those_of_pytorch(tiny_checkpoint: Path, session: OpenVinoSession) -> None:
    input_ids = tokens(3, 40)
    logits = session.prefill(input_ids, num_logits=40)
    assert logits.shape == (3, 40, 512)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference(tiny_checkpoint, input_ids), atol=FLOAT32_ERROR, rtol=0)


def test_decoding_continues_the_prompt_as_one_longer_prompt_would(session: OpenVinoSession) -> None:
    input_ids = tokens(3, 40)
    together = session.prefill(input_ids, num_logits=40)
    first = session.prefill(input_ids[:, :30])
    np.testing.assert_allclose(first[:, 0], together[:, 29], atol=FLOAT32_ERROR, rtol=0)
    for position in range(30, 40):
        step = session.decode(input_ids[:, position])
        np.testing.assert_allclose(step, together[:, position], atol=FLOAT32_ERROR, rtol=0)


def test_a_prompt_knows_nothing_of_the_one_before(session: OpenVinoSession) -> None:
    fresh = session.prefill(tokens(2, 12))
    session.prefill(tokens(5, 30, seed=1))
    session.decode(tokens(5, 1, seed=2)[:, 0])
    np.testing.assert_array_equal(session.prefill(tokens(2, 12)), fresh)


@pytest.mark.parametrize(("before", "after"), [((1, 128), (4, 64)), ((1, 500), (32, 30))])
def test_more_and_shorter_sequences_than_before_have_room_for_their_scales(
    bundle: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """OpenVINO 2026.4 alone gives NaN."""
    options = OpenVino(precision="float32", kv_cache="uint8")
    used, fresh = options.load(bundle, threads=1), options.load(bundle, threads=1)
    used.prefill(tokens(*before))
    used.decode(tokens(before[0], 1)[:, 0])

    for session in (used, fresh):
        session.prefill(tokens(*after))
    for step in range(3):
        next_ids = tokens(after[0], 1, step)[:, 0]
        np.testing.assert_array_equal(used.decode(next_ids), fresh.decode(next_ids))


def test_only_the_last_positions_are_computed_when_asked(session: OpenVinoSession) -> None:
    every = session.prefill(tokens(2, 12), num_logits=12)
    for num_logits in (1, 5):
        last = session.prefill(tokens(2, 12), num_logits=num_logits)
        assert last.shape == (2, num_logits, 512)
        np.testing.assert_allclose(last, every[:, -num_logits:], atol=FLOAT32_ERROR, rtol=0)


def test_logits_are_not_overwritten_by_the_next_call(session: OpenVinoSession) -> None:
    first = session.prefill(tokens(2, 12))
    kept = first.copy()
    session.decode(tokens(2, 1, seed=1)[:, 0])
    np.testing.assert_array_equal(first, kept)


def test_what_does_not_fit_is_refused(session: OpenVinoSession) -> None:
    assert (session.vocab_size, session.max_length) == (512, 512)
    with pytest.raises(ValueError, match="0 sequences"):
        session.decode(np.array([1]))
    with pytest.raises(ValueError, match="at most 512 tokens; got 513"):
        session.prefill(tokens(1, 513))
    session.prefill(tokens(2, 512))
    with pytest.raises(ValueError, match="it has 512"):
        session.decode(np.array([1, 2]))
    with pytest.raises(ValueError, match="2 sequences"):
        session.decode(np.array([1]))


def test_left_padding_changes_nothing(bundle: Path) -> None:
    compiled = openvino.Core().compile_model(bundle / MODEL_FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    input_ids = tokens(1, 10)

    def run(padding: int) -> np.ndarray:
        length = padding + 10
        inputs = {
            "input_ids": np.pad(input_ids, ((0, 0), (padding, 0))),
            "attention_mask": (np.arange(length) >= padding).astype(np.int64)[None],
            "position_ids": np.maximum(np.arange(length) - padding, 0)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request = compiled.create_infer_request()
        logits: np.ndarray = request.infer(inputs)["logits"][:, padding:].copy()
        return logits

    np.testing.assert_allclose(run(padding=3), run(padding=0), atol=FLOAT32_ERROR, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_quantized_logits_are_those_of_the_dequantized_model(tiny_checkpoint: Path, tmp_path: Path, grid: str) -> None:
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", GRIDS[grid])
    EXACT.compile(checkpoint, tmp_path)
    logits = EXACT.load(tmp_path, threads=1).prefill(tokens(2, 20), num_logits=20)
    np.testing.assert_allclose(logits, reference(checkpoint, tokens(2, 20)), atol=FLOAT32_ERROR, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_file_holds_the_integers_of_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path, grid: str) -> None:
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", GRIDS[grid])
    EXACT.compile(checkpoint, tmp_path)
    stored = constants(tmp_path)
    weights = read_weights(checkpoint)
    integers = {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
    assert len(integers) == 7 * NUM_LAYERS + 1  # the LM head shares the embedding's
    for name, weight in integers.items():
        constant = stored[name]
        assert constant.get_element_type() == getattr(openvino.Type, element_type(grid))
        np.testing.assert_array_equal(unpacked(constant).reshape(weight.integers.shape), weight.integers)
        assert stored[name + "_scale"].get_element_type() == openvino.Type.f16
        np.testing.assert_array_equal(stored[name + "_scale"].data.reshape(weight.scale.shape), weight.scale)
        assert (weight.zero_point is None) == (name + "_zero_point" not in stored)
        if weight.has_real_zero_point:  # the middle of the integers; the rest is in the offsets
            assert unpacked(stored[name + "_zero_point"]).tolist() == [8]
            offset = stored[name.removesuffix(".weight") + ".offset"]
            assert offset.get_element_type() == openvino.Type.f16
            np.testing.assert_array_equal(offset.data, weight.offset)
        elif weight.zero_point is not None:
            points = unpacked(stored[name + "_zero_point"]).reshape(weight.zero_point.shape)
            np.testing.assert_array_equal(points, weight.zero_point)
    size_bytes = sum(weight.size_bits for weight in integers.values()) / 8
    floats_bytes = sum(weight.nbytes for weight in weights.values() if isinstance(weight, np.ndarray))
    assert (tmp_path / MODEL_FILE).with_suffix(".bin").stat().st_size < size_bytes + floats_bytes + 8192


def test_integers_of_odd_length_are_packed_in_order() -> None:
    from tasks.engines.openvino_graph import _integers

    values = np.arange(-7, 8, dtype=np.int8).reshape(3, 5)
    np.testing.assert_array_equal(unpacked(_integers(values, 4, [3, 5], "odd")), values.reshape(-1))
    for bits, kind in ((3, openvino.Type.i4), (6, openvino.Type.i8)):
        assert _integers(values, bits, [3, 5], "between").get_element_type() == kind


def test_scales_that_float16_cannot_hold_stay_float32(tiny_checkpoint: Path, tmp_path: Path) -> None:
    decoder = read_decoder(quantized(tiny_checkpoint, tmp_path / "checkpoint", GRIDS["int8"]))
    assert isinstance(decoder.embedding, QuantizedWeight)
    scale = decoder.embedding.scale * np.float32(1.0001)
    assert isinstance(decoder.embedding, StoredWeight)
    embedding = dataclasses.replace(decoder.embedding.in_memory(), scale=scale)
    openvino.save_model(build_model(dataclasses.replace(decoder, embedding=embedding)), tmp_path / MODEL_FILE, False)
    np.testing.assert_array_equal(constants(tmp_path)["model.embed_tokens.weight_scale"].data, scale)


@pytest.mark.parametrize("grid", [*GRIDS, None])
def test_the_plugin_fuses_every_part_of_the_graph(tiny_checkpoint: Path, tmp_path: Path, grid: str | None) -> None:
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", GRIDS[grid]) if grid else tiny_checkpoint
    EXACT.compile(checkpoint, tmp_path)
    layers = compiled_layers(tmp_path, OpenVino(precision="float32"))
    count = Counter(layer["layerType"] for layer in layers)
    assert count["PagedAttention"] == NUM_LAYERS
    assert count["RoPE"] == 2 * NUM_LAYERS
    assert count["RMS"] == 2 * NUM_LAYERS + 1
    offsets = 7 * NUM_LAYERS if grid and GRIDS[grid].zero_point == "real" else 0
    assert count["FullyConnected"] == 7 * NUM_LAYERS + 1 + offsets
    assert count["MatMul"] == 0
    assert count["Concatenation"] <= 2  # shapes and angles; the cache's own are in the attention
    kind = "f32" if grid is None else element_type(grid)
    products = Counter(layer["precision"] for layer in layers if layer["layerType"] == "FullyConnected")
    assert products == {kind: 7 * NUM_LAYERS + 1} | ({"f32": offsets} if offsets else {})
    assert kind in {layer["precision"] for layer in layers if layer["layerType"] == "Gather"}


def test_facts_are_what_the_compiled_graph_says(bundle: Path) -> None:
    exact = EXACT.load(bundle, threads=1).facts
    assert exact["inference_precision_hint"] == "f32"
    assert exact["dynamic_quantization_group_size"] == "0"
    assert (exact["key_cache_precision"], exact["value_cache_precision"]) == ("f32", "f32")
    assert exact["inference_num_threads"] == "1"
    fast = OpenVino(precision="bfloat16", kv_cache="uint8").load(bundle, threads=2).facts
    assert (fast["inference_precision_hint"], fast["inference_num_threads"]) == ("bf16" if BFLOAT16 else "f32", "2")
    assert fast["dynamic_quantization_group_size"] == "32"
    assert (fast["key_cache_precision"], fast["value_cache_precision"]) == ("u8", "u8")


@pytest.mark.parametrize("option", ["activations", "kv_cache", "precision"])
def test_a_cheaper_option_changes_the_logits_a_little(tiny_checkpoint: Path, tmp_path: Path, option: str) -> None:
    EXACT.compile(quantized(tiny_checkpoint, tmp_path / "checkpoint", GRIDS["int8"]), tmp_path)

    def run(options: OpenVino) -> np.ndarray:
        session = options.load(tmp_path, threads=1)
        session.prefill(tokens(1, 40))  # a prompt attends to its own keys before they are rounded into the cache
        return session.decode(np.array([7]))

    cheaper = {"activations": "int8", "kv_cache": "uint8", "precision": "bfloat16"}[option]
    exact, changed = run(EXACT), run(OpenVino(**{**EXACT.model_dump(), option: cheaper}))
    error = np.abs(changed - exact).max()
    if (option == "precision" and not BFLOAT16) or (option == "activations" and not VNNI):
        assert error == 0  # OpenVINO passes over what the processor has no instructions for
    else:
        assert 0 < error < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_runs_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr("tasks.engines.openvino._has_bfloat16", lambda: has)
    assert OpenVino(precision="float32").executable
    assert OpenVino(precision="bfloat16").executable is has
    problem = OpenVino(precision="bfloat16").cannot_run()
    assert problem is None if has else "this one does not, and would compute in float32" in str(problem)


def test_the_same_checkpoint_gives_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = quantized(tiny_checkpoint, tmp_path / "checkpoint", GRIDS["uint4"])
    files: list[dict[str, bytes]] = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        EXACT.compile(checkpoint, tmp_path / name)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    tokenizer = {f"openvino_{half}tokenizer.{kind}" for half in ("", "de") for kind in ("bin", "xml")}
    assert set(files[0]) == {"openvino_model.bin", "openvino_model.xml", *tokenizer}
    assert files[0] == files[1]
    assert not re.search(rb"20\d\d-\d\d-\d\d|" + str(tmp_path).encode(), files[0]["openvino_model.xml"])


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_agree_with_pytorch(tmp_path: Path, family: str) -> None:
    shape = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }
    torch.manual_seed(1)
    model = {
        "mistral": lambda: MistralForCausalLM(MistralConfig(**shape, sliding_window=8)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=32)),
    }[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # also biases and norms, which start at 0 and 1
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == family
    EXACT.compile(checkpoint, tmp_path)
    session = EXACT.load(tmp_path, threads=1)
    input_ids = tokens(2, 24)
    expected = reference(checkpoint, input_ids)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(session.prefill(input_ids, 24) / scale, expected / scale, atol=2e-5, rtol=0)
    session.prefill(input_ids[:, :20])
    for position in range(20, 24):
        step = session.decode(input_ids[:, position])
        np.testing.assert_allclose(step / scale, expected[:, position] / scale, atol=2e-5, rtol=0)


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValidationError, match="kv_cash"):
        OpenVino.model_validate({"precision": "float32", "kv_cash": "uint8"})
    with pytest.raises(ValidationError, match="precision"):
        OpenVino.model_validate({})


def test_a_machine_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EXACT.missing() is None
    assert EXACT.executable
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'slimline[openvino]'" in str(EXACT.missing())
    assert not EXACT.executable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": {}}, "layer 0's q is integers with rounded inputs"),
        ({"weights": {"format": "float8_e4m3"}}, "layer 0's q is FP8"),
        ({"kv_cache": "int8"}, "this checkpoint has int8 ones"),
    ],
)
def test_rounding_of_a_checkpoint_that_openvino_lacks_is_refused(
    options: dict[str, Any], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out, data = tmp_path / "w8a8", tmp_path / "data"
    out.mkdir()
    data.mkdir()
    np.save(data / "calibration.npy", tokens(16, 32).astype(np.int32))
    method = RoundToNearest.model_validate(options)
    quantize_checkpoint(checkpoint=tiny_checkpoint, data=data, method=method, out=out)
    with pytest.raises(ValueError, match=message):
        EXACT.compile(out, tmp_path)


def test_importing_openvino_reports_to_nobody() -> None:
    """In a process of its own: who imported the library before does not matter."""
    code = (
        "import tasks.engines, openvino, sys\n"
        "from openvino.tools.ovc import main\n"
        "assert main.tm.__name__ == 'openvino.tools.ovc.telemetry_stub', main.tm\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry.')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[3])
