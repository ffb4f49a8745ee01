"""What is to be done with every layer of a checkpoint: which are quantized, on which grids, and why others are not."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.calibration.architectures import Architecture, architecture, matching
from tasks.calibration.tensor_files import Tensors
from tasks.quantization import FromSource, Grid, QuantizationMethod
from tasks.quantization.blocks import Head
from tasks.quantization.source_weights import SourceWeights

Target = Grid | FromSource | None
"""A grid, or the source's own integers; None: the layer stays float."""


@dataclass(frozen=True)
class Plan:
    """A checkpoint's layers, and what becomes of each."""

    config: dict[str, Any]  # of the checkpoint
    family: Architecture
    tied: bool  # the LM head is the embedding
    names: list[str]  # of all tensors, tied ones once
    num_parameters: int
    linears: list[str]  # of all blocks, in order
    targets: dict[str, Target]  # of these, the embedding, and the LM head where it is not tied
    left_float: dict[str, str]  # those without a target, and why

    def is_table(self, module: str) -> bool:
        """Whether a module is stored as a table: the embedding or the LM head."""
        return module in (self.family.embedding, self.family.lm_head)

    @property
    def tied_head(self) -> str | None:
        """The LM head's name, where it shares the embedding's weight."""
        return self.family.lm_head if self.tied else None

    @property
    def head(self) -> Head | None:
        """The LM head, where it gets a grid."""
        module = self.family.embedding if self.tied else self.family.lm_head
        grid = self.targets[module]
        return Head(module, self.tied_head, grid) if isinstance(grid, Grid) else None


def plan(checkpoint: Path, source: SourceWeights, method: QuantizationMethod, chosen: dict[str, Grid]) -> Plan:
    """Decide what becomes of each layer.

    Args:
        checkpoint: plain checkpoint directory, float.
        source: what it was imported from.
        method: how to quantize it.
        chosen: the grids of the layers that mixed precision chose for.

    Raises:
        ValueError: the checkpoint is quantized already or of an unknown family; a pattern matches no layer, or
            everything is ignored; the source's integers cannot be carried over.
    """
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    if config.get("quantization_config"):
        raise ValueError(
            f"Quantization needs a float checkpoint; {checkpoint} is quantized already. Start from the float model."
        )
    family = architecture(config["model_type"])
    with Tensors(checkpoint) as tensors:
        shapes = {name: tensors.shape(name) for name in tensors.names}
    head = f"{family.lm_head}.weight"
    tied = bool(config.get("tie_word_embeddings")) or head not in shapes
    config["tie_word_embeddings"] = tied
    names = [name for name in shapes if not (tied and name == head)]
    linears = family.all_linears(int(config[family.num_layers_option]))
    ignored = matching([*linears, family.embedding, family.lm_head], method.ignore)
    targets = _targets(method, chosen, family, linears, ignored, tied)
    if isinstance(method, FromSource):
        carried = [module for module, target in targets.items() if target]
        targets |= source.targets(method, carried, (family.embedding, family.lm_head))
    why = "the source has it as floats" if isinstance(method, FromSource) else "`embeddings` is null"
    return Plan(
        config=config,
        family=family,
        tied=tied,
        names=names,
        num_parameters=sum(math.prod(shapes[name]) for name in names),
        linears=linears,
        targets=targets,
        left_float={
            module: "`ignore` names it" if module in ignored else why
            for module, target in targets.items()
            if target is None
        },
    )


def _targets(
    method: QuantizationMethod,
    chosen: dict[str, Grid],
    family: Architecture,
    linears: list[str],
    ignored: list[str],
    tied: bool,
) -> dict[str, Target]:
    """The target of every layer that could be quantized."""
    modules: dict[str, Target]
    if isinstance(method, FromSource):
        modules = dict.fromkeys([*linears, family.embedding, family.lm_head], method)
    else:
        every = method.weights if isinstance(method.weights, Grid) else None
        modules = {name: chosen.get(name, every) for name in linears}
        modules[family.embedding] = chosen.get(family.embedding, method.embeddings)
        modules[family.lm_head] = chosen.get(family.lm_head, modules[family.embedding])
    modules |= dict.fromkeys(ignored)
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
