import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.calibration.architectures import ARCHITECTURES, architecture
from tasks.calibration.checkpoints import load_model
from tasks.calibration.tensor_files import Tensors
from tasks.quantization import Gptq, Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight, read_weights
from tasks.quantization.mixed import Mixed
from tasks.quantization.sensitivity import measure_divergence, measure_sensitivity

INT8 = Grid()
INT4 = Grid(bits=4, group_size=32)
METHODS = {
    "w8": RoundToNearest(),
    "w8 asymmetric": RoundToNearest(weights=Grid(symmetric=False), embeddings=Grid(symmetric=False)),
    "w4 g32": RoundToNearest(weights=INT4),
    "w4 g32 asymmetric": RoundToNearest(weights=Grid(bits=4, group_size=32, symmetric=False)),
    "w4 g32 real zero points": RoundToNearest(
        weights=Grid(bits=4, group_size=32, symmetric=False, zero_point="real"), embeddings=Grid(group_size=32)
    ),
    "gptq w4 g32": Gptq(weights=INT4),
    "gptq w3 g16 asymmetric": Gptq(weights=Grid(bits=3, group_size=16, symmetric=False, range="mse")),
    "gptq awq w4 g16": Gptq(weights=Grid(bits=4, group_size=16), awq=True),
    "gptq w4 g16 full range, e4 g16 full range": Gptq(
        weights=Grid(bits=4, group_size=16, full_range=True), embeddings=Grid(bits=4, group_size=16, full_range=True)
    ),
    "w4 asymmetric per channel": RoundToNearest(weights=Grid(bits=4, symmetric=False), embeddings=None),
    "w3 g16, e4 g16": RoundToNearest(weights=Grid(bits=3, group_size=16), embeddings=Grid(bits=4, group_size=16)),
    "some float": RoundToNearest(weights=INT4, embeddings=None, ignore=("model.layers.0.*", "*.down_proj")),
}
CALIBRATION = np.random.default_rng(0).integers(0, 512, (12, 32)).astype(np.int32)


def quantized(checkpoint, tmp_path, method, name="out"):
    out, data = tmp_path / name, tmp_path / f"{name}.data"
    out.mkdir()
    data.mkdir()
    np.save(data / "calibration.npy", CALIBRATION)
    return out, quantize_checkpoint(checkpoint=checkpoint, data=data, method=method, out=out)


def values(weight):
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


