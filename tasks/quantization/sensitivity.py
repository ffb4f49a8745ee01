"""Stage: what rounding each part of a model to each of several grids does to its answers, measured part by part.

A part is what gets one grid: the linear layers of a block that read the same input, which engines multiply at once, or
the embedding with a tied LM head. It alone is rounded to nearest; the divergence is KL(original || changed) of the next
token, averaged over positions of calibration text. The figures are kept, so that other budgets are tried without
measuring again.

A work directory holds arguments.json, what it is for, and the scores of the tables and of every finished block. What
finished blocks hand on is computed again, by running each once.
"""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_jsonable_python

from tasks.calibration.architectures import Architecture, architecture, matching
from tasks.calibration.checkpoints import load_model
from tasks.calibration.progress import Report, silent
from tasks.calibration.tensor_files import move_whole
from tasks.calibration.tokens import calibration_batches
from tasks.calibration.work_directory import claim, digest, digests
from tasks.quantization.checkpoint_format import QuantizedWeight, read_weights
from tasks.quantization.mixed import Score, size_bits
from tasks.quantization.ranges import Grid
from tasks.quantization.rtn import round_to_nearest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SCORES = "scores.json"
TABLES = "tables.json"
_SCORES = TypeAdapter(list[Score])
NUM_SEQUENCES = 4
LENGTH = 128
EVERY = 4
"""Positions from one compared distribution to the next: the vocabulary costs as much as the blocks."""


class SensitivitySummary(BaseModel, frozen=True):
    """How sensitive the parts of a model are."""

    num_parts: int
    num_tokens: int  # read; every fourth position's divergence is averaged
    most_sensitive: str  # the part with the largest divergence on its coarsest grid
    most_sensitive_kl: float
    total_kl_coarsest: float  # nats per token, all parts on their smallest grids
    total_kl_finest: float
    resumed_from_block: int | None  # the first that this run measured, going on after an interruption


def measure_sensitivity(
    *,
    checkpoint: Path,
    data: Path,
    choices: tuple[Grid, ...],
    embedding_choices: tuple[Grid, ...],
    ignore: tuple[str, ...],
    out: Path,
    work_dir: Path | None = None,
    report: Report = silent,
) -> SensitivitySummary:
    """Measure every part on every choice, and write the scores to `out`/scores.json.

    Args:
        checkpoint: plain checkpoint directory, float, of a family in `architectures.py`; held as a whole in float32.
        data: prepared data, whose first calibration sequences are used.
        choices: grids for the linear layers of blocks.
        embedding_choices: grids for the embedding and the LM head.
        ignore: layers that will be left alone.
        out: receives the scores.
        work_dir: keeps the scores of finished blocks; a second call with the same arguments goes on after the last one
            and, on the same machine, ends with the very same scores. None: nothing is kept.
        report: told after every block.

    Raises:
        ValueError: a group size does not divide a layer, or `ignore` leaves nothing; `work_dir` is that of other
            arguments.
    """
    model = load_model(checkpoint)
    family = architecture(model.config.model_type)
    ids = _tokens(data, model)
    with TemporaryDirectory(dir=out) as temporary:
        work = work_dir or Path(temporary)
        content = {"checkpoint": digests(checkpoint), "calibration": digest(data / "calibration.npy")}
        options = {"choices": choices, "embedding_choices": embedding_choices, "ignore": ignore}
        claim(work, {**content, **to_jsonable_python(options)})
        scores, first = _scores(model, family, ids, choices, embedding_choices, ignore, work, report)
    if not scores:
        raise ValueError(f"At least one layer must be quantized; `ignore` ({', '.join(ignore)}) leaves none.")
    _write(out / SCORES, scores)
    parts: dict[tuple[str, ...], list[Score]] = {}
    for score in scores:
        parts.setdefault(score.layers, []).append(score)
    coarsest = [min(part, key=lambda score: score.size_bits) for part in parts.values()]
    finest = [max(part, key=lambda score: score.size_bits) for part in parts.values()]
    worst = max(coarsest, key=lambda score: score.kl)
    return SensitivitySummary(
        num_parts=len(parts),
        num_tokens=ids.numel(),
        most_sensitive=worst.layers[0],
        most_sensitive_kl=worst.kl,
        total_kl_coarsest=sum(score.kl for score in coarsest),
        total_kl_finest=sum(score.kl for score in finest),
        resumed_from_block=first or None,
    )


