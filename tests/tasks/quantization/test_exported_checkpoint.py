"""Checkpoints of encoders and encoder-decoders that can be read, and the refusal of others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tasks.calibration.exported_families import is_exported
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.exported import quantize_exported
from tasks.quantization.exported_checkpoint import read_checkpoint


@pytest.fixture
def checkpoint(transformer_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny BERT that may be spoilt."""
    copied = tmp_path / "checkpoint"
    shutil.copytree(transformer_checkpoint("BertForMaskedLM"), copied)
    return copied


def change(checkpoint: Path, **settings: object) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_families_that_are_exported_are_those_without_a_graph_by_hand() -> None:
    assert [family for family in ("bert", "roberta", "distilbert", "t5", "bart", "marian") if is_exported(family)] == [
        "bert", "roberta", "distilbert", "t5", "bart", "marian",
    ]  # fmt: skip
    assert not any(is_exported(family) for family in ("llama", "qwen2", "", "gpt2"))


@pytest.mark.parametrize(
    ("model", "max_length"),
    [("BertForMaskedLM", 40), ("RobertaForQuestionAnswering", 40), ("T5ForConditionalGeneration", None)],
)
def test_longest_sequence(model: str, max_length: int | None, transformer_checkpoint: Callable[[str], Path]) -> None:
    """RoBERTa's table has 42 positions, of which the first is the padding token's and 0 and 1 are never used."""
    assert read_checkpoint(transformer_checkpoint(model)).max_length == max_length


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "electra"}, "families bert, roberta, distilbert, t5, bart, marian; got 'electra'"),
        ({"architectures": ["BertForMultipleChoice"]}, "`architectures` of config.json says BertForMultipleChoice"),
        ({"intermediate_size": 48}, "do not fit its config.json"),
        ({"num_hidden_layers": 3}, "must hold every weight of a BertForMaskedLM; it lacks 16: "),
        ({"quantization_config": {"quant_method": "awq"}}, "compressed-tensors format; got 'awq'"),
    ],
)
def test_checkpoint_that_cannot_be_read_is_refused(settings: dict[str, object], message: str, checkpoint: Path) -> None:
    change(checkpoint, **settings)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(checkpoint)


def test_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"directory with a config.json; .* has none"):
        read_checkpoint(tmp_path)


def test_weights_that_are_not_finite_are_refused(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.bias"][3] = np.nan
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"bert.encoder.layer.0.output.dense.bias of .* holds NaN or infinite"):
        read_checkpoint(checkpoint)


@pytest.fixture
def quantized(checkpoint: Path, tmp_path: Path) -> Path:
    out = tmp_path / "quantized"
    out.mkdir()
    quantize_exported(checkpoint=checkpoint, method=RoundToNearest(weights=Grid(bits=8)), out=out)
    return out


def test_rounded_inputs_are_refused(quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())["quantization_config"]
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    for group in config["config_groups"].values():
        group["input_activations"] = inputs
    change(quantized, quantization_config=config)
    with pytest.raises(ValueError, match="is quantized together with its inputs"):
        read_checkpoint(quantized)


def test_quantized_weight_of_no_layer_is_refused(quantized: Path) -> None:
    weights = load_file(quantized / "model.safetensors")
    old = "bert.encoder.layer.0.output.dense"
    for name in [name for name in weights if name.startswith(f"{old}.weight")]:
        weights[name.replace(old, "bert.extra")] = weights[name]
    save_file(weights, quantized / "model.safetensors", {"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())["quantization_config"]
    for group in config["config_groups"].values():
        group["targets"] += ["bert.extra"] if old in group["targets"] else []
    change(quantized, quantization_config=config)
    with pytest.raises(ValueError, match=r"bert\.extra of .* is no layer of it"):
        read_checkpoint(quantized)
