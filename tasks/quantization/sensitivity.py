"""Stage: what rounding each part of a model to each of several grids does to its answers, measured part by part.

A part is what gets one grid: the linear layers of a block that read the same input, which engines multiply at once, or
the embedding with a tied LM head. It alone is rounded to nearest; the divergence is KL(original || changed) of the next
token, averaged over positions of calibration text. The figures are kept, so that other budgets are tried without
measuring again.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, TypeAdapter

from tasks.calibration.architectures import Architecture, architecture, matching
from tasks.calibration.checkpoints import load_model
from tasks.calibration.progress import Report, silent
from tasks.calibration.tokens import calibration_batches
from tasks.quantization.checkpoint_format import QuantizedWeight, read_weights
from tasks.quantization.mixed import Score, size_bits
from tasks.quantization.ranges import Grid
from tasks.quantization.rtn import round_to_nearest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SCORES = "scores.json"
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


def measure_sensitivity(
    *,
    checkpoint: Path,
    data: Path,
    choices: tuple[Grid, ...],
    embedding_choices: tuple[Grid, ...],
    ignore: tuple[str, ...],
    out: Path,
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
        report: told after every part.

    Raises:
        ValueError: a group size does not divide a layer, or `ignore` leaves nothing.
    """
    model = load_model(checkpoint)
    family = architecture(model.config.model_type)
    ids = _tokens(data, model)
    scores = list(_scores(model, family, ids, choices, embedding_choices, ignore, report))
    if not scores:
        raise ValueError(f"At least one layer must be quantized; `ignore` ({', '.join(ignore)}) leaves none.")
    content = [score.model_dump(mode="json") for score in scores]
    (out / SCORES).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
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
    )


def read_scores(directory: Path) -> list[Score]:
    """What `measure_sensitivity` wrote."""
    return TypeAdapter(list[Score]).validate_json((directory / SCORES).read_text(encoding="utf-8"))


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
    report: Report,
) -> Iterable[Score]:
    import torch

    from tasks.calibration.layerwise import RestOfModel

    num_blocks = len(model.get_submodule(family.blocks))
    layers = [*family.all_linears(num_blocks), family.embedding]
    ignored = set(matching(layers, ignore))
    with torch.no_grad():
        rest = RestOfModel(model, family, ids)
        original = rest.log_probabilities(EVERY)
        if embedding_choices and family.embedding not in ignored:
            tied = model.config.tie_word_embeddings
            tables = (family.embedding,) if tied else (family.embedding, family.lm_head)

            def restarted() -> "Tensor":
                return RestOfModel(model, family, ids).log_probabilities(EVERY)

            for grid in embedding_choices:
                yield _score(model, tables, grid, original, restarted)
        for index in range(num_blocks):
            for step in family.steps:
                part = tuple(
                    name for name in (f"{family.block(index)}.{linear}" for linear in step) if name not in ignored
                )
                for grid in choices if part else ():
                    yield _score(model, part, grid, original, lambda: rest.log_probabilities(EVERY))
            rest.advance()
            report(index + 1, num_blocks, {})


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
