"""Calibrated quantization, block by block: each block's result is a file, and a walk goes on after the last of them.

A work directory holds arguments.json, what it is for; block-<index>.safetensors, tensors of a finished block as the
checkpoint will hold them, and their figures; hidden-<index>.npy, what the next block reads (see `streaming.py`). The
latter is complete before the block's file is, so that the number of those files says how far the walk has come.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from tasks.calibration.architectures import Architecture
from tasks.calibration.checkpoints import empty_model
from tasks.calibration.memory import trim
from tasks.calibration.progress import Report
from tasks.calibration.tensor_files import Tensors, metadata, save_whole
from tasks.calibration.tokens import calibration_batches
from tasks.calibration.work_directory import claim, digest, digests
from tasks.quantization.checkpoint_format import linear_scheme, linear_tensors
from tasks.quantization.summary import Measured, measure

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.calibration.statistics import InputGram
    from tasks.quantization.activations import Inputs
    from tasks.quantization.gptq import Gptq
    from tasks.quantization.ranges import Grid

logger = logging.getLogger(__name__)

BATCH_SIZE = 8  # calibration sequences; more is no faster on CPUs and holds more activations
_MEASURED = TypeAdapter(list[Measured])


@dataclass(frozen=True)
class Walk:
    """What a walk through all blocks has left in its work directory."""

    files: list[Path]  # safetensors
    measured: list[Measured]
    resumed_from_block: int | None
    notes: list[str]


def quantize_blocks(
    checkpoint: Path,
    tensors: Tensors,
    data: Path,
    family: Architecture,
    method: "Gptq",
    grids: "Mapping[str, Grid]",
    inputs: "Mapping[str, Inputs]",
    work_dir: Path,
    report: Report,
) -> Walk:
    """Quantize linear layers on calibration tokens, each on the outputs of those before it.

    Args:
        checkpoint: float; its weights are read block by block.
        tensors: of the checkpoint.
        data: with calibration.npy [num_sequences, sequence_length] int32.
        family: of the checkpoint.
        method: how.
        grids: of the layers to quantize, by their names.
        inputs: how those of them that round their inputs will do so.
        work_dir: what an interrupted walk with the same arguments has left here is not computed again.
        report: told after every block.

    Raises:
        ValueError: there are no tokens, or they are none of the vocabulary; `work_dir` is that of other arguments.
    """
    from tasks.calibration.layerwise import compress_blocks
    from tasks.calibration.statistics import InputGram
    from tasks.calibration.streaming import Streamed
    from tasks.quantization.awq import scale_inputs_

    model = empty_model(checkpoint)
    batches = calibration_batches(data, model.config.vocab_size, BATCH_SIZE)
    content = {"checkpoint": digests(checkpoint), "calibration": digest(data / "calibration.npy")}
    chosen = {name: grid.model_dump(mode="json") for name, grid in grids.items()}
    claim(work_dir, {**content, "method": method.model_dump(mode="json"), "grids": chosen})
    num_blocks = len(model.get_submodule(family.blocks))
    files = [work_dir / f"block-{index}.safetensors" for index in range(num_blocks)]
    first = next((index for index, file in enumerate(files) if not file.exists()), num_blocks)
    block = _Block(method, grids, inputs)

    def scale_(name: str, inputs: dict[str, InputGram]) -> None:
        changed = scale_inputs_(model, family, name, inputs, grids)
        block.tensors |= {tensor: values.numpy() for tensor, values in changed.items()}

    if first < num_blocks:
        compress_blocks(
            model,
            family,
            batches,
            grids,
            InputGram,
            block.quantize_,
            report,
            step_by_step=method.true_sequential,
            prepare_=scale_ if method.awq else None,
            residence=Streamed(model, family, tensors, work_dir, first),
            first_block=first,
            finish=lambda index: block.save(files[index]),
        )
    measured = [each for file in files for each in _MEASURED.validate_json(metadata(file)["measured"])]
    num_tokens = sum(batch.numel() for batch in batches)
    widths = {name: tensors.shape(f"{name}.weight")[1] for name in grids}
    return Walk(files, measured, first or None, _too_few(num_tokens, widths))


class _Block:
    """The block at work: what of it is quantized so far."""

    def __init__(self, method: "Gptq", grids: "Mapping[str, Grid]", inputs: "Mapping[str, Inputs]") -> None:
        self._method = method
        self._grids = grids
        self._inputs = inputs
        self._words = "GPTQ with AWQ scaling" if method.awq else "GPTQ"
        self.tensors: dict[str, NDArray[Any]] = {}
        self._measured: list[Measured] = []

    def quantize_(self, module: str, weight: "Tensor", inputs: "InputGram") -> None:
        """Replace a layer's weight by what its integers stand for."""
        import torch

        from tasks.quantization.gptq import output_error

        trim()  # what the forward passes have left
        before = weight.detach().clone()
        found = self._method.quantize_for(before, self._grids[module], module, inputs)
        weight.copy_(torch.from_numpy(found.weight.dequantize()))
        note = ""
        if found.damping > self._method.damping:
            note = f"damping raised from {self._method.damping:g} to {found.damping:g}; its inputs are nearly dependent"
            logger.warning("%s: %s", module, note)
        error = output_error(before, weight, inputs.value)
        values: NDArray[np.float32] = before.numpy()
        quantized = replace(found.weight, inputs=self._inputs.get(module))
        self._measured.append(measure(module, values, quantized, linear_scheme(quantized), self._words, error, note))
        self.tensors |= linear_tensors(module, quantized)

    def save(self, file: Path) -> None:
        """Write the finished block, and begin another."""
        figures = json.dumps(_MEASURED.dump_python(self._measured, mode="json"))
        save_whole(file, self.tensors, {"measured": figures})
        self.tensors, self._measured = {}, []


def _too_few(num_tokens: int, widths: Mapping[str, int]) -> list[str]:
    """A note if there are fewer calibration tokens than some layer has inputs."""
    starved = [name for name, width in widths.items() if width > num_tokens]
    if not starved:
        return []
    widest = max(starved, key=lambda name: widths[name])
    note = (
        f"Calibration has {num_tokens} tokens, and {len(starved)} layers have more inputs, such as {widest} with "
        f"{widths[widest]}: the Hessians are rank-deficient, and damping decides what the tokens do not. "
        "Calibrate on more sequences."
    )
    logger.warning(note)
    return [note]
