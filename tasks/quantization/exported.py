"""Round to nearest for encoders and encoder-decoders, whose blocks no row of `architectures.py` describes.

Which layers: the linear ones inside blocks (whatever a number in the name counts), and the word embedding with the LM
head that is tied to it. Poolers, classifiers and transforms before a head stay float: they are small, and last. The
model is in memory as a whole. Written as in `checkpoint_format.py`, so stock transformers loads it.
"""

import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.calibration.checkpoints import copy_pooling, copy_tokenizer, portable_config
from tasks.calibration.progress import Report, silent
from tasks.calibration.tensor_files import TensorWriter
from tasks.quantization import QuantizationMethod, RoundToNearest
from tasks.quantization.checkpoint_format import (
    Scheme,
    linear_scheme,
    linear_tensors,
    plain_scheme,
    plain_tensors,
    quantization_config,
    table_tensors,
)
from tasks.quantization.exported_checkpoint import read_checkpoint, read_config
from tasks.quantization.input_scales import write_config
from tasks.quantization.ranges import Grid
from tasks.quantization.summary import Measured, QuantizationSummary, measure, summarize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

IN_A_BLOCK = re.compile(r"\.\d+\.")
NEEDS_WEIGHT = ("t5",)
"""Families whose linear layers are stored as int8 arrays, also where they have fewer bits: transformers initializes
their `weight`, and fails where it is packed."""


def quantize_exported(
    *, checkpoint: Path, method: QuantizationMethod, out: Path, report: Report = silent
) -> QuantizationSummary:
    """Quantize the weights of an encoder or encoder-decoder (see `ENCODERS` and `ENCODER_DECODERS`).

    Args:
        checkpoint: plain checkpoint directory, float.
        method: round to nearest, of weights alone, on one grid.
        out: empty directory; gets a compressed-tensors checkpoint. Whatever is not quantized is float32.
        report: told after every tensor.

    Raises:
        ValueError: the method is another; the checkpoint is quantized already, of an unknown family or not finite; a
            group size does not divide a layer; a pattern matches no layer, or everything is ignored.
    """
    config = read_config(checkpoint)
    grid = _grid(method, config["model_type"])
    if config.get("quantization_config"):
        raise ValueError(
            f"Quantization needs a float checkpoint; {checkpoint} is quantized already. Start from the float model."
        )
    assert isinstance(method, RoundToNearest)
    model = read_checkpoint(checkpoint).model
    targets, left_float = _targets(model, method, grid)
    shared = {module: names for module, names in _tables(model).items() if module in targets}
    plain = set(targets) if config["model_type"] in NEEDS_WEIGHT else set(shared)
    measured: dict[str, Measured] = {}
    schemes: dict[str, Scheme] = {}
    with TensorWriter(out) as writer:
        tensors = _tensors(model)
        for step, (name, values) in enumerate(tensors.items(), start=1):
            module = name.removesuffix(".weight")
            target = targets.get(module) if name.endswith(".weight") else None
            if target is None:
                writer.add({name: values.numpy()})
            else:
                weight = method.quantize(values, target, module)
                scheme = plain_scheme(weight) if module in plain else linear_scheme(weight)
                measured[module] = measure(module, values.numpy(), weight, scheme, "rounded to nearest")
                writer.add(plain_tensors(module, weight) if module in plain else linear_tensors(module, weight))
                for other in shared.get(module, ()):
                    writer.add(table_tensors(module, weight, other))
                schemes |= dict.fromkeys([module, *shared.get(module, ())], scheme)
            report(step, len(tensors), {})
    _write_config(out, model, config, schemes, left_float)
    _copy_settings(checkpoint, out)
    logger.info("%d layers stay float32: %s", len(left_float), ", ".join(left_float))
    return summarize(
        list(measured.values()),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        size_bytes=writer.size_bytes,
        left_float=left_float,
        resumed_from_block=None,
        notes=[],
    )


def _grid(method: QuantizationMethod, family: str) -> Grid:
    """The one grid of a method that can be applied.

    Raises:
        ValueError: it cannot.
    """
    if problem := cannot_quantize(method, family):
        raise ValueError(problem)
    assert isinstance(method, RoundToNearest)
    assert isinstance(method.weights, Grid)
    return method.weights


def cannot_quantize(method: QuantizationMethod, family: str) -> str | None:
    """Why models of a family that `is_exported` cannot be quantized so; None if they can."""
    problem = None
    if not isinstance(method, RoundToNearest):
        problem = f"`method: {method.method}`"
    elif not isinstance(method.weights, Grid):
        problem = "mixed precision"
    elif method.activations or method.kv_cache:
        problem = "`activations`" if method.activations else "`kv_cache`"
    elif method.weights.format == "float8_e4m3":
        problem = f"`format: {method.weights.format}`"
    elif method.weights.zero_point == "real":
        problem = "`zero_point: real`"
    if problem is None:
        return None
    return (
        f"Models of the family {family} are quantized by `method: rtn`, their weights alone, to integers on one "
        f"grid; got {problem}. Leave it out, or use `method: rtn`."
    )


def _tables(model: "PreTrainedModel") -> dict[str, list[str]]:
    """The word embedding by its name, with the modules that share its weight."""
    embedding: Any = model.get_input_embeddings()
    names = [
        name for name, module in model.named_modules() if getattr(module, "weight", None) is embedding.weight
    ]  # the first is what a checkpoint calls it
    return {names[0]: names[1:]}


def _targets(model: "PreTrainedModel", method: RoundToNearest, grid: Grid) -> tuple[dict[str, Grid], dict[str, str]]:
    """The grid of every layer that gets one; of the others, why not."""
    import torch

    from tasks.calibration.architectures import matching

    [(embedding, shared)] = _tables(model).items()
    linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name not in shared]
    inner = [name for name in linears if IN_A_BLOCK.search(name)]
    ignored = matching([*inner, embedding], method.ignore)
    targets = {name: grid for name in inner if name not in ignored}
    left_float = dict.fromkeys(ignored, "`ignore` names it")
    left_float |= dict.fromkeys((name for name in linears if name not in inner), "it is not in a block")
    if embedding not in ignored:
        if method.embeddings:
            targets[embedding] = method.embeddings
        else:
            left_float[embedding] = "`embeddings` is null"
    if not targets:
        raise ValueError(f"At least one layer must be quantized; `ignore` ({', '.join(method.ignore)}) leaves none.")
    return targets, left_float


def _tensors(model: "PreTrainedModel") -> dict[str, Any]:
    """What a checkpoint holds of a model, tied weights once: [...] float32 by name."""
    kept = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - kept
    return {name: values for name, values in model.state_dict().items() if name not in tied}


def _write_config(
    out: Path, model: "PreTrainedModel", config: dict[str, Any], schemes: dict[str, Scheme], left_float: dict[str, str]
) -> None:
    [(embedding, shared)] = _tables(model).items()
    floats = [*left_float, *(shared if embedding in left_float else ())]
    config = portable_config({key: value for key, value in config.items() if key != "torch_dtype"})
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    write_config(out, config | {"quantization_config": quantization_config(schemes, floats)})


def _copy_settings(checkpoint: Path, out: Path) -> None:
    """The tokenizer, and how text is generated or pooled."""
    copy_tokenizer(checkpoint, out)
    copy_pooling(checkpoint, out)
    if (checkpoint / "generation_config.json").exists():
        shutil.copyfile(checkpoint / "generation_config.json", out / "generation_config.json")