def read_scores(directory: Path) -> list[Score]:
    """What `measure_sensitivity` wrote."""
    return _read(directory / SCORES)


def measure_divergence(checkpoint: Path, quantized: Path, data: Path) -> float:
    """KL(checkpoint || quantized), nats per token, on the tokens that `measure_sensitivity` reads."""
    import torch

    from tasks.calibration.layerwise import RestOfModel

    model = load_model(checkpoint)
    family = architecture(model.config.model_type)
    ids = _tokens(data, model)
    original = RestOfModel(model, family, ids).log_probabilities(EVERY)
    tensors = model.state_dict()
    with torch.no_grad():
        for name, weight in read_weights(quantized).items():
            values = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
            tensors[name].copy_(torch.from_numpy(values))
    return _divergence(original, RestOfModel(model, family, ids).log_probabilities(EVERY))


def _write(file: Path, scores: list[Score]) -> None:
    partial = file.with_suffix(".partial")
    content = [score.model_dump(mode="json") for score in scores]
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    move_whole(partial, file)


def _read(file: Path) -> list[Score]:
    return _SCORES.validate_json(file.read_text(encoding="utf-8"))


def _tokens(data: Path, model: "PreTrainedModel") -> "Tensor":
    import torch

    return torch.cat(calibration_batches(data, model.config.vocab_size, NUM_SEQUENCES))[:NUM_SEQUENCES, :LENGTH]


def _divergence(original: "Tensor", changed: "Tensor") -> float:
    """KL of log probabilities [batch, positions, vocab], the mean over positions."""
    return float((original.exp() * (original - changed)).sum(dim=-1).mean())


def _scores(
    model: "PreTrainedModel",
    family: Architecture,
    ids: "Tensor",
    choices: tuple[Grid, ...],
    embedding_choices: tuple[Grid, ...],
    ignore: tuple[str, ...],
    work: Path,
    report: Report,
) -> tuple[list[Score], int]:
    """Every part on every one of its choices, and the first block that an earlier call has not left in `work`."""
    import torch

    from tasks.calibration.layerwise import RestOfModel

    num_blocks = len(model.get_submodule(family.blocks))
    layers = [*family.all_linears(num_blocks), family.embedding]
    ignored = set(matching(layers, ignore))
    tied = model.config.tie_word_embeddings
    tables = (family.embedding,) if tied else (family.embedding, family.lm_head)
    files = [work / f"block-{index}.json" for index in range(num_blocks)]
    first = next((index for index, file in enumerate(files) if not file.exists()), num_blocks)
    with torch.no_grad():
        rest = RestOfModel(model, family, ids)
        original = rest.log_probabilities(EVERY)

        def restarted() -> "Tensor":
            return RestOfModel(model, family, ids).log_probabilities(EVERY)

        def advanced() -> "Tensor":
            return rest.log_probabilities(EVERY)

        if not (work / TABLES).exists():
            grids = embedding_choices if family.embedding not in ignored else ()
            _write(work / TABLES, [_score(model, tables, grid, original, restarted) for grid in grids])
        for index, file in enumerate(files):
            if index >= first:
                steps = [[f"{family.block(index)}.{linear}" for linear in step] for step in family.steps]
                parts = [tuple(name for name in step if name not in ignored) for step in steps]
                pairs = [(part, grid) for part in parts if part for grid in choices]
                _write(file, [_score(model, part, grid, original, advanced) for part, grid in pairs])
                report(index + 1, num_blocks, {})
            rest.advance()
    return [score for file in (work / TABLES, *files) for score in _read(file)], first


def _score(
    model: "PreTrainedModel",
    layers: tuple[str, ...],
    grid: Grid,
    original: "Tensor",
    log_probabilities: "Callable[[], Tensor]",
) -> Score:
    import torch

    weights = [model.get_submodule(layer).weight for layer in layers]
    before = [weight.detach().clone() for weight in weights]
    for layer, weight, values in zip(layers, weights, before, strict=True):
        weight.copy_(torch.from_numpy(round_to_nearest(values, grid, layer).dequantize()))
    changed = log_probabilities()
    for weight, values in zip(weights, before, strict=True):
        weight.copy_(values)
    return Score(
        layers=layers,
        num_weights=sum(values.numel() for values in before),
        grid=grid,
        size_bits=sum(size_bits(grid, (values.shape[0], values.shape[1])) for values in before),
        kl=_divergence(original, changed),
    )
