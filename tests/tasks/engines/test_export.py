"""The portable graph, run by ONNX Runtime without its 8-bit activations, against PyTorch on the same weights."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tasks.engines import PyTorch
from tasks.engines.decoder import Decoder, floats, read_decoder
from tasks.engines.export import export_decoder
from tasks.quantization import RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight

MATRICES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
FLOAT32_ERROR = 2e-5  # logits are below 5; sums of 64 products in another order
FLOAT16_ERROR = 2e-2  # 2^-11 relative per operation, four layers


def quantize(weight: np.ndarray, bits: int, group_size: int | None, symmetric: bool) -> QuantizedWeight:
    out_features, in_features = weight.shape
    groups = weight.reshape(out_features, -1, group_size or in_features)
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        scale = np.abs(groups).max(-1) / largest
        scale[scale == 0] = 1  # the padding token's row
        integers = np.rint(groups / scale[..., None]).astype(np.int8)
        zero_point = None
    else:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scale = (high - low) / (2**bits - 1)
        scale[scale == 0] = 1
        zero_point = np.rint(-low / scale).astype(np.uint8)
        integers = np.clip(np.rint(groups / scale[..., None]) + zero_point[..., None], 0, 2**bits - 1).astype(np.uint8)
    return QuantizedWeight(
        integers=integers.reshape(weight.shape),
        scale=scale.astype(np.float32),
        zero_point=zero_point,
        bits=bits,
        group_size=group_size,
    )


def quantized(decoder: Decoder, bits: int, group_size: int | None, symmetric: bool) -> Decoder:
    embedding = quantize(decoder.embedding, bits, group_size, symmetric)
    layers = tuple(
        dataclasses.replace(
            layer, **{name: quantize(getattr(layer, name), bits, group_size, symmetric) for name in MATRICES}
        )
        for layer in decoder.layers
    )
    assert decoder.tied
    return dataclasses.replace(decoder, layers=layers, embedding=embedding, lm_head=embedding)


@torch.no_grad()
def pytorch_logits(checkpoint: Path, decoder: Decoder, input_ids: np.ndarray) -> np.ndarray:
    """What transformers computes from `checkpoint` with the weights of `decoder`."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.model.embed_tokens.weight.copy_(torch.from_numpy(floats(decoder.embedding)))
    for block, layer in zip(model.model.layers, decoder.layers, strict=True):
        for name, module in MATRICES.items():
            block.get_submodule(module).weight.copy_(torch.from_numpy(floats(getattr(layer, name))))
    return model(torch.from_numpy(input_ids)).logits.numpy()


class Graph:
    """The exported file, called with numpy arrays."""

    def __init__(
        self, decoder: Decoder, directory: Path, precision: Any = "float32", *, optimized: bool = True
    ) -> None:
        self.file = directory / "model.onnx"
        export_decoder(decoder, self.file, precision=precision, max_length=512)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32 activations
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(self.file, options, providers=["CPUExecutionProvider"])
        self.decoder, self.dtype = decoder, np.dtype(precision)

    def __call__(
        self,
        input_ids: np.ndarray,
        past: list[np.ndarray] | None = None,
        logit_indices: list[int] | None = None,
        attention_mask: np.ndarray | None = None,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        batch_size, length = input_ids.shape
        names = [f"past_key_values.{i}.{half}" for i in range(len(self.decoder.layers)) for half in ("key", "value")]
        if past is None:
            past = [np.zeros((batch_size, self.decoder.num_kv_heads, 0, self.decoder.head_dim), self.dtype)] * len(
                names
            )
        total = past[0].shape[2] + length
        mask = np.ones((batch_size, total), np.int64) if attention_mask is None else attention_mask
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -length:]
        feeds = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "logit_indices": np.arange(length) if logit_indices is None else np.array(logit_indices),
            **dict(zip(names, past, strict=True)),
        }
        logits, *present = self.session.run(None, feeds)
        return logits, present


@pytest.fixture(scope="module")
def input_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 512, (2, 12))


