"""Every family in every engine's graph against transformers, and what its configuration may not ask for."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.calibration.architectures import ARCHITECTURES, architecture
from tasks.engines import OnnxRuntime, OpenVino, PyTorch
from tasks.engines.decoder import Decoder, read_decoder
from tasks.engines.export import Precision, export_decoder
from tasks.engines.families import FAMILIES
from tasks.engines.openvino_session import MODEL_FILE
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import read_weights
from tests.tasks.engines import tiny_families
from tests.tasks.engines.tiny_families import VARIANTS

BATCH_SIZE, PROMPT, LENGTH = 2, 16, 24  # the windows are 5
FLOAT32_ERROR = 5e-5  # logits are below 7; sums in another order were off by 1.5e-5 at most
FLOAT16_ERROR = 0.05  # 2^-11 relative per operation, three layers
ENGINES = {
    "onnxruntime": OnnxRuntime(precision="float32", activations="float32"),
    "openvino": OpenVino(precision="float32", activations="float32", kv_cache="float32"),
}


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, tiny_families.VOCAB_SIZE, (BATCH_SIZE, LENGTH))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a variant, made once."""
    folder = tmp_path_factory.mktemp("families")

    def make(name: str) -> Path:
        out = folder / name.replace(" ", "-")
        return out if out.exists() else tiny_families.save(*VARIANTS[name], out)

    return make