@pytest.fixture
def untied_checkpoint(tiny_checkpoint, tmp_path):
    copy = tmp_path / "untied"
    shutil.copytree(tiny_checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(512, 64)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_stock_transformers_loads_exactly_our_weights(tiny_checkpoint, untied_checkpoint, tmp_path, method, tied):
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint if tied else untied_checkpoint
    out, _ = quantized(source, tmp_path, method)
    model = AutoModelForCausalLM.from_pretrained(out)
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = model(input_ids).logits  # de-quantizes the weights
    weights = read_weights(out)
    state = model.state_dict()
    for name, weight in weights.items():
        loaded, ours = state[name].numpy(), values(weight)
        if getattr(weight, "has_real_zero_point", False):  # a quotient of offset and scale, rounded to float32
            assert np.abs(loaded - ours).max() <= 2**-22 * np.abs(ours).max(), name
        else:
            assert np.array_equal(loaded, ours), name
    if tied:
        assert "lm_head.weight" not in weights
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
        with torch.no_grad():
            assert torch.equal(load_model(out)(input_ids).logits, logits)


@pytest.mark.parametrize("method", ["w4 g32", "gptq awq w4 g16", "w3 g16, e4 g16"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_stock_transformers_loads_every_family(family_checkpoint, tmp_path, family, method):
    from transformers import AutoModelForCausalLM

    out, _ = quantized(family_checkpoint(family), tmp_path, METHODS[method])
    model, row = AutoModelForCausalLM.from_pretrained(out), architecture(family)
    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits  # de-quantizes the weights
        assert torch.equal(load_model(out)(torch.arange(20)[None]).logits, logits)
    weights, state = read_weights(out), model.state_dict()
    assert all(np.array_equal(state[name].numpy(), values(weight)) for name, weight in weights.items())
    integers = {name.removesuffix(".weight") for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
    assert integers == {*row.all_linears(3), row.embedding, row.lm_head}


def test_integers_are_those_of_the_grid_and_tied_embeddings_are_stored_once(tiny_checkpoint, tmp_path):
    out, summary = quantized(tiny_checkpoint, tmp_path, METHODS["w4 g32 asymmetric"])
    original = load_file(tiny_checkpoint / "model.safetensors")
    weights = read_weights(out)
    up = weights["model.layers.2.mlp.up_proj.weight"]
    expected = METHODS["w4 g32 asymmetric"].quantize(
        original["model.layers.2.mlp.up_proj.weight"], Grid(bits=4, group_size=32, symmetric=False), "up"
    )
    assert (up.bits, up.group_size, up.integers.dtype, up.zero_point.dtype) == (4, 32, np.uint8, np.uint8)
    assert up.integers.max() <= 15
    for attribute in ("integers", "scale", "zero_point"):
        assert np.array_equal(getattr(up, attribute), getattr(expected, attribute))
    embedding = weights["model.embed_tokens.weight"]
    assert (embedding.bits, embedding.group_size, embedding.integers.dtype) == (8, None, np.int8)
    with Tensors(out) as tensors:
        assert "lm_head.weight" not in tensors
        assert tensors.tensor("model.embed_tokens.weight").dtype == torch.int8
    assert weights["model.norm.weight"].dtype == np.float32
    assert summary.num_parameters == sum(tensor.numel() for tensor in original.values())
    assert summary.size_bytes_before == 4 * summary.num_parameters
    assert summary.left_float == {}
    assert summary.size_bytes < summary.size_bytes_before / 4


def test_summary_measures_the_weight_error(tiny_checkpoint, tmp_path):
    out, summary = quantized(tiny_checkpoint, tmp_path, METHODS["w4 g32"])
    original = load_file(tiny_checkpoint / "model.safetensors")
    weights = read_weights(out)
    layer = next(layer for layer in summary.layers if layer.name.endswith("layers.1.self_attn.v_proj"))
    exact = original[f"{layer.name}.weight"].numpy()
    error = exact - weights[f"{layer.name}.weight"].dequantize()
    assert layer.relative_error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(exact), rel=1e-5)
    assert layer.max_error == pytest.approx(np.abs(error).max())
    of_rows = np.linalg.norm(error, axis=1) / np.linalg.norm(exact, axis=1)
    assert layer.worst_channels == tuple(np.argsort(-of_rows)[:3])
    assert layer.method == "rounded to nearest"
    assert layer.bits_per_weight == 4 + 16 / 32
    assert summary.worst_relative_error == max(layer.relative_error for layer in summary.layers)


def kl_to_the_original(checkpoint, out, tokens):
    with torch.no_grad():
        p, q = (load_model(path)(tokens).logits.double().log_softmax(-1) for path in (checkpoint, out))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("awq", [False, True])
@pytest.mark.parametrize("grid", [Grid(bits=3, group_size=32), Grid(bits=4, group_size=32, symmetric=False)])
def test_gptq_is_nearer_to_the_original_than_rounding(tiny_checkpoint, tmp_path, grid, awq):
    tokens = torch.from_numpy(CALIBRATION).long()
    rounded, _ = quantized(tiny_checkpoint, tmp_path, RoundToNearest(weights=grid), "rounded")
    solved, summary = quantized(tiny_checkpoint, tmp_path, Gptq(weights=grid, awq=awq), "solved")
    assert kl_to_the_original(tiny_checkpoint, solved, tokens) < 0.8 * kl_to_the_original(
        tiny_checkpoint, rounded, tokens
    )
    errors = {layer.name: layer.output_error for layer in summary.layers}
    assert len(errors) == 4 * 7 + 1
    assert all(0 < layer.output_error < layer.relative_error for layer in summary.layers)


def test_gptq_sees_the_layers_quantized_before(tiny_checkpoint, tmp_path):
    """The output error of a layer, computed again from the inputs it gets in the finished model's earlier layers."""
    out, summary = quantized(tiny_checkpoint, tmp_path, Gptq(weights=INT4))
    model, original = load_model(out), load_model(tiny_checkpoint)
    name, inputs = "model.layers.2.mlp.down_proj", []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model.model(torch.from_numpy(CALIBRATION).long())
        exact, coarse = (each.get_submodule(name).weight for each in (original, model))
        x = inputs[0].T
        expected = torch.linalg.norm((exact - coarse) @ x) / torch.linalg.norm(exact @ x)
    handle.remove()
    (layer,) = (layer for layer in summary.layers if layer.name == name)
    assert layer.output_error == pytest.approx(float(expected), rel=1e-2)


def test_a_pruned_checkpoint_keeps_its_zeros(tiny_checkpoint, tmp_path):
    pruned = tmp_path / "pruned"
    shutil.copytree(tiny_checkpoint, pruned)
    tensors = load_file(pruned / "model.safetensors")
    up = "model.layers.1.mlp.up_proj.weight"
    tensors[up][tensors[up].abs() < tensors[up].abs().median()] = 0
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    for name in ("w4 g32", "w4 g32 asymmetric", "gptq w4 g32", "gptq w3 g16 asymmetric"):
        out, _ = quantized(pruned, tmp_path, METHODS[name], name.replace(" ", "-"))
        assert (read_weights(out)[up].dequantize()[tensors[up].numpy() == 0] == 0).all()


def test_tokens_of_another_vocabulary_are_refused(tiny_checkpoint, tmp_path):
    np.save(tmp_path / "calibration.npy", np.full((2, 8), 600, np.int32))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="below the model's 512 tokens; got 600"):
        quantize_checkpoint(checkpoint=tiny_checkpoint, data=tmp_path, method=Gptq(), out=tmp_path / "out")


def test_calibration_without_sequences_is_refused(tiny_checkpoint, tmp_path):
    np.save(tmp_path / "calibration.npy", np.empty((0, 8), np.int32))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"at least one sequence; got none\. Raise data\.num_calibration_sequences"):
        quantize_checkpoint(checkpoint=tiny_checkpoint, data=tmp_path, method=Gptq(), out=tmp_path / "out")


def test_fewer_tokens_than_inputs_are_told(tiny_checkpoint, tmp_path):
    np.save(tmp_path / "calibration.npy", CALIBRATION[:3])
    (tmp_path / "out").mkdir()
    few = quantize_checkpoint(checkpoint=tiny_checkpoint, data=tmp_path, method=Gptq(), out=tmp_path / "out")
    (note,) = [note for note in few.notes if "rank-deficient" in note]
    assert note.startswith("Calibration has 96 tokens, and 4 layers have more inputs")
    assert "layers.0.mlp.down_proj with 128" in note
    _, enough = quantized(tiny_checkpoint, tmp_path, Gptq(), "enough")
    assert not any("rank-deficient" in note for note in enough.notes)


def test_float_checkpoint_is_read_as_it_is(tiny_checkpoint):
    weights = read_weights(tiny_checkpoint)
    original = load_file(tiny_checkpoint / "model.safetensors")
    assert weights.keys() == original.keys() - {"lm_head.weight"}
    assert all(np.array_equal(weights[name], original[name].numpy()) for name in weights)


def test_layers_left_alone_are_named(tiny_checkpoint, tmp_path):
    out, summary = quantized(tiny_checkpoint, tmp_path, METHODS["some float"])
    assert summary.left_float["model.layers.0.self_attn.q_proj"] == "`ignore` names it"
    assert summary.left_float["model.embed_tokens"] == "`embeddings` is null"
    assert "model.layers.3.mlp.down_proj" in summary.left_float
    assert len(summary.layers) + len(summary.left_float) == 4 * 7 + 1
    assert isinstance(read_weights(out)["model.layers.3.mlp.down_proj.weight"], np.ndarray)


def test_same_input_gives_the_same_bytes(tiny_checkpoint, tmp_path):
    first, _ = quantized(tiny_checkpoint, tmp_path, METHODS["w4 g32"], "first")
    second, _ = quantized(tiny_checkpoint, tmp_path, METHODS["w4 g32"], "second")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_checkpoint_keeps_tokenizer_and_generation_settings(tiny_checkpoint, tmp_path):
    out, _ = quantized(tiny_checkpoint, tmp_path, METHODS["w8"])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_reads_what_the_compressed_tensors_library_packs(tmp_path, bits, group_size):
    """Asymmetric layers as llm-compressor writes them: strategy group or channel, zero points packed."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    weight = RoundToNearest().quantize(
        torch.randn(24, 64), Grid(bits=bits, symmetric=False, group_size=group_size), "x"
    )
    offset = 2 ** (bits - 1)
    arguments = {"num_bits": bits, "type": "int", "symmetric": False, "dynamic": False}
    arguments |= {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    stored = PackedQuantizationCompressor.compress(
        {
            "weight": torch.from_numpy(weight.dequantize()),
            "weight_scale": torch.from_numpy(weight.scale),
            "weight_zero_point": (torch.from_numpy(weight.zero_point).short() - offset).to(torch.int8),
        },
        QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments)),
    )
    save_file({f"proj.{name}": tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"targets": ["Linear"], "weights": arguments}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    read = read_weights(tmp_path)["proj.weight"]
    assert np.array_equal(read.integers, weight.integers)
    assert np.array_equal(read.zero_point, weight.zero_point)
    assert np.array_equal(read.dequantize(), weight.dequantize())
    assert (read.bits, read.group_size) == (bits, group_size)


def test_refuses_a_group_size_that_divides_no_layer(tiny_checkpoint, tmp_path):
    method = RoundToNearest(weights=Grid(bits=4, group_size=48))
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.down_proj has 128 inputs, got 48\. Use one of 8, 16, 32, 64"
    ):
        quantized(tiny_checkpoint, tmp_path, method)


def test_refuses_a_pattern_that_matches_nothing(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"'\*\.downproj' matches none"):
        quantized(tiny_checkpoint, tmp_path, RoundToNearest(ignore=("*.downproj",)))


def test_refuses_to_ignore_everything(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="leaves none"):
        quantized(tiny_checkpoint, tmp_path, RoundToNearest(ignore=("*",)))


def test_refuses_to_ignore_half_of_a_tied_pair(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="share one weight"):
        quantized(tiny_checkpoint, tmp_path, RoundToNearest(ignore=("lm_head",)))


def test_refuses_a_quantized_checkpoint(tiny_checkpoint, tmp_path):
    out, _ = quantized(tiny_checkpoint, tmp_path, METHODS["w8"])
    with pytest.raises(ValueError, match="quantized already"):
        quantized(out, tmp_path, METHODS["w8"], "again")


def test_refuses_an_unknown_family(tiny_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "mamba"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"known family \(llama, mistral, qwen2, qwen3, .*\); got 'mamba'"):
        quantized(copy, tmp_path, METHODS["w8"])


@pytest.mark.parametrize("method", [METHODS["w8"], METHODS["gptq w4 g32"]], ids=["rtn", "gptq"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_refuses_weights_that_are_not_finite(tiny_checkpoint, tmp_path, name, method):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name.removesuffix('.weight')}.* NaN or infinite"):
        quantized(copy, tmp_path, method)


CHOICES = [{"bits": 3, "group_size": 16}, {"bits": 4, "group_size": 16}, {"bits": 8}]


def mixed(checkpoint, tmp_path, method, **budget):
    """Sensitivity, then quantization by it, as the flow does."""
    weights = Mixed(choices=CHOICES, embedding_choices=CHOICES[1:], **budget)
    data, scores, out = (tmp_path / name for name in ("data", "scores", "out"))
    for directory in (data, scores, out):
        directory.mkdir()
    np.save(data / "calibration.npy", CALIBRATION)
    measure_sensitivity(
        checkpoint=checkpoint,
        data=data,
        choices=weights.choices,
        embedding_choices=weights.embedding_choices,
        ignore=(),
        out=scores,
    )
    method = method.model_copy(update={"weights": weights})
    summary = quantize_checkpoint(
        checkpoint=checkpoint, data=data, method=method, out=out, scores=scores, work_dir=tmp_path / "work"
    )
    return out, data, summary


@pytest.mark.parametrize("method", [RoundToNearest(), Gptq()], ids=["rtn", "gptq"])
def test_mixed_precision_keeps_its_budget_in_a_checkpoint_that_stock_transformers_loads(
    method, tiny_checkpoint, tmp_path
):
    from transformers import AutoModelForCausalLM

    out, _, summary = mixed(tiny_checkpoint, tmp_path, method, bits_per_weight=6)
    assert summary.bits_per_weight <= 6
    assert summary.bits_per_weight == pytest.approx(summary.mixed.bits_per_weight)
    assert len({layer.bits for layer in summary.layers}) > 1
    bits = {layer.name: layer.bits for layer in summary.layers}
    for index in range(4):  # what engines multiply at once shares a grid
        for step in architecture("llama").steps:
            assert len({bits[f"model.layers.{index}.{linear}"] for linear in step}) == 1
    stock = AutoModelForCausalLM.from_pretrained(out)
    ours = load_model(tiny_checkpoint)
    with torch.no_grad():
        for name, weight in read_weights(out).items():
            ours.state_dict()[name].copy_(torch.from_numpy(values(weight)))
        ids = torch.from_numpy(CALIBRATION[:2].astype(np.int64))
        torch.testing.assert_close(stock(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_parts_fall_back_to_more_bits_until_the_divergence_holds(tiny_checkpoint, tmp_path, monkeypatch):
    """Parts that do worse together than alone: what is measured of the whole model counts, not the sum."""
    monkeypatch.setattr("tasks.quantization.apply.measure_divergence", lambda *of: 2 * measure_divergence(*of))
    out, data, summary = mixed(tiny_checkpoint, tmp_path, RoundToNearest(), max_kl=0.25)
    assert summary.mixed.num_attempts > 1
    assert summary.mixed.measured_kl == pytest.approx(2 * measure_divergence(tiny_checkpoint, out, data))
    assert summary.mixed.measured_kl <= 0.25
    assert summary.mixed.predicted_kl < 0.2


def test_a_divergence_that_no_attempt_keeps_is_an_error(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.quantization.apply.measure_divergence", lambda *_: 5.1)
    with pytest.raises(ValueError, match=r"max_kl is 5 nats; after 5 attempts the model still diverges by 5\.1"):
        mixed(tiny_checkpoint, tmp_path, RoundToNearest(), max_kl=5)
