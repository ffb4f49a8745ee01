"""What is read from a checkpoint against transformers' own reading of it, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tasks.engines.decoder import floats, read_decoder, shape
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight


@pytest.fixture
def edited(tiny_checkpoint: Path, tmp_path: Path) -> Any:
    """A copy of the tiny checkpoint whose config.json has some entries replaced."""

    def edit(**entries: Any) -> Path:
        out = tmp_path / "edited"
        shutil.copytree(tiny_checkpoint, out)
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, **entries}))
        return out

    return edit


def test_tiny_checkpoint_has_the_shapes_of_its_configuration(tiny_checkpoint: Path) -> None:
    decoder = read_decoder(tiny_checkpoint)

    assert len(decoder.layers) == 4
    assert shape(decoder.layers[0].q) == (64, 64)
    assert shape(decoder.layers[0].k) == (32, 64)
    assert shape(decoder.layers[3].down) == (64, 128)
    assert decoder.lm_head is decoder.embedding
    assert decoder.layers[0].q_bias is None


def test_quantized_checkpoint_keeps_its_integers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    method = RoundToNearest(weights=Grid(bits=4, group_size=32), embeddings=Grid(bits=8))
    quantize_checkpoint(checkpoint=tiny_checkpoint, data=tiny_checkpoint, method=method, out=tmp_path)

    decoder = read_decoder(tmp_path)

    gate = decoder.layers[1].gate
    assert isinstance(gate, QuantizedWeight)
    assert (gate.bits, gate.group_size, gate.integers.dtype) == (4, 32, np.int8)
    assert decoder.lm_head is decoder.embedding
    error = np.abs(floats(gate) - floats(read_decoder(tiny_checkpoint).layers[1].gate))
    assert 0 < error.max() <= gate.scale.max() / 2 * 1.01  # scales are rounded to float16


def test_rope_theta_of_older_configurations_is_read(edited: Any) -> None:
    decoder = read_decoder(edited(rope_parameters=None, rope_theta=100.0))

    (rotary,) = decoder.rotaries
    np.testing.assert_allclose(rotary.inverse_frequencies, 100.0 ** -(np.arange(8) / 8), rtol=1e-6)


def test_llama3_scaling_is_read(edited: Any) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (rotary,) = read_decoder(edited(rope_parameters=rope)).rotaries
    np.testing.assert_allclose(rotary.inverse_frequencies[-1] / 500000.0 ** -(7 / 8), 1 / 8, rtol=1e-6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "mamba"}, r"llama, mistral, qwen2, qwen3, .*gpt_neox; got 'mamba'"),
        ({"model_type": "gemma3"}, "got 'gemma3'"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of silu, .*; got 'tanh'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "got 'yarn'"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight; it is missing"),
        ({"num_hidden_layers": 3}, r"no place for: model\.layers\.3"),
        ({"num_key_value_heads": 4}, r"Layer 0's k must be \[64, 64\].*got \[32, 64\]"),
        ({"vocab_size": 500}, r"embedding must be \[500, 64\].*got \[512, 64\]"),
    ],
)
def test_what_no_graph_could_compute_is_refused(entries: dict[str, Any], message: str, edited: Any) -> None:
    with pytest.raises(ValueError, match=message):
        read_decoder(edited(**entries))


def test_sliding_window_of_mistral_is_read(edited: Any) -> None:
    decoder = read_decoder(edited(model_type="mistral", sliding_window=32))
    assert [layer.window for layer in decoder.layers] == [32] * 4


def test_window_that_llama_does_not_have_is_not_taken(edited: Any) -> None:
    assert read_decoder(edited(sliding_window=32)).layers[0].window is None


def test_bare_model_without_the_module_around_it_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)

    decoder = read_decoder(tmp_path)

    np.testing.assert_array_equal(decoder.layers[2].up, read_decoder(tiny_checkpoint).layers[2].up)
