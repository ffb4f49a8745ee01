"""What is read from a checkpoint against transformers' own reading of it, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

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


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_tables_are_those_of_transformers(kind: str, edited: Any) -> None:
    decoder = read_decoder(edited(rope_parameters=ROPES[kind]))
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=512, rope_parameters=ROPES[kind]
    )
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(300)[None])

    for ours, theirs in zip(decoder.rotary_tables(300), expected, strict=True):
        # angles go up to 300; float32 holds those to 1.5e-5
        np.testing.assert_allclose(ours, theirs[0, :, :8].numpy(), atol=3e-5)


def test_rope_theta_of_older_configurations_is_read(edited: Any) -> None:
    decoder = read_decoder(edited(rope_parameters=None, rope_theta=100.0))

    np.testing.assert_allclose(decoder.inverse_frequencies, 100.0 ** -(np.arange(8) / 8), rtol=1e-6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "gpt2"}, "llama, mistral, qwen2, qwen3; got 'gpt2'"),
        ({"hidden_act": "gelu"}, "got 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "got 'yarn'"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight; it is missing"),
        ({"num_hidden_layers": 3}, r"no place for: model\.layers\.3"),
        ({"num_key_value_heads": 4}, r"Layer 0's k must be \[64, 64\].*got \[32, 64\]"),
        ({"vocab_size": 500}, r"embedding must be \[500, 64\].*got \[512, 64\]"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "same attention window",
        ),
    ],
)
def test_what_no_graph_could_compute_is_refused(entries: dict[str, Any], message: str, edited: Any) -> None:
    with pytest.raises(ValueError, match=message):
        read_decoder(edited(**entries))


def test_sliding_window_of_mistral_is_read(edited: Any) -> None:
    assert read_decoder(edited(model_type="mistral", sliding_window=32)).sliding_window == 32
