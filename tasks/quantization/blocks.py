"""Calibrated quantization, block by block: each block's result is a file, and a walk goes on after the last of them.

A work directory holds arguments.json, what it is for; block-<index>.safetensors, tensors of a finished block as the
checkpoint will hold them, and their figures; hidden-<index>.npy, what the next block reads (see `streaming.py`). The
latter is complete before the block's file is, so that the number of those files says how far the walk has come. The LM
head comes last, in head.safetensors.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from pydantic import TypeAdapter

from tasks.calibration.architectures import Architecture
from tasks.calibration.checkpoints import empty_model
from tasks.calibration.memory import trim
from tasks.calibration.progress import Report
from tasks.calibration.tensor_files import Tensors, metadata, refuse_not_finite, save_whole
from tasks.calibration.tokens import calibration_batches
from tasks.calibration.work_directory import claim, digest, digests
from tasks.quantization.checkpoint_format import (
    QuantizedWeight,
    Scheme,
    linear_scheme,
    linear_tensors,
    plain_scheme,
    table_tensors,
)
from tasks.quantization.gptq import output_error
from tasks.quantization.summary import Measured, measure

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tasks.calibration.statistics import InputGram
    from tasks.calibration.streaming import Streamed
    from tasks.quantization.activations import Inputs
    from tasks.quantization.gptq import Gptq
    from tasks.quantization.ranges import Grid

logger = logging.getLogger(__name__)

BATCH_SIZE = 8  # calibration sequences; more is no faster on CPUs and holds more activations
_MEASURED = TypeAdapter(list[Measured])


@dataclass(frozen=True)
class Head:
    """The LM head, where it is to be quantized."""

    module: str  # the embedding, where that is tied to it
    tied: str | None  # then the LM head's own name
    grid: "Grid"


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
    head: Head | None,
    work_dir: Path,
    report: Report,
) -> Walk:
    """Quantize linear layers on calibration tokens, each on the outputs of those before it, and then the LM head.

    Args:
        checkpoint: float; its weights are read block by block.
        tensors: of the checkpoint.
        data: with calibration.npy [num_sequences, sequence_length] int32.
        family: of the checkpoint.
        method: how.
        grids: of the layers to quantize, by their names.
        inputs: how those of them that round their inputs will do so.
        head: None: it is not quantized.
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
    if head:
        chosen[head.module] = head.grid.model_dump(mode="json")
    claim(work_dir, {**content, "method": method.model_dump(mode="json"), "grids": chosen})
    num_blocks = len(model.get_submodule(family.blocks))
    files = [work_dir / f"block-{index}.safetensors" for index in range(num_blocks)]
    first = next((index for index, file in enumerate(files) if not file.exists()), num_blocks)
    block = _Block(method, grids, inputs)

    def scale_(name: str, inputs: dict[str, InputGram]) -> None:
        changed = scale_inputs_(model, family, name, inputs, grids)
        block.tensors |= {tensor: values.numpy() for tensor, values in changed.items()}

    residence = Streamed(model, family, tensors, work_dir, first)
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
            residence=residence,
            first_block=first,
            keep_last=head is not None,
            finish=lambda index: block.save(files[index]),
        )
    if head:
        files.append(work_dir / "head.safetensors")
        if not files[-1].exists():
            block.quantize_head(head, tensors, _inputs_of_head(model, family, tensors, residence))
            block.save(files[-1])
    measured = [each for file in files for each in _MEASURED.validate_json(metadata(file)["measured"])]
    num_tokens = sum(batch.numel() for batch in batches)
    widths = {name: tensors.shape(f"{name}.weight")[1] for name in grids}
    return Walk(files, measured, first or None, _too_few(num_tokens, widths))


def _inputs_of_head(
    model: "PreTrainedModel", family: Architecture, tensors: Tensors, residence: "Streamed"
) -> "InputGram":
    """What the LM head reads on the calibration tokens: the outputs of the final norm."""
    import torch

    from tasks.calibration.statistics import InputGram

    norm = model.get_submodule(family.final_norm)
    norm.load_state_dict({key: tensors.copy(f"{family.final_norm}.{key}") for key in norm.state_dict()}, assign=True)
    for key, values in norm.state_dict().items():
        refuse_not_finite(values, f"{family.final_norm}.{key}")
    found = InputGram(model.config.hidden_size)
    with torch.no_grad():
        for hidden in residence.hidden():
            found.update(norm(hidden))
    return found


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

        trim()  # what the forward passes have left
        before = weight.detach().clone()
        found = self._method.quantize_for(before, self._grids[module], module, inputs)
        weight.copy_(torch.from_numpy(found.weight.dequantize()))
        quantized = replace(found.weight, inputs=self._inputs.get(module))
        error = output_error(before, weight, inputs.value)
        self._add(module, before, quantized, linear_scheme(quantized), self._words, error, found.note)
        self.tensors |= linear_tensors(module, quantized)

    def quantize_head(self, head: Head, tensors: Tensors, inputs: "InputGram") -> None:
        """Quantize the LM head for the inputs that it gets behind the quantized blocks."""
        import torch

        trim()
        before = tensors.copy(f"{head.module}.weight")
        quantized, _, note = self._method.quantize_for(
            before, head.grid, head.module, inputs, is_looked_up=head.tied is not None
        )
        error = output_error(before, torch.from_numpy(quantized.dequantize()), inputs.value)
        self._add(head.module, before, quantized, plain_scheme(quantized), "GPTQ", error, note)
        self.tensors |= table_tensors(head.module, quantized, head.tied)

    def _add(
        self,
        module: str,
        before: "Tensor",
        weight: QuantizedWeight,
        scheme: Scheme,
        words: str,
        error: float,
        note: str,
    ) -> None:
        if note:
            logger.warning("%s: %s", module, note)
        self._measured.append(measure(module, before.numpy(), weight, scheme, words, error, note))

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
