"""The activations of a quantized checkpoint, rounded in PyTorch as any engine has to: W8A8 and the KV cache.

Float numbers stand for the integers, so this says what rounding costs, not how fast it is.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import DynamicCache

from tasks.quantization.activations import static
from tasks.quantization.checkpoint_format import CacheScales, read_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """A KV cache whose keys (rotated) and values are rounded before anything is computed with them."""

    def __init__(self, config: "PretrainedConfig", scales: CacheScales) -> None:
        super().__init__(config=config)
        self.scales = scales

    def update(
        self, key_states: "Tensor", value_states: "Tensor", layer_idx: int, *args: object, **kwargs: object
    ) -> "tuple[Tensor, Tensor]":
        """Keys and values [batch, heads, seq, head_dim] of block `layer_idx`, those before them included."""
        keys, values = self.rounded(key_states, value_states, layer_idx)
        return super().update(keys, values, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def rounded(self, key_states: "Tensor", value_states: "Tensor", layer_idx: int) -> "tuple[Tensor, Tensor]":
        """What the cache of block `layer_idx` makes of keys and values."""
        key_scale, value_scale = self.scales.of_blocks[layer_idx]
        keys = static(key_states.float(), key_scale, 0, self.scales.format).to(key_states.dtype)
        values = static(value_states.float(), value_scale, 0, self.scales.format).to(value_states.dtype)
        return keys, values


class RoundedOnce(RoundedCache):
    """One that keeps nothing: what is computed with it begins with no token before."""

    def update(
        self, key_states: "Tensor", value_states: "Tensor", layer_idx: int, *_: object, **__: object
    ) -> "tuple[Tensor, Tensor]":
        """Keys and values [batch, heads, seq, head_dim] of block `layer_idx`, rounded."""
        return self.rounded(key_states, value_states, layer_idx)


def round_inputs_(model: "PreTrainedModel", checkpoint: Path) -> None:
    """Round the inputs of the linear layers of `model` in place, as its checkpoint says."""
    from tasks.calibration.layerwise import change_inputs_

    change_inputs_(model, {layer: inputs.rounded for layer, inputs in read_inputs(checkpoint).items()})


def empty_cache(model: "PreTrainedModel", scales: CacheScales | None) -> DynamicCache:
    """The KV cache that a new sequence starts with."""
    return RoundedCache(model.config, scales) if scales else DynamicCache(config=model.config)