GRIDS = [
    None,
    *((bits, group_size, symmetric) for bits in (8, 4, 3) for group_size in (None, 32) for symmetric in (True, False)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_graph_equals_pytorch_on_the_same_weights(
    tiny_checkpoint: Path, tmp_path: Path, input_ids: np.ndarray, grid: tuple[int, int | None, bool] | None
) -> None:
    decoder = read_decoder(tiny_checkpoint)
    if grid:
        decoder = quantized(decoder, *grid)
    logits, _ = Graph(decoder, tmp_path)(input_ids)
    np.testing.assert_allclose(logits, pytorch_logits(tiny_checkpoint, decoder, input_ids), atol=FLOAT32_ERROR)


def test_float16_differs_by_its_rounding_only(tiny_checkpoint: Path, tmp_path: Path, input_ids: np.ndarray) -> None:
    decoder = quantized(read_decoder(tiny_checkpoint), 8, None, True)
    logits, present = Graph(decoder, tmp_path, "float16")(input_ids)
    assert (logits.dtype, present[0].dtype) == (np.float32, np.float16)
    difference = np.abs(logits - pytorch_logits(tiny_checkpoint, decoder, input_ids)).max()
    assert 0 < difference < FLOAT16_ERROR


def test_decoding_with_the_past_equals_one_long_prompt(
    tiny_checkpoint: Path, tmp_path: Path, input_ids: np.ndarray
) -> None:
    decoder = read_decoder(tiny_checkpoint)
    graph = Graph(decoder, tmp_path)
    parts, past = [], None
    for part in np.split(input_ids, (7, 8, 9), axis=1):
        logits, past = graph(part, past)
        parts.append(logits)
    expected = pytorch_logits(tiny_checkpoint, decoder, input_ids)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=FLOAT32_ERROR)
    assert past[0].shape == (2, 2, 12, 16)


def test_only_the_asked_positions_reach_the_lm_head(
    tiny_checkpoint: Path, tmp_path: Path, input_ids: np.ndarray
) -> None:
    graph = Graph(read_decoder(tiny_checkpoint), tmp_path)
    every, _ = graph(input_ids)
    some, _ = graph(input_ids, logit_indices=[3, 11])
    assert some.shape == (2, 2, 512)
    np.testing.assert_allclose(some, every[:, [3, 11]], atol=FLOAT32_ERROR)


def test_padding_on_the_left_is_not_seen(tiny_checkpoint: Path, tmp_path: Path, input_ids: np.ndarray) -> None:
    graph = Graph(read_decoder(tiny_checkpoint), tmp_path)
    alone, _ = graph(input_ids[:1])
    padded = np.concatenate([np.full((1, 5), 77), input_ids[:1]], axis=1)
    mask = np.array([[0] * 5 + [1] * 12])
    together, past = graph(padded, attention_mask=mask)
    np.testing.assert_allclose(together[:, 5:], alone, atol=FLOAT32_ERROR)

    longer, _ = graph(np.array([[9]]), past, attention_mask=np.append(mask, [[1]], axis=1))
    expected, _ = graph(np.append(input_ids[:1], [[9]], axis=1))
    np.testing.assert_allclose(longer[:, 0], expected[:, -1], atol=FLOAT32_ERROR)


SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=4)),
    "bias": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "head norms": (Qwen3ForCausalLM, Qwen3Config(**SIZES, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_of_blocks_equals_pytorch(tmp_path: Path, input_ids: np.ndarray, family: str) -> None:
    build, config = FAMILIES[family]
    torch.manual_seed(0)
    model = build(config).eval()
    with torch.no_grad():  # norms and biases start at one and zero, which would hide a forgotten one
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.12 if parameter.dim() == 2 else 0.5))
    model.save_pretrained(tmp_path / "checkpoint")
    graph = Graph(read_decoder(tmp_path / "checkpoint"), tmp_path)
    first, past = graph(input_ids[:, :8])
    second, _ = graph(input_ids[:, 8:], past)
    with torch.no_grad():
        expected = model(torch.from_numpy(input_ids)).logits.numpy()
    error = FLOAT32_ERROR * max(1.0, np.abs(expected).max() / 5)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), expected, atol=error)


def test_file_holds_the_integers_of_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    decoder = quantized(read_decoder(tiny_checkpoint), 4, 32, True)
    model = onnx.load(Graph(decoder, tmp_path).file)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    up = stored["layers.1.up.integers"]
    assert up.data_type == onnx.TensorProto.INT4
    np.testing.assert_array_equal(numpy_helper.to_array(up).astype(np.int8), decoder.layers[1].up.integers.T)
    assert "layers.1.up.weight" not in stored
    assert not any(name.startswith("lm_head") for name in stored), "the tied head is the embedding"


def test_four_bits_take_half_a_byte(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sizes = {}
    for bits in (8, 4):
        (tmp_path / str(bits)).mkdir()
        graph = Graph(quantized(read_decoder(tiny_checkpoint), bits, 32, True), tmp_path / str(bits))
        sizes[bits] = graph.file.with_name("model.onnx.data").stat().st_size
    num_weights = 512 * 64 + 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert sizes[8] - sizes[4] == pytest.approx(num_weights / 2, rel=0.02)


def test_graph_uses_standard_operators_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    graph = Graph(quantized(read_decoder(tiny_checkpoint), 4, 32, False), tmp_path)
    onnx.checker.check_model(graph.file, full_check=True)
    model = onnx.load(graph.file, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}


def test_same_decoder_gives_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        export_decoder(read_decoder(tiny_checkpoint), tmp_path / name / "m.onnx", precision="float16", max_length=64)
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert contents[0] == contents[1]


def test_weight_beyond_float16_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    decoder = read_decoder(tiny_checkpoint)
    decoder = dataclasses.replace(decoder, norm=dataclasses.replace(decoder.norm, gain=decoder.norm.gain * 70000))
    with pytest.raises(ValueError, match=r"norm.gain must be finite in float16; its largest magnitude is 70000"):
        export_decoder(decoder, tmp_path / "m.onnx", precision="float16", max_length=64)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3"])
def test_static_inputs_are_rounded_as_the_checkpoint_says(
    kind: str, tiny_checkpoint: Path, tmp_path: Path, input_ids: np.ndarray
) -> None:
    """Node by node, as the operators are defined: ONNX Runtime's optimizer makes products of FP8 that it lacks."""
    out, data = tmp_path / "w8a8", tmp_path / "data"
    out.mkdir()
    data.mkdir()
    np.save(data / "calibration.npy", np.random.default_rng(0).integers(0, 512, (16, 32)).astype(np.int32))
    weights = {"format": kind} if kind == "float8_e4m3" else {"bits": 8}
    method = RoundToNearest.model_validate(
        {"weights": weights, "embeddings": None, "activations": {"format": kind, "static": ["*"]}}
    )
    quantize_checkpoint(checkpoint=tiny_checkpoint, data=data, method=method, out=out)

    logits, _ = Graph(read_decoder(out), tmp_path, optimized=False)(input_ids)

    session = PyTorch().load(out, threads=1)
    expected = session.prefill(input_ids, input_ids.shape[1])
    np.testing.assert_allclose(logits, expected, atol=FLOAT32_ERROR)
