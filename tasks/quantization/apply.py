"""Stage: a float checkpoint in, a compressed-tensors checkpoint out, one layer in memory at a time."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from tasks.calibration.architectures import Architecture, architecture, matching
from tasks.calibration.checkpoints import copy_tokenizer, load_model
from tasks.calibration.progress import Report, silent
from tasks.calibration.tokens import calibration_batches
from tasks.quantization import Gptq, Grid, QuantizationMethod
from tasks.quantization.activations import Inputs
from tasks.quantization.checkpoint_format import (
    QuantizedWeight,
    Scheme,
    Tensors,
    TensorWriter,
    packed_scheme,
    packed_tensors,
    plain_scheme,
    plain_tensors,
    quantization_config,
    tied_tensors,
)
from tasks.quantization.input_scales import Calibrated, add_scales, check_length, kinds_of_inputs, write_config
from tasks.quantization.smoothquant import smoothed

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

BATCH_SIZE = 8  # calibration sequences; more is no faster on CPUs and holds more activations


class QuantizedLayer(BaseModel, frozen=True):
    """What quantization made of one layer."""

    name: str
    num_weights: int
    bits: int
    symmetric: bool
    group_size: int | None
    bits_per_weight: float  # with scales (float16) and zero points
    relative_error: float  # ||W - W'|| / ||W||, Frobenius norms
    max_error: float  # largest |w - w'|
    sqnr_db: float | None  # 20 log10(||W|| / ||W - W'||); None where nothing was lost
    output_error: float | None  # ||(W - W') X|| / ||W X|| on the calibration tokens; None: a method that reads none
    note: str  # what the method had to do; empty: nothing unusual
    inputs: Literal["float", "static", "per token"] = "float"  # how the layer's inputs are rounded
    input_range: tuple[float, float] | None = None  # of static ones: what was covered
    input_relative_error: float | None = None  # of static ones: ||x - x'|| / ||x|| on the calibration tokens


class QuantizationSummary(BaseModel, frozen=True):
    """What quantization made of a checkpoint."""

    num_parameters: int  # tied ones once
    num_quantized: int
    bits_per_weight: float  # of the quantized weights, with scales (float16) and zero points
    bits_per_parameter: float  # of the whole checkpoint's tensors
    size_bytes_before: int  # the tensors as float32
    size_bytes: int  # the safetensors files
    relative_error: float  # over all quantized weights together
    worst_layer: str  # the one with the largest relative error
    worst_relative_error: float
    layers: list[QuantizedLayer]
    left_float: list[str]  # layers that could have been quantized and were not
    notes: list[str]


def quantize_checkpoint(
    *, checkpoint: Path, data: Path, method: QuantizationMethod, out: Path, report: Report = silent
) -> QuantizationSummary:
    """Quantize the linear layers of a checkpoint, and its embedding and LM head where `method` says so.

    Args:
        checkpoint: plain checkpoint directory, float, of a family in `architectures.py`.
        data: prepared data; round to nearest reads none of it, other methods its calibration tokens, as do static
            scales of activations and of the KV cache, and SmoothQuant.
        method: how.
        out: empty directory; gets a compressed-tensors checkpoint (see `checkpoint_format.py`). Whatever is not
            quantized is float32.
        report: told after every block, or tensor.

    Raises:
        ValueError: the checkpoint is quantized already, of an unknown family or not finite; a group size does not
            divide a layer; a pattern matches no layer, or everything is ignored; calibration is too short.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if config.get("quantization_config"):
        raise ValueError(
            f"Quantization needs a float checkpoint; {checkpoint} is quantized already. Start from the float model."
        )
    family = architecture(config["model_type"])
    linears = family.all_linears(int(config[family.num_layers_option]))
    batches = _activation_batches(method, data, int(config["vocab_size"]))
    with (
        _smooth(checkpoint, method, family, linears, batches, out, report) as source,
        Tensors(source) as tensors,
        TensorWriter(out) as writer,
    ):
        tied = bool(config.get("tie_word_embeddings")) or f"{family.lm_head}.weight" not in tensors
        config["tie_word_embeddings"] = tied
        grids = _grids(method, family, int(config[family.num_layers_option]), tied)
        kinds = kinds_of_inputs(method.activations, linears, [module for module in linears if grids[module]])
        schemes: dict[str, Scheme] = {}
        layers: list[QuantizedLayer] = []
        error_squared = norm_squared = 0.0
        num_parameters = 0
        names = [name for name in tensors.names if not (tied and name == f"{family.lm_head}.weight")]

        def add(module: str, values: NDArray[np.float32], weight: QuantizedWeight, *about: Any) -> None:
            nonlocal error_squared, norm_squared
            layer, error, norm = _measure(module, values, weight, *about)
            layers.append(layer)
            error_squared += error
            norm_squared += norm
            weight = replace(weight, inputs=kinds.get(module))
            if weight.inputs or weight.format != "int8" or module in (family.embedding, family.lm_head):
                schemes[module] = plain_scheme(weight)
                writer.add(plain_tensors(module, weight))
                if tied and module == family.embedding:
                    schemes[family.lm_head] = schemes[module]
                    writer.add(tied_tensors(family.lm_head, weight))
            else:
                schemes[module] = packed_scheme(weight)
                writer.add(packed_tensors(module, weight))

        changed: dict[str, Tensor] = {}
        if method.method == "gptq":
            calibrated = {module: grid for module, grid in grids.items() if grid and module in linears}
            changed = _quantize_blocks(source, data, family, method, calibrated, add, report)
        for step, name in enumerate(names, start=1):
            module = name.removesuffix(".weight")
            num_parameters += math.prod(tensors.shape(name))
            if name.endswith(".weight") and module in schemes:
                continue
            values = changed[name] if name in changed else tensors.tensor(name).float()
            grid = grids.get(module) if name.endswith(".weight") else None
            if grid is None:
                _refuse_not_finite(values, name)
                writer.add({name: values.numpy()})
            else:
                add(module, values.numpy(), method.quantize(values, grid, module))
            report(step, len(names), {"relative_error": layers[-1].relative_error} if grid else {})
    left_float = [module for module, grid in grids.items() if grid is None]
    config["dtype"] = "float32"
    config.pop("torch_dtype", None)
    config.pop("_name_or_path", None)
    tied_float = [family.lm_head] if tied and family.lm_head not in schemes else []
    copy_tokenizer(checkpoint, out)
    size_bytes = writer.size_bytes
    if batches:
        without = {module: replace(scheme, inputs=()) for module, scheme in schemes.items()}
        config["quantization_config"] = quantization_config(without, left_float + tied_float)
        write_config(out, config)
        found, added = add_scales(out, family, method.activations, kinds, method.kv_cache, batches, report)
        size_bytes += added
        layers = [_with_inputs(layer, kinds.get(layer.name), found.get(layer.name)) for layer in layers]
    config["quantization_config"] = quantization_config(schemes, left_float + tied_float, method.kv_cache)
    write_config(out, config)
    if (checkpoint / "generation_config.json").exists():
        shutil.copyfile(checkpoint / "generation_config.json", out / "generation_config.json")
    num_quantized = sum(layer.num_weights for layer in layers)
    worst = max(layers, key=lambda layer: layer.relative_error)
    if left_float:
        logger.info("%d layers stay float32: %s", len(left_float), ", ".join(left_float))
    return QuantizationSummary(
        num_parameters=num_parameters,
        num_quantized=num_quantized,
        bits_per_weight=sum(layer.bits_per_weight * layer.num_weights for layer in layers) / num_quantized,
        bits_per_parameter=size_bytes * 8 / num_parameters,
        size_bytes_before=num_parameters * 4,
        size_bytes=size_bytes,
        relative_error=(error_squared / norm_squared) ** 0.5 if norm_squared else 0.0,
        worst_layer=worst.name,
        worst_relative_error=worst.relative_error,
        layers=layers,
        left_float=left_float,
        notes=[f"{layer.name}: {layer.note}" for layer in layers if layer.note],
    )