def reference(checkpoint: Path) -> np.ndarray:
    """transformers' logits [batch, length, vocab_size]."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(tokens())).logits.numpy()
    return logits


def portable_logits(decoder: Decoder, folder: Path, precision: Precision = "float32") -> np.ndarray:
    """What the portable graph computes from a prompt and then token by token, through its cache."""
    file = folder / "model.onnx"
    export_decoder(decoder, file, precision=precision, max_length=LENGTH)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # inputs as they are
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    caches = [f"past_key_values.{i}.{half}" for i in range(len(decoder.layers)) for half in ("key", "value")]
    empty = np.zeros((BATCH_SIZE, decoder.num_kv_heads, 0, decoder.head_dim), precision)
    past, parts = [empty] * len(caches), []
    ends = range(PROMPT, LENGTH + 1)
    for start, end in zip([0, *ends], ends, strict=False):
        feeds = {
            "input_ids": tokens()[:, start:end],
            "attention_mask": np.ones((BATCH_SIZE, end), np.int64),
            "position_ids": np.tile(np.arange(start, end), (BATCH_SIZE, 1)),
            "logit_indices": np.arange(end - start),
        }
        logits, *past = session.run(None, feeds | dict(zip(caches, past, strict=True)))
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def engine_logits(engine: str, checkpoint: Path, folder: Path) -> np.ndarray:
    """What an engine computes from a prompt and then token by token."""
    ENGINES[engine].compile(checkpoint, folder)
    session = ENGINES[engine].load(folder, threads=1)
    parts = [session.prefill(tokens()[:, :PROMPT], PROMPT)]
    parts += [session.decode(tokens()[:, position])[:, None] for position in range(PROMPT, LENGTH)]
    whole = session.prefill(tokens(), LENGTH)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=FLOAT32_ERROR, rtol=0)
    last = session.prefill(tokens(), 3)
    np.testing.assert_allclose(last, whole[:, -3:], atol=FLOAT32_ERROR, rtol=0)
    return whole


def test_every_family_has_a_variant() -> None:
    assert {family for family, _ in VARIANTS.values()} == set(FAMILIES) == set(tiny_families.FAMILIES)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_computes_what_transformers_computes(
    variant: str, engine: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    logits = engine_logits(engine, checkpoint(variant), tmp_path)
    np.testing.assert_allclose(logits, reference(checkpoint(variant)), atol=FLOAT32_ERROR, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_portable_graph_computes_what_transformers_computes(
    variant: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    logits = portable_logits(read_decoder(checkpoint(variant)), tmp_path)
    np.testing.assert_allclose(logits, reference(checkpoint(variant)), atol=FLOAT32_ERROR, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_portable_graph_of_float16_differs_by_its_rounding_only(
    variant: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    logits = portable_logits(read_decoder(checkpoint(variant)), tmp_path, "float16")
    difference = np.abs(logits - reference(checkpoint(variant))).max()
    assert 0 < difference < FLOAT16_ERROR


def without_biases(decoder: Decoder) -> Decoder:
    none = {f"{name}_bias": None for name in ("q", "k", "v", "o", "gate", "up", "down")}
    return dataclasses.replace(decoder, layers=tuple(dataclasses.replace(layer, **none) for layer in decoder.layers))


def with_layers(**values: Any) -> Callable[[Decoder], Decoder]:
    def change(decoder: Decoder) -> Decoder:
        return dataclasses.replace(decoder, layers=tuple(dataclasses.replace(x, **values) for x in decoder.layers))

    return change


def with_decoder(**values: Any) -> Callable[[Decoder], Decoder]:
    return lambda decoder: dataclasses.replace(decoder, **values)


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("mistral", with_layers(window=None)),
        ("qwen2", with_layers(window=5)),
        ("qwen2", without_biases),
        ("qwen3", with_layers(k_norm=None)),
        ("gemma2", with_decoder(attention_softcap=None)),
        ("gemma2", with_decoder(logit_softcap=None)),
        ("gemma2", with_decoder(embedding_scale=1.0)),
        ("gemma2", with_decoder(activation="gelu")),
        ("gemma2", with_layers(attention_scale=16**-0.5)),
        ("gemma2", with_layers(attention_output_norm=None)),
        ("gemma2", with_layers(feed_forward_output_norm=None)),
        ("gemma3_text", with_layers(window=None)),
        ("gpt2", with_decoder(positions=np.zeros((128, 64), np.float32))),
        ("gpt2", without_biases),
        ("opt", without_biases),
        ("gpt_neox", with_decoder(parallel_residual=False)),
        ("gpt_neox", with_layers(rotary=None)),
    ],
)
def test_these_models_would_show_a_part_that_is_left_out(
    variant: str, change: Callable[[Decoder], Decoder], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    logits = portable_logits(change(read_decoder(checkpoint(variant))), tmp_path)
    assert np.abs(logits - reference(checkpoint(variant))).max() > 5 * FLOAT32_ERROR


def edited(checkpoint: Path, out: Path, **entries: Any) -> Path:
    """The same tensors with another configuration."""
    out.mkdir()
    (out / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **entries}))
    return out


@pytest.mark.parametrize(
    ("variant", "entries", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be false.*got True"),
        ("gemma2", {"hidden_activation": "quick_gelu"}, "hidden_activation must be one of .*got 'quick_gelu'"),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "got chunked"),
        ("gemma2", {"num_hidden_layers": 2}, r"config\.json must be one that transformers takes; .*layer_types"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"must be null for Gemma 3.*got 50\.0"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window must be a number .*got null"),
        ("phi3", {"intermediate_size": 64, "num_key_value_heads": 4}, "qkv_proj must have 192 outputs.*got 128"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be false.*got True"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function must be one of .*got 'tanh'"),
        ("gpt2", {"n_positions": 100}, r"positions must be \[100, 64\].*got \[128, 64\]"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before must be True .*got False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm must be False .*got True"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim must be 64 .*got 32"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine must be True .*got False"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "takes; .*Missing required keys"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "got 'dynamic'"),
    ],
)
def test_what_no_graph_computes_is_refused_by_name(
    variant: str, entries: dict[str, Any], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_decoder(edited(checkpoint(variant), tmp_path / "edited", **entries))


def test_odd_heads_are_refused_by_onnxruntime_and_computed_by_openvino(tmp_path: Path) -> None:
    checkpoint = tiny_families.save("gpt2", {"hidden_size": 48}, tmp_path / "checkpoint")
    for name in ("bundle", "refused"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="multiple of 8 dimensions; these have 12"):
        ENGINES["onnxruntime"].compile(checkpoint, tmp_path / "refused")
    logits = engine_logits("openvino", checkpoint, tmp_path / "bundle")
    np.testing.assert_allclose(logits, reference(checkpoint), atol=FLOAT32_ERROR, rtol=0)


def test_longrope_ends_at_the_length_first_trained_with(checkpoint: Callable[[str], Path]) -> None:
    assert read_decoder(checkpoint("phi3 with longrope")).max_position_embeddings == 32


def test_defaults_of_a_short_configuration_are_those_of_transformers(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Gemma 2's own config.json has no layer_types, and Pythia's has `rotary_pct`."""
    source = checkpoint("gemma2")
    config = json.loads((source / "config.json").read_text())
    short = edited(source, tmp_path / "gemma2")
    del config["layer_types"], config["final_logit_softcapping"]
    (short / "config.json").write_text(json.dumps(config))
    decoder = read_decoder(short)
    assert [layer.window for layer in decoder.layers] == [5, None, 5]
    assert decoder.logit_softcap == 30

    pythia = edited(checkpoint("gpt_neox"), tmp_path / "pythia", rope_parameters=None, rotary_pct=0.5)
    assert read_decoder(pythia).rotaries[0].dim == 8


