"""Stage: a float checkpoint in, a compressed-tensors checkpoint out, one block or tensor in memory at a time."""

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tasks.calibration.architectures import Architecture
from tasks.calibration.checkpoints import copy_tokenizer
from tasks.calibration.exported_families import kind_at
from tasks.calibration.progress import Report, silent
from tasks.calibration.tensor_files import Tensors, TensorWriter, refuse_not_finite
from tasks.calibration.tokens import calibration_batches
from tasks.quantization import FromSource, Gptq, Grid, QuantizationMethod, RoundToNearest
from tasks.quantization.activations import Activations, Format, Inputs
from tasks.quantization.blocks import BATCH_SIZE, quantize_blocks
from tasks.quantization.checkpoint_format import (
    Scheme,
    linear_scheme,
    linear_tensors,
    plain_scheme,
    quantization_config,
    table_tensors,
)
from tasks.quantization.exported import quantize_exported
from tasks.quantization.input_scales import add_scales, check_length, kinds_of_inputs, write_config
from tasks.quantization.mixed import Mixed, Score, allocate
from tasks.quantization.plan import Plan, plan
from tasks.quantization.sensitivity import measure_divergence, read_scores
from tasks.quantization.smoothquant import smoothed
from tasks.quantization.source_weights import SourceWeights
from tasks.quantization.summary import Measured, QuantizationSummary, describe, measure, summarize, with_inputs
from tasks.quantization.token_times import read_times

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 5
CAUTION = 0.9
"""Of what a failed attempt suggests: the next one should not fail by a hair."""


def quantize_checkpoint(
    *,
    checkpoint: Path,
    data: Path,
    method: QuantizationMethod,
    out: Path,
    scores: Path | None = None,
    times: Path | None = None,
    work_dir: Path | None = None,
    report: Report = silent,
) -> QuantizationSummary:
    """Quantize the linear layers of a checkpoint, and its embedding and LM head where `method` says so.

    Args:
        checkpoint: plain checkpoint directory, float, of a family in `architectures.py`, or one that `is_exported`.
        data: prepared data; round to nearest reads none of it, other methods its calibration tokens, as do static
            scales of activations and of the KV cache, and SmoothQuant.
        method: how.
        out: empty directory; gets a compressed-tensors checkpoint (see `checkpoint_format.py`). Whatever is not
            quantized is float32.
        scores: what `measure_sensitivity` wrote for this checkpoint, where `method` leaves the choice of grids to it.
        times: what `measure_tpot` wrote for this checkpoint, where the budget is one of time.
        work_dir: keeps finished blocks; a second call with the same arguments goes on after the last one and, on the
            same machine, ends with the very same bits. Round to nearest, a matter of seconds, begins again. None:
            nothing is kept.
        report: told after every block, or tensor.

    Raises:
        ValueError: the checkpoint is quantized already, of an unknown family or not finite; a group size does not
            divide a layer; a pattern matches no layer, or everything is ignored; calibration is too short;
            `work_dir` belongs to other arguments; no choice of grids keeps the budget.
    """
    if kind_at(checkpoint) != "decoder":
        return quantize_exported(checkpoint=checkpoint, method=method, out=out, report=report)
    if isinstance(method, FromSource) or not isinstance(method.weights, Mixed):
        return _quantize(checkpoint, data, method, {}, out, work_dir, report)
    assert scores is not None  # the flow measures them first
    measured = read_scores(scores)
    if method.weights.max_kl is None:
        allocation = allocate(measured, method.weights, times=read_times(times) if times else None)
        summary = _quantize(checkpoint, data, method, allocation.grids, out, work_dir, report)
        return summary.model_copy(update={"mixed": describe(allocation)})
    return _within_divergence(checkpoint, data, method, measured, method.weights.max_kl, out, work_dir, report)


def _within_divergence(
    checkpoint: Path,
    data: Path,
    method: RoundToNearest | Gptq,
    scores: list[Score],
    max_kl: float,
    out: Path,
    work_dir: Path | None,
    report: Report,
) -> QuantizationSummary:
    """The smallest of the tried models whose divergence, measured as a whole, is at most `max_kl`.

    Parts' divergences add up only roughly; where the sum promised too much, the next try is held to less.
    """
    assert isinstance(method.weights, Mixed)
    aim, kl = max_kl, math.inf
    for attempt in range(1, MAX_ATTEMPTS + 1):
        allocation = allocate(scores, method.weights, max_kl=aim)
        kept = work_dir / f"attempt-{attempt}" if work_dir else None
        summary = _quantize(checkpoint, data, method, allocation.grids, out, kept, report)
        kl = measure_divergence(checkpoint, out, data)
        logger.info("attempt %d: %.4g bits, KL %.4g nats", attempt, allocation.bits_per_weight, kl)
        if kl <= max_kl:
            return summary.model_copy(update={"mixed": describe(allocation, measured_kl=kl, num_attempts=attempt)})
        aim *= CAUTION * max_kl / kl
        for file in out.iterdir():
            file.unlink()
    raise ValueError(
        f"max_kl is {max_kl:g} nats; after {MAX_ATTEMPTS} attempts the model still diverges by {kl:.4g}. "
        "Offer choices with more bits, or raise max_kl."
    )