def _activation_batches(method: QuantizationMethod, data: Path, vocab_size: int) -> "tuple[Tensor, ...]":
    """The calibration tokens that activations need; none where they need none."""
    options = method.activations
    if not (method.kv_cache or (options and (options.static or options.smooth))):
        return ()
    batches = calibration_batches(data, vocab_size, BATCH_SIZE)
    check_length(batches)
    return batches


def _smooth(
    checkpoint: Path,
    method: QuantizationMethod,
    family: Architecture,
    linears: list[str],
    batches: "tuple[Tensor, ...]",
    scratch: Path,
    report: Report,
) -> AbstractContextManager[Path]:
    """The checkpoint to quantize: a smoothed copy where the method asks for one."""
    if not (method.activations and method.activations.smooth):
        return nullcontext(checkpoint)
    return smoothed(checkpoint, batches, family, linears, method.activations.smooth, scratch, report)


def _with_inputs(layer: QuantizedLayer, inputs: Inputs | None, found: Calibrated | None) -> QuantizedLayer:
    if inputs is None:
        return layer
    if found is None:
        return layer.model_copy(update={"inputs": "per token"})
    about = {"inputs": "static", "input_range": found.range, "input_relative_error": found.relative_error}
    return layer.model_copy(update=about)


def _quantize_blocks(
    checkpoint: Path,
    data: Path,
    family: Architecture,
    method: Gptq,
    grids: dict[str, Grid],
    add: Callable[..., None],
    report: Report,
) -> "dict[str, Tensor]":
    """Quantize linear layers block by block on calibration tokens, and hand each to `add` as it is done.

    Returns:
        Other tensors that have changed on the way, by their names.
    """
    import torch

    from tasks.calibration.layerwise import compress_blocks
    from tasks.calibration.statistics import InputGram
    from tasks.quantization.awq import scale_inputs_
    from tasks.quantization.gptq import output_error

    changed: dict[str, Tensor] = {}
    model = load_model(checkpoint)
    batches = calibration_batches(data, model.config.vocab_size, BATCH_SIZE)

    def compress_(module: str, weight: "Tensor", inputs: InputGram) -> None:
        before = weight.detach().clone()
        found = method.quantize_for(before, grids[module], module, inputs)
        weight.copy_(torch.from_numpy(found.weight.dequantize()))
        note = ""
        if found.damping > method.damping:
            note = f"damping raised from {method.damping:g} to {found.damping:g}; its inputs are nearly dependent"
            logger.warning("%s: %s", module, note)
        add(module, before.numpy(), found.weight, output_error(before, weight, inputs.value), note)

    def scale_(block: str, inputs: dict[str, InputGram]) -> None:
        changed.update(scale_inputs_(model, family, block, inputs, grids))

    compress_blocks(
        model,
        family,
        batches,
        grids,
        InputGram,
        compress_,
        report,
        step_by_step=method.true_sequential,
        prepare_=scale_ if method.awq else None,
    )
    return changed


