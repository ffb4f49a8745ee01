"""Mixed precision: which part of a model gets which grid, so that it answers most like the original within a budget.

Each part has been rounded to each grid alone, and the KL divergence of the model's answers measured (sensitivity.py).
Rounding errors of different parts are nearly independent, so their divergences add up (to second order; Yao et al.,
HAWQ-V3, ICML 2021, arXiv:2011.10680, section 3.3, choose by the same sum). The best choice under a budget is then an
integer program with one choice per part, solved exactly.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from tasks.quantization.ranges import Grid
from tasks.quantization.token_times import TokenTimes, part_times

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

MIB_BITS = 8 * 2**20


class Mixed(BaseModel, frozen=True, extra="forbid"):
    """A grid for each part of the model, chosen by measured sensitivity; one of the four budgets."""

    choices: tuple[Grid, ...] = Field(
        min_length=1, description="Grids for the linear layers; layers that read the same input share one."
    )
    embedding_choices: tuple[Grid, ...] = Field(
        (), description="Grids for the embedding and a tied LM head, in the same budget; none: they get `embeddings`."
    )
    bits_per_weight: float | None = Field(
        None, gt=0, description="Of all weights that are chosen for, scales and zero points counted; at most."
    )
    size_mib: float | None = Field(None, gt=0, description="Of the same, in MiB; at most.")
    max_kl: float | None = Field(
        None,
        gt=0,
        description="KL divergence from the original, nats per token: the smallest model that stays below. It is "
        "measured after quantization; where it is exceeded, parts fall back to more bits.",
    )
    tpot_ms: float | None = Field(
        None,
        gt=0,
        description="Milliseconds per output token at batch size 1, at most, on the one engine of the candidate: every "
        "choice is measured on it, as validation.speed says, and an allocation's time is the sum of its parts'.",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> "Mixed":
        given = [
            name for name in ("bits_per_weight", "size_mib", "max_kl", "tpot_ms") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "mixed precision needs exactly one of bits_per_weight, size_mib, max_kl and tpot_ms; "
                f"got {' and '.join(given) or 'none'}."
            )
        if len(set(self.choices)) + len(set(self.embedding_choices)) < len(self.choices) + len(self.embedding_choices):
            raise ValueError("mixed precision needs different choices; one is listed twice.")
        if len(self.choices) < 2 and len(self.embedding_choices) < 2:
            raise ValueError("mixed precision needs at least two choices; give more, or make it the grid of `weights`.")
        if any(grid.format == "float8_e4m3" for grid in (*self.choices, *self.embedding_choices)):
            raise ValueError("mixed precision chooses among integers; drop `format`.")
        if any(grid.zero_point == "real" for grid in self.embedding_choices):
            raise ValueError("embeddings are looked up by integer kernels: their `zero_point` must be integer.")
        return self

    @property
    def budget(self) -> str:
        """The budget in words."""
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:g} bits per weight"
        if self.tpot_ms is not None:
            return f"{self.tpot_ms:g} ms per token"
        return f"{self.size_mib:g} MiB" if self.size_mib is not None else f"KL at most {self.max_kl:g} nats"


def _kind(value: Any) -> str:
    return "mixed" if isinstance(value, Mixed) or (isinstance(value, dict) and "choices" in value) else "grid"


Weights = Annotated[Annotated[Grid, Tag("grid")] | Annotated[Mixed, Tag("mixed")], Discriminator(_kind)]
"""One grid for all linear layers, or a choice for each part; a mapping with `choices` is the latter."""


def possible_grids(weights: Grid | Mixed, embeddings: Grid | None) -> tuple[Grid, ...]:
    """Every grid that a method with these options may put weights on."""
    if isinstance(weights, Grid):
        return (weights, embeddings) if embeddings else (weights,)
    tables = weights.embedding_choices or ((embeddings,) if embeddings else ())
    return (*weights.choices, *tables)


class Score(BaseModel, frozen=True, extra="forbid"):
    """What rounding one part of a model to one grid does to the model's answers."""

    layers: tuple[str, ...]
    num_weights: int
    grid: Grid
    size_bits: int  # integers, scales and zero points
    kl: float  # KL(original || with this part rounded), nats per token


class Allocation(BaseModel, frozen=True, extra="forbid"):
    """A grid for every layer, and what that should come to."""

    grids: dict[str, Grid]
    bits_per_weight: float
    size_mib: float
    predicted_kl: float  # the sum of the parts' divergences
    predicted_tpot_ms: float | None  # the sum of their times, where these were measured


