"""The angles of rotary positions against transformers' own modules, and which scalings are refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from tasks.engines.rotary import read_rotary

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
ANGLE_ERROR = 3e-5  # angles go up to 300; float32 holds those to 1.5e-5
ROPES: dict[str, dict[str, Any]] = {
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
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 300,
    "short_factor": [1.0, 1.05, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0],
    "long_factor": [64.0] * 8,
}


def read(rope: dict[str, Any], *, partial: bool = False) -> Any:
    return read_rotary(rope, head_dim=16, max_position_embeddings=512, partial=partial)


@pytest.mark.parametrize("kind", ROPES)
def test_tables_are_those_of_transformers(kind: str) -> None:
    config = LlamaConfig(**SIZES, head_dim=16, rope_parameters=dict(ROPES[kind]))
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(300)[None])

    for ours, theirs in zip(read(ROPES[kind]).tables(300), expected, strict=True):
        np.testing.assert_allclose(ours, theirs[0, :, :8].numpy(), atol=ANGLE_ERROR)


def test_part_of_a_head_turns_as_in_transformers() -> None:
    rope = {**ROPES["default"], "partial_rotary_factor": 0.75}
    expected = Phi3RotaryEmbedding(Phi3Config(**SIZES, rope_parameters=dict(rope)))(
        torch.zeros(1), torch.arange(300)[None]
    )

    rotary = read(rope, partial=True)

    assert rotary.dim == 12
    for ours, theirs in zip(rotary.tables(300), expected, strict=True):
        np.testing.assert_allclose(ours, theirs[0, :, :6].numpy(), atol=ANGLE_ERROR)


def test_longrope_is_that_of_transformers_up_to_the_length_first_trained_with() -> None:
    config = Phi3Config(**SIZES, original_max_position_embeddings=300, rope_parameters=dict(LONGROPE))
    module = Phi3RotaryEmbedding(config)
    rotary = read(config.rope_parameters)

    assert rotary.max_length == 300
    assert rotary.scale == pytest.approx(math.sqrt(1 + math.log(512 / 300) / math.log(300)))
    for ours, theirs in zip(rotary.tables(300), module(torch.zeros(1), torch.arange(300)[None]), strict=True):
        np.testing.assert_allclose(ours, theirs[0, :, :8].numpy(), atol=ANGLE_ERROR)
    longer = module(torch.zeros(1), torch.arange(301)[None])[0][0, :300, :8].numpy()
    assert np.abs(longer - rotary.tables(300)[0]).max() > 0.1, "transformers turns otherwise from the next token on"


@pytest.mark.parametrize(
    ("rope", "partial", "message"),
    [
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}, False, "longrope; got 'yarn'"),
        ({**ROPES["default"], "partial_rotary_factor": 0.5}, False, r"must be 1 for this family.*got 0\.5"),
        ({**ROPES["default"], "partial_rotary_factor": 0.2}, True, r"0\.2 leaves 3"),
        ({**ROPES["default"], "partial_rotary_factor": 0.1}, True, r"0\.1 leaves 1"),
    ],
)
def test_what_no_graph_turns_is_refused(rope: dict[str, Any], partial: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(rope, partial=partial)