def _grids(method: QuantizationMethod, family: Architecture, num_layers: int, tied: bool) -> dict[str, Grid | None]:
    """The grid of every layer that could be quantized; None where it is left alone."""
    modules: dict[str, Grid | None] = dict.fromkeys(family.all_linears(num_layers), method.weights)
    modules[family.embedding] = method.embeddings
    modules[family.lm_head] = method.embeddings
    for module in matching(list(modules), method.ignore):
        modules[module] = None
    if tied:
        if modules[family.embedding] != modules[family.lm_head]:
            raise ValueError(
                f"{family.embedding} and {family.lm_head} share one weight here, so `ignore` must name both or "
                f"neither; got {', '.join(method.ignore)}. Set `embeddings` to null to leave both alone."
            )
        del modules[family.lm_head]
    if not any(modules.values()):
        raise ValueError(f"At least one layer must be quantized; `ignore` ({', '.join(method.ignore)}) leaves none.")
    return modules


def _measure(
    name: str,
    values: NDArray[np.float32],
    weight: QuantizedWeight,
    output_error: float | None = None,
    note: str = "",
) -> tuple[QuantizedLayer, float, float]:
    """The layer's figures, and the squared norms of its error and of its weights."""
    error = values - weight.dequantize()
    error_squared = float(np.square(error, dtype=np.float64).sum())
    norm_squared = float(np.square(values, dtype=np.float64).sum())
    layer = QuantizedLayer(
        name=name,
        num_weights=values.size,
        bits=weight.bits,
        symmetric=weight.zero_point is None,
        group_size=weight.group_size,
        bits_per_weight=weight.size_bits / values.size,
        relative_error=(error_squared / norm_squared) ** 0.5 if norm_squared else 0.0,
        max_error=float(np.abs(error).max()),
        sqnr_db=10 * math.log10(norm_squared / error_squared) if error_squared and norm_squared else None,
        output_error=output_error,
        note=note,
    )
    return layer, error_squared, norm_squared


def _refuse_not_finite(values: "Tensor", name: str) -> None:
    if not values.isfinite().all():
        raise ValueError(
            f"Weights must be finite; {name} holds NaN or infinite values. "
            "The checkpoint is damaged or its training diverged: use another."
        )
