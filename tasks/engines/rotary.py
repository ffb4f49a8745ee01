"""Rotary positions: how fast each pair of a head's dimensions turns, from a configuration's `rope_parameters`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Rotary:
    """How the first dimensions of a head turn: their halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""

    inverse_frequencies: Floats  # [rotary_dim / 2]: what a position is multiplied with; holds theta and any scaling
    scale: float = 1.0  # what cosines and sines are multiplied with
    max_length: int | None = None  # longer sequences would turn otherwise; None: none do

    @property
    def dim(self) -> int:
        """How many dimensions of a head turn; those after them stay."""
        return 2 * len(self.inverse_frequencies)

    def tables(self, length: int) -> tuple[Floats, Floats]:
        """Cosines and sines of every position's angles, in float32 as transformers computes them.

        Returns:
            cos, sin: [length, rotary_dim / 2] float32.
        """
        angles = np.arange(length, dtype=np.float32)[:, None] * self.inverse_frequencies[None, :]
        scale = np.float32(self.scale)
        return np.cos(angles) * scale, np.sin(angles) * scale


def read_rotary(rope: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int, partial: bool) -> Rotary:
    """theta^(-2i / rotary_dim) with the scaling that a configuration asks for.

    Args:
        rope: `rope_parameters` as transformers 5 has them.
        max_position_embeddings: the model's; longrope takes its scale from it.
        partial: whether the family turns a part of a head where `partial_rotary_factor` says so.

    Raises:
        ValueError: the scaling, or a part of the head, is not one that the graphs compute.
    """
    factor = rope.get("partial_rotary_factor")
    if factor not in (None, 1.0) and not partial:
        raise ValueError(
            f"partial_rotary_factor must be 1 for this family, which turns whole heads; got {factor}. "
            "Remove it from config.json."
        )
    dim = int(head_dim * (1.0 if factor is None else factor))
    if dim < 2 or dim % 2:
        raise ValueError(
            f"partial_rotary_factor must leave an even number of dimensions of a head of {head_dim}, at least 2; "
            f"{factor} leaves {dim}. Use the engine 'pytorch' for it."
        )
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inverse: Floats = np.float32(1) / np.power(np.float32(rope["rope_theta"]), exponents)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return Rotary(inverse)
    if kind == "linear":
        return Rotary(inverse / np.float32(rope["factor"]))
    if kind == "llama3":
        return Rotary(_llama3_frequencies(inverse, rope))
    if kind == "longrope":
        return _longrope(inverse, rope, max_position_embeddings)
    raise ValueError(
        f"Rotary scaling must be one of default, linear, llama3, longrope; got {kind!r}. "
        "Use the engine 'pytorch' for it."
    )


def _llama3_frequencies(inverse: Floats, rope: Mapping[str, Any]) -> Floats:
    """Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1; transformers' rope_type)."""
    trained, low, high = (
        float(rope[key]) for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    wavelength = 2 * math.pi / inverse
    ramp = np.clip((trained / wavelength - low) / (high - low), 0, 1)
    scaled: Floats = ((1 - ramp) * inverse / float(rope["factor"]) + ramp * inverse).astype(np.float32)
    return scaled


def _longrope(inverse: Floats, rope: Mapping[str, Any], max_position_embeddings: int) -> Rotary:
    """Each frequency divided by its own factor (Ding et al., LongRoPE, ICML 2024, arXiv:2402.13753), as Phi-3 has it.

    There are two lists of factors: short ones, and long ones for sequences that outgrow the length first trained with,
    for which every earlier position has to be computed anew. A graph holds one: the short, up to that length.
    """
    trained = int(rope["original_max_position_embeddings"])
    factor = float(rope.get("factor") or max_position_embeddings / trained)
    scale = rope.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    factors = np.array(rope["short_factor"], dtype=np.float32)
    return Rotary((inverse / factors).astype(np.float32), float(scale), max_length=trained)
