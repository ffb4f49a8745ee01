"""What a token costs in time on one engine, as far as the choices of mixed precision decide it.

Decoding one sequence is bound by reading weights. So what a part gains or loses on a choice is taken as its share, by
weights, of what all parts of its kind (linear layers of blocks, or tables) were together measured to gain or lose
(tasks/validation/tpot.py). The time of a token is then a sum over parts, which an integer program can bound.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from tasks.quantization.ranges import Grid

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tasks.quantization.mixed import Score

TIMES = "tpot.json"

Pair = tuple[Grid, Grid | None]
"""A grid for the linear layers of all blocks, and one for the tables; None: float32."""


class TimedChoice(BaseModel, frozen=True, extra="forbid"):
    """The time of a token with everything of one kind on one choice, and the other kind on its first."""

    grid: Grid | None  # None: float32, which tables can be
    tpot_ms: float = Field(description="Median over requests of batch size 1.")


class TokenTimes(BaseModel, frozen=True, extra="forbid"):
    """What was measured of a model on one engine; the first of both kinds is the same engine."""

    engine: str
    blocks: tuple[TimedChoice, ...]
    tables: tuple[TimedChoice, ...]
    embedding: str = Field(description="Name of the layer that, with the LM head, is the part of the tables.")
    prompt_tokens: int
    new_tokens: int
    num_blocks: int = Field(description="Of time, in each of which every engine answered once.")
    threads: int
    versions: dict[str, str]
    processor: str
    notes: list[str]


def pairs_to_time(choices: Sequence[Grid], tables: Sequence[Grid | None]) -> dict[Pair, Pair]:
    """Every pair of grids whose time is wanted, and the pair that is built and timed for it.

    Blocks are timed on each of `choices` with the tables on their first, tables on each further one of `tables` with
    the blocks on their first. Pairs that differ in their ranges only are one engine: which weights a grid covers, no
    engine knows.
    """
    pairs = [*((choice, tables[0]) for choice in choices), *((choices[0], table) for table in tables[1:])]
    return {pair: (_as_fast(pair[0]), pair[1] and _as_fast(pair[1])) for pair in pairs}


def _as_fast(grid: Grid) -> Grid:
    """The grid that covers every weight and is as fast as `grid`."""
    return grid.model_copy(update={"range": "min-max"})


def read_times(directory: Path) -> TokenTimes:
    """What `measure_tpot` wrote."""
    return TokenTimes.model_validate_json((directory / TIMES).read_text(encoding="utf-8"))


def part_times(scores: "Sequence[Score]", times: TokenTimes) -> "NDArray[np.float64]":
    """What each part on its choice adds to the time of a token.

    Args:
        scores: of every part on every one of its choices.
        times: of these choices.

    Returns:
        [num_scores] float64, ms; with one choice for each part, they add up to the TPOT. What no choice decides is
        spread evenly over the parts.
    """
    import numpy as np

    parts = {score.layers: score.num_weights for score in scores}
    num_weights = {False: 0, True: 0}  # of blocks, of tables
    for layers, num in parts.items():
        num_weights[times.embedding in layers] += num
    measured = {
        is_table: {choice.grid: choice.tpot_ms for choice in choices}
        for is_table, choices in ((False, times.blocks), (True, times.tables))
    }
    first = times.blocks[0].tpot_ms

    def added(score: "Score") -> float:
        is_table = times.embedding in score.layers
        share = score.num_weights / num_weights[is_table]
        return first / len(parts) + share * (measured[is_table][score.grid] - first)

    return np.array([added(score) for score in scores])