@pytest.mark.parametrize("variant", ["gpt2", "opt", "gpt_neox"])
def test_entries_that_a_family_does_not_have_are_not_taken(
    variant: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    decoder = read_decoder(edited(checkpoint(variant), tmp_path / "edited", num_key_value_heads=2, head_dim=8))
    assert (decoder.num_kv_heads, decoder.head_dim) == (4, 16)


def test_buffers_of_older_versions_are_not_weights(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("gpt_neox")
    tensors = load_file(source / "model.safetensors")
    for name in ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"):
        tensors[f"gpt_neox.layers.0.{name}"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())

    assert len(read_decoder(tmp_path).layers) == 3


GRIDS = {"int8": Grid(bits=8), "int4": Grid(bits=4, group_size=16)}
QUANTIZABLE = [family for family in FAMILIES if family in ARCHITECTURES]


@pytest.fixture(scope="module")
def quantized(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A family's checkpoint, rounded to nearest; embedding and LM head have 8 bits always."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(family: str, grid: str) -> Path:
        out = folder / f"{family}-{grid}"
        if not out.exists():
            out.mkdir()
            method = RoundToNearest(weights=GRIDS[grid], embeddings=Grid(bits=8))
            quantize_checkpoint(checkpoint=checkpoint(family), data=folder, method=method, out=out)
        return out

    return make


def pytorch_logits(checkpoint: Path) -> np.ndarray:
    return np.asarray(PyTorch().load(checkpoint, threads=1).prefill(tokens(), LENGTH))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", QUANTIZABLE)
def test_engine_computes_with_the_integers_of_every_family(
    family: str, grid: str, engine: str, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    logits = engine_logits(engine, quantized(family, grid), tmp_path)
    np.testing.assert_allclose(logits, pytorch_logits(quantized(family, grid)), atol=FLOAT32_ERROR, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", QUANTIZABLE)
def test_portable_graph_computes_with_the_integers_of_every_family(
    family: str, grid: str, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    logits = portable_logits(read_decoder(quantized(family, grid)), tmp_path)
    np.testing.assert_allclose(logits, pytorch_logits(quantized(family, grid)), atol=FLOAT32_ERROR, rtol=0)


@pytest.mark.parametrize("grid", [Grid(bits=8, symmetric=False), Grid(bits=4, symmetric=False, group_size=16)])
@pytest.mark.parametrize(
    ("family", "module"), [("phi3", "self_attn.qkv_proj"), ("gpt_neox", "attention.query_key_value")]
)
def test_parts_of_a_fused_layer_are_its_very_integers(
    family: str, module: str, grid: Grid, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize_checkpoint(
        checkpoint=checkpoint(family), data=tmp_path, method=RoundToNearest(weights=grid, embeddings=None), out=tmp_path
    )
    whole = read_weights(tmp_path)[f"{architecture(family).block(1)}.{module}.weight"]
    layer = read_decoder(tmp_path).layers[1]
    for row in range(len(whole.integers)):
        if family == "phi3":  # 64 rows of queries, 32 of keys, 32 of values
            part, index = (layer.q, row) if row < 64 else (layer.k, row - 64) if row < 96 else (layer.v, row - 96)
        else:  # of each of 4 heads 16 rows of queries, of keys and of values
            head, kind, index = row // 48, row % 48 // 16, row % 16
            part, index = (layer.q, layer.k, layer.v)[kind], 16 * head + index
        for ours, theirs in ((part.integers, whole.integers), (part.scale, whole.scale)):
            np.testing.assert_array_equal(ours[index], theirs[row])
        np.testing.assert_array_equal(part.zero_point[index], whole.zero_point[row])
        assert (part.bits, part.group_size) == (whole.bits, whole.group_size)


@pytest.mark.parametrize("options", [{"activations": {}}, {"activations": {"static": ["*"]}}, {"kv_cache": "int8"}])
@pytest.mark.parametrize("family", QUANTIZABLE)
def test_onnxruntime_rounds_what_the_checkpoint_rounds(
    family: str, options: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    if "kv_cache" in options and not architecture(family).cache_scales:
        pytest.skip("refused by quantization")
    out, data, bundle = (tmp_path / name for name in ("out", "data", "bundle"))
    for folder in (out, data, bundle):
        folder.mkdir()
    np.save(data / "calibration.npy", np.random.default_rng(1).integers(0, 512, (20, 32)).astype(np.int32))
    method = RoundToNearest.model_validate(options)
    quantize_checkpoint(checkpoint=checkpoint(family), data=data, method=method, out=out)
    ENGINES["onnxruntime"].compile(out, bundle)
    logits = ENGINES["onnxruntime"].load(bundle, threads=1).prefill(tokens(), LENGTH)
    expected = pytorch_logits(out)
    unrounded = reference(checkpoint(family))
    error, cost = np.abs(logits - expected), np.abs(expected - unrounded)
    # What lies halfway between two steps falls to either side, and its step spreads through the layers after.
    assert np.median(error) < 0.2 * np.median(cost)
    assert error.max() < 0.5 * np.abs(expected).max()


@pytest.mark.parametrize("engine", [OnnxRuntime(precision="float32"), OpenVino(precision="float32")])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", QUANTIZABLE)
def test_fast_options_stay_near(
    family: str, grid: str, engine: Any, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    """Both round inputs to 8 bits as they come, and OpenVINO keys and values too."""
    engine.compile(quantized(family, grid), tmp_path)
    session = engine.load(tmp_path, threads=1)
    logits = [session.prefill(tokens()[:, :PROMPT], PROMPT)]
    logits += [session.decode(tokens()[:, position])[:, None] for position in range(PROMPT, LENGTH)]
    expected = pytorch_logits(quantized(family, grid))
    error = np.abs(np.concatenate(logits, axis=1) - expected)
    assert 0 < error.max() < 0.15 * np.abs(expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_openvino_fuses_what_it_can(variant: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    decoder = read_decoder(checkpoint(variant))
    ENGINES["openvino"].compile(checkpoint(variant), tmp_path)
    compiled = openvino.Core().compile_model(tmp_path / MODEL_FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    nodes = compiled.get_runtime_model().get_ordered_ops()
    count = Counter(node.get_rt_info()["layerType"].astype(str) for node in nodes)
    num_layers = len(decoder.layers)
    linears = 7 if decoder.layers[0].gate is not None else 6
    assert count["FullyConnected"] == linears * num_layers + 1
    assert count["MemoryInput"] == 2 * num_layers
    assert count["RoPE"] == (2 * num_layers if decoder.rotaries else 0)
    capped = decoder.attention_softcap is not None  # written out
    assert count["ScaledDotProductAttention"] == (0 if capped else num_layers)
    assert count["MatMul"] == (2 * num_layers if capped else 0)
    if decoder.norm.kind == "layer":  # two norms of one input share what they divide by
        assert count["MVN"] == (1 if decoder.parallel_residual else 2) * num_layers + 1
    else:
        norms = (
            2 + 2 * (decoder.layers[0].attention_output_norm is not None) + 2 * (decoder.layers[0].q_norm is not None)
        )
        assert count["RMS"] == norms * num_layers + 1


def as_published(family: str, **entries: Any) -> Any:
    """The options of a configuration in the words that a family's first checkpoints have."""
    return FAMILIES[family].read_options(AutoConfig.for_model(family, **entries))


def test_pythia_is_read_in_its_own_words() -> None:
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 6, "intermediate_size": 2048}
    options = as_published("gpt_neox", **sizes, rotary_pct=0.25, rotary_emb_base=10000, hidden_act="gelu")
    assert (options.head_dim, options.rotaries[0].dim, options.parallel_residual) == (64, 16, True)
    assert (options.activation, options.norm_eps) == ("gelu", 1e-5)


def test_phi_3_mini_is_read_in_its_own_words() -> None:
    sizes = {"hidden_size": 3072, "num_attention_heads": 32, "num_hidden_layers": 2}
    short = as_published("phi3", **sizes, num_key_value_heads=32, sliding_window=2047, rope_theta=10000.0)
    assert (short.head_dim, short.rotaries[0].dim, short.windows) == (96, 96, (2047, 2047))
    factors = {"type": "longrope", "short_factor": [1.5] * 48, "long_factor": [3.0] * 48}
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    (long, _) = as_published("phi3", **sizes, **lengths, rope_scaling=factors, rope_theta=10000.0).rotaries
    assert (long.max_length, long.scale) == (4096, pytest.approx(1.19023807))
    assert long.inverse_frequencies[0] == pytest.approx(1 / 1.5)


def test_gemma_3_is_read_in_its_own_words() -> None:
    options = as_published(
        "gemma3_text",
        num_hidden_layers=7,
        head_dim=256,
        sliding_window=512,
        sliding_window_pattern=6,
        rope_theta=1000000,
        rope_local_base_freq=10000,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        query_pre_attn_scalar=256,
    )
    assert options.windows == (512,) * 5 + (None, 512)
    near, far = options.rotaries[0], options.rotaries[5]
    assert options.rotaries == (near,) * 5 + (far, near)
    assert near.inverse_frequencies[1] == pytest.approx(10000 ** (-1 / 128))
    assert far.inverse_frequencies[1] == pytest.approx(1000000 ** (-1 / 128) / 8)
    assert (options.attention_scales[0], options.logit_softcap) == (1 / 16, None)


def test_gpt_2_is_read_in_its_own_words() -> None:
    options = as_published("gpt2", n_ctx=1024, n_embd=768, n_head=12, n_layer=2, n_positions=1024)
    assert (options.head_dim, options.activation, options.max_position_embeddings) == (64, "gelu_tanh", 1024)
