"""Calibration of what a checkpoint whose weights are quantized needs to round activations: static scales.

One pass over the calibration tokens through the model as it is then, with quantized weights and float activations.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.calibration.architectures import Architecture, matching
from tasks.calibration.progress import Report, silent
from tasks.calibration.tensor_files import append_tensors
from tasks.quantization.activations import Activations, Format, Inputs, covered, fitted, largest_of, relative_error
from tasks.quantization.checkpoint_format import input_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MINIMUM_TOKENS = 512  # fewer leave the tails of histograms to chance


@dataclass(frozen=True)
class Calibrated:
    """What calibration found for one layer's inputs."""

    range: tuple[float, float]  # that the grid covers
    relative_error: float  # ||x - x'|| / ||x|| on the calibration tokens


def kinds_of_inputs(
    options: Activations | None, layers: Sequence[str], quantized: Collection[str]
) -> dict[str, Inputs]:
    """How the inputs of each quantized layer will be rounded; static ones have the scale 1 until they are calibrated.

    Args:
        options: which layers, and how.
        layers: full names of all linear layers of blocks, which the options' patterns can match.
        quantized: those of them whose weights are quantized; others keep their inputs.

    Raises:
        ValueError: a pattern in the options matches no layer, or every layer is ignored.
    """
    if options is None:
        return {}
    ignored = set(matching(layers, options.ignore, "activations.ignore"))
    static = set(matching(layers, options.static, "activations.static"))
    kinds = {
        layer: Inputs(options.format, 1.0, 0, options.symmetric) if layer in static else Inputs(options.format)
        for layer in layers
        if layer in quantized and layer not in ignored
    }
    if not kinds:
        raise ValueError(
            f"The inputs of at least one quantized layer must be rounded; `activations.ignore` "
            f"({', '.join(options.ignore)}) leaves none. Drop `activations` instead."
        )
    return kinds


def check_length(batches: "Sequence[Tensor]") -> None:
    """Raise ValueError unless there are enough calibration tokens for scales of activations."""
    num_tokens = sum(batch.numel() for batch in batches)
    if num_tokens < MINIMUM_TOKENS:
        raise ValueError(
            f"Calibrating activations needs at least {MINIMUM_TOKENS} tokens; got {num_tokens}. "
            "Raise data.num_calibration_sequences or data.sequence_length, or round inputs per token."
        )


def add_scales(
    checkpoint: Path,
    family: Architecture,
    options: Activations | None,
    kinds: Mapping[str, Inputs],
    kv_cache: Format | None,
    batches: "Sequence[Tensor]",
    report: Report = silent,
) -> tuple[dict[str, Calibrated], int]:
    """Calibrate the static scales of a checkpoint's layers and KV cache, and add them to its files.

    Args:
        checkpoint: complete, with quantized weights, its config.json not naming static inputs yet; changed.
        family: where it keeps its parts.
        options: how to calibrate.
        kinds: of the inputs of every layer; see `kinds_of_inputs`.
        kv_cache: how keys and values are kept; None: no scales for them.
        batches: calibration token ids [batch, seq] int64.
        report: told after every batch.

    Returns:
        What was found for every layer with static inputs, and how many bytes of tensors were added.
    """
    from tasks.calibration.checkpoints import load_model
    from tasks.calibration.layerwise import observe_inputs
    from tasks.calibration.statistics import Histogram

    model = load_model(checkpoint)
    found: dict[str, Calibrated] = {}
    tensors = {}
    static = {layer for layer, inputs in kinds.items() if inputs.scale is not None}
    steps = [
        [layer for layer in (f"{family.block(index)}.{linear}" for linear in step) if layer in static]
        for index in range(int(model.config.num_hidden_layers))
        for step in family.steps
    ]
    together = {step[0]: step for step in steps if step}  # they read the same input, so one is watched for all
    if options and together:
        for first, histogram in observe_inputs(model, batches, [*together], lambda _: Histogram(), report).items():
            inputs = fitted(histogram, options)
            for layer in together[first]:
                found[layer] = Calibrated(covered(inputs), relative_error(histogram, inputs))
                tensors.update(input_tensors(layer, inputs))
    if kv_cache:
        for index, peaks in enumerate(cache_peaks(model, batches, report)):
            for name, peak in zip("kv", peaks, strict=True):
                scale = peak / largest_of(kv_cache) if peak else 1.0
                tensors[f"{family.block(index)}.{family.attention_module}.{name}_scale"] = np.array(
                    [scale], dtype=np.float32
                )
    return found, append_tensors(checkpoint, tensors) if tensors else 0


def cache_peaks(
    model: "PreTrainedModel", batches: "Sequence[Tensor]", report: Report = silent
) -> list[tuple[float, float]]:
    """max |key| after the rotation, and max |value|, of every block.

    Args:
        model: not changed.
        batches: token ids [batch, seq] int64, no padding.
        report: told after every batch.
    """
    import torch
    from transformers import DynamicCache

    peaks = [(0.0, 0.0)] * int(model.config.num_hidden_layers)

    class Peaks(DynamicCache):  # type: ignore[misc]
        def update(
            self, key_states: "Tensor", value_states: "Tensor", layer_idx: int, *_: object, **__: object
        ) -> "tuple[Tensor, Tensor]":
            key, value = peaks[layer_idx]
            peaks[layer_idx] = max(key, float(key_states.abs().max())), max(value, float(value_states.abs().max()))
            return key_states, value_states

    with torch.no_grad():
        for step, input_ids in enumerate(batches, start=1):
            model.base_model(input_ids=input_ids, past_key_values=Peaks(config=model.config), use_cache=True)
            report(step, len(batches), {})
    return peaks


def write_config(checkpoint: Path, config: Mapping[str, object]) -> None:
    """Write config.json."""
    (checkpoint / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