def _quantize(
    checkpoint: Path,
    data: Path,
    method: QuantizationMethod,
    chosen: dict[str, Grid],
    out: Path,
    work_dir: Path | None,
    report: Report,
) -> QuantizationSummary:
    """See `quantize_checkpoint`; `chosen` are the grids of the layers that mixed precision chose for."""
    activations, kv_cache = (None, None) if isinstance(method, FromSource) else (method.activations, method.kv_cache)
    measured: dict[str, Measured] = {}
    walk = None
    with SourceWeights(checkpoint) as source:
        planned = plan(checkpoint, source, method, chosen)
        family, linears = planned.family, planned.linears
        if kv_cache and not family.cache_scales:
            raise ValueError(
                f"`kv_cache` must be left out for the family {family.family}: stock transformers does not take scales "
                f"of its KV cache; got {kv_cache}. Use the engine's own option where it has one."
            )
        inputs = kinds_of_inputs(activations, linears, [module for module in linears if planned.targets[module]])
        batches = _activation_batches(activations, kv_cache, data, int(planned.config["vocab_size"]))
        with (
            _kept(work_dir, out) as work,
            _smooth(checkpoint, activations, family, linears, batches, out, report) as read_from,
            Tensors(read_from) as tensors,
            TensorWriter(out) as writer,
        ):
            if isinstance(method, Gptq):
                grids = {name: grid for name in linears if isinstance(grid := planned.targets[name], Grid)}
                head = planned.head
                walk = quantize_blocks(read_from, tensors, data, family, method, grids, inputs, head, work, report)
                for file in walk.files:
                    writer.add_file(file)
                measured |= {each.layer.name: each for each in walk.measured}
            measured |= _write_the_rest(planned, method, tensors, source, inputs, measured, writer, report)
    copy_tokenizer(checkpoint, out)
    if (checkpoint / "generation_config.json").exists():
        shutil.copyfile(checkpoint / "generation_config.json", out / "generation_config.json")
    size_bytes = writer.size_bytes
    if batches:
        _write_config(out, planned, {name: replace(each.scheme, inputs=()) for name, each in measured.items()}, None)
        found, added = add_scales(out, family, activations, inputs, kv_cache, batches, report)
        size_bytes += added
        measured = {name: with_inputs(each, inputs.get(name), found.get(name)) for name, each in measured.items()}
    _write_config(out, planned, {name: each.scheme for name, each in measured.items()}, kv_cache)
    if planned.left_float:
        logger.info("%d layers stay float32: %s", len(planned.left_float), ", ".join(planned.left_float))
    return summarize(
        list(measured.values()),
        num_parameters=planned.num_parameters,
        size_bytes=size_bytes,
        left_float=planned.left_float,
        resumed_from_block=walk.resumed_from_block if walk else None,
        notes=(walk.notes if walk else []) + source.costs(list(measured.values())),
    )


def _write_the_rest(
    planned: Plan,
    method: QuantizationMethod,
    tensors: Tensors,
    source: SourceWeights,
    inputs: dict[str, Inputs],
    done: dict[str, Measured],
    writer: TensorWriter,
    report: Report,
) -> dict[str, Measured]:
    """Write every tensor that no walk through the blocks has written; the figures of those that are quantized."""
    measured: dict[str, Measured] = {}
    for step, name in enumerate(planned.names, start=1):
        module = name.removesuffix(".weight")
        if name in writer or (name.endswith(".weight") and module in done):
            continue
        values = tensors.copy(name)
        target = planned.targets.get(module) if name.endswith(".weight") else None
        if target is None:
            refuse_not_finite(values, name)
            writer.add({name: values.numpy()})
            report(step, len(planned.names), {})
            continue
        words = "rounded to nearest"
        if isinstance(target, FromSource):
            weight, words = source.carry(module, values.numpy()), "as the source has it"
        else:
            weight = replace(method.quantize(values, target, module), inputs=inputs.get(module))
        is_table = planned.is_table(module)
        scheme = plain_scheme(weight) if is_table else linear_scheme(weight)
        measured[module] = measure(module, values.numpy(), weight, scheme, words)
        writer.add(table_tensors(module, weight, planned.tied_head) if is_table else linear_tensors(module, weight))
        report(step, len(planned.names), {"relative_error": measured[module].layer.relative_error})
    return measured


def _write_config(out: Path, planned: Plan, schemes: dict[str, Scheme], kv_cache: Format | None) -> None:
    """config.json of the quantized checkpoint."""
    family = planned.family
    if planned.tied and family.embedding in schemes:
        schemes = schemes | {family.lm_head: schemes[family.embedding]}
    left_float = list(planned.left_float)
    if planned.tied and family.lm_head not in schemes:
        left_float.append(family.lm_head)
    config = {
        **{key: value for key, value in planned.config.items() if key not in ("torch_dtype", "_name_or_path")},
        "dtype": "float32",
        "quantization_config": quantization_config(schemes, left_float, kv_cache),
    }
    write_config(out, config)


@contextmanager
def _kept(work_dir: Path | None, out: Path) -> Iterator[Path]:
    """`work_dir`, or a directory that is gone after the context."""
    if work_dir:
        yield work_dir
    else:
        with TemporaryDirectory(dir=out) as temporary:
            yield Path(temporary)


def _activation_batches(
    options: Activations | None, kv_cache: Format | None, data: Path, vocab_size: int
) -> "tuple[Tensor, ...]":
    """The calibration tokens that activations need; none where they need none."""
    if not (kv_cache or (options and (options.static or options.smooth))):
        return ()
    batches = calibration_batches(data, vocab_size, BATCH_SIZE)
    check_length(batches)
    return batches


def _smooth(
    checkpoint: Path,
    options: Activations | None,
    family: Architecture,
    linears: list[str],
    batches: "tuple[Tensor, ...]",
    scratch: Path,
    report: Report,
) -> AbstractContextManager[Path]:
    """The checkpoint to quantize: a smoothed copy where the options ask for one."""
    if not (options and options.smooth):
        return nullcontext(checkpoint)
    return smoothed(checkpoint, batches, family, linears, options.smooth, scratch, report)