def allocate(
    scores: Sequence[Score], options: Mixed, *, max_kl: float | None = None, times: TokenTimes | None = None
) -> Allocation:
    """The choice with the least divergence within the budget, or the smallest one within a limit of divergence.

    Args:
        scores: of every part on every one of its choices.
        options: the budget.
        max_kl: stands in for `options.max_kl`.
        times: of the choices on the engine; needed by `options.tpot_ms`.

    Raises:
        ValueError: even the smallest choice exceeds the budget, or the best one the limit.
    """
    import numpy as np
    from scipy.optimize import LinearConstraint, milp

    parts: dict[tuple[str, ...], list[int]] = {}
    for index, score in enumerate(scores):
        parts.setdefault(score.layers, []).append(index)
    size = np.array([score.size_bits for score in scores], dtype=np.float64)
    kl = np.array([max(score.kl, 0.0) for score in scores])
    num_weights = sum(scores[indices[0]].num_weights for indices in parts.values())
    one_each = np.zeros((len(parts), len(scores)))
    for row, indices in enumerate(parts.values()):
        one_each[row, indices] = 1

    milliseconds = part_times(scores, times) if times else None
    limit = max_kl or options.max_kl
    if limit is not None:
        reachable = sum(min(kl[indices]) for indices in parts.values())
        if reachable > limit:
            raise ValueError(
                f"max_kl is {options.max_kl:g} nats; the best of the choices already comes to {reachable:.4g}"
                f"{f' where {limit:.4g} is needed' if limit != options.max_kl else ''}. "
                "Offer choices with more bits, or raise max_kl."
            )
        goal, bounded, most = size / num_weights, kl, limit
    elif options.tpot_ms is not None:
        assert times is not None  # the flow measures them first
        assert milliseconds is not None
        reachable = sum(min(milliseconds[indices]) for indices in parts.values())
        if reachable > options.tpot_ms:
            raise ValueError(
                f"The fastest of the choices comes to {reachable:.4g} ms per token on {times.engine} "
                f"({times.threads} threads); tpot_ms is {options.tpot_ms:g}. "
                "Offer choices that this engine multiplies faster, or raise the budget."
            )
        goal, bounded, most = kl, milliseconds, options.tpot_ms
    else:
        most = (
            options.size_mib * MIB_BITS
            if options.size_mib is not None
            else (options.bits_per_weight or 0) * num_weights
        )
        reachable = sum(min(size[indices]) for indices in parts.values())
        if reachable > most:
            raise ValueError(
                f"The smallest of the choices comes to {reachable / num_weights:.4g} bits per weight "
                f"({reachable / MIB_BITS:.4g} MiB); the budget is {most / num_weights:.4g} "
                f"({most / MIB_BITS:.4g} MiB). "
                "Offer choices with fewer bits or larger groups, or raise the budget."
            )
        goal, bounded = kl, size
    scale = most or 1.0
    found = milp(
        _scaled(goal),
        integrality=np.ones(len(scores)),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bounded[None] / scale, ub=most / scale)],
        options={"mip_rel_gap": 1e-4},
    )
    assert found.success, found.message  # checked above: something is feasible
    chosen = [int(indices[np.argmax(found.x[indices])]) for indices in map(np.array, parts.values())]
    total = float(size[chosen].sum())
    return Allocation(
        grids={layer: scores[index].grid for index in chosen for layer in scores[index].layers},
        bits_per_weight=total / num_weights,
        size_mib=total / MIB_BITS,
        predicted_kl=float(kl[chosen].sum()),
        predicted_tpot_ms=None if milliseconds is None else float(milliseconds[chosen].sum()),
    )


def _scaled(values: "ArrayLike") -> "ArrayLike":
    """The same goal, with numbers that the solver's tolerances suit."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    return array / (array.max() or 1.0)


def size_bits(grid: Grid, shape: tuple[int, int]) -> int:
    """Bits that a weight [out, in] takes on `grid`: integers, float16 scales, and zero points or offsets."""
    out_features, in_features = shape
    groups = out_features * math.ceil(in_features / (grid.group_size or in_features))
    zero_point = 0 if grid.symmetric else 16 if grid.zero_point == "real" else grid.bits
    return out_features * in_features * grid.bits + groups * (16 + zero_point)


def counts(grids: Mapping[str, Grid]) -> str:
    """How many layers have which grid, for people: "90 of 4 bits in groups of 64, 120 of 8 bits"."""
    found: dict[str, int] = {}
    for grid in grids.values():
        words = f"{grid.bits} bits" + (f" in groups of {grid.group_size}" if grid.group_size else "")
        found[words] = found.get(words, 0) + 1
    return ", ".join(f"{count} of {words}" for words, count in sorted(found.items()))
