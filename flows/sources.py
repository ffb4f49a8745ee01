"""What a recipe means for a source that is quantized already, told from a GGUF file's header before anything runs."""

from flows.recipe import Candidate, Recipe
from tasks.calibration.archives import is_archive
from tasks.calibration.checkpoints import parse_source
from tasks.calibration.gguf_header import read_gguf_header
from tasks.calibration.source_quantization import GGUF_FLOATS
from tasks.engines import label
from tasks.quantization import FromSource, RoundToNearest
from tasks.quantization.source import GGUF_GRIDS

TABLES = ("token_embd.weight", "output.weight")
RECOVERED = ("Q4_1", "Q5_1", "Q8_0")
"""Types whose integers rounding to the nearest value of their grid finds again."""


def source_obstacles(recipe: Recipe) -> list[str]:
    """Why candidates with `method: source` cannot be made; empty where they can, or where only importing tells."""
    methods = {name: candidate.quantization for name, candidate in recipe.candidates.items()}
    carrying = {name: method for name, method in methods.items() if isinstance(method, FromSource)}
    if not carrying or not (types := _gguf_types(recipe.source)):
        return []
    kinds = sorted(set(types.values()) - set(GGUF_FLOATS))
    strange = [tensor for tensor, kind in types.items() if kind in kinds and kind not in GGUF_GRIDS]
    found = []
    for name, method in carrying.items():
        if not kinds:
            found.append(
                f"candidate {name!r}: `method: source` needs a quantized source; {recipe.source} is of floats."
            )
        elif strange and not method.otherwise and not method.ignore:
            found.append(
                f"candidate {name!r}: `method: source` cannot carry {len(strange)} of {len(types)} weights over; the "
                f"first is {strange[0]} ({types[strange[0]]}). Types that it can are {', '.join(GGUF_GRIDS)}. Set "
                "`otherwise` to a grid for the others."
            )
        for engine in recipe.engines_of(recipe.candidates[name]):
            problems = (engine.cannot_hold(GGUF_GRIDS[kind]) for kind in kinds if kind in GGUF_GRIDS)
            if problem := next(filter(None, problems), None):
                found.append(
                    f"candidate {name!r}: the source's weights ({', '.join(kinds)}) do not suit {label(engine)}. "
                    f"{problem} Use `method: rtn` or `gptq` for this engine."
                )
    return found


def source_notes(recipe: Recipe) -> list[str]:
    """What rounds a quantized source's weights a second time."""
    types = _gguf_types(recipe.source)
    kinds = sorted(set(types.values()) - set(GGUF_FLOATS))
    again = [name for name, candidate in recipe.candidates.items() if _rounds_again(candidate, types)]
    if not kinds or not again:
        return []
    note = (
        f"{', '.join(again)}: the source is quantized already (GGUF {', '.join(kinds)}), and its weights are rounded a "
        "second time; the report says what that changes. `method: source` keeps them as they are."
    )
    return [note]


def _rounds_again(candidate: Candidate, types: dict[str, str]) -> bool:
    method = candidate.quantization
    if method is None or isinstance(method, FromSource) or candidate.distillation or candidate.pruning:
        return False
    if not isinstance(method, RoundToNearest):
        return True
    return not all(
        kind in RECOVERED and GGUF_GRIDS[kind] == (method.embeddings if tensor in TABLES else method.weights)
        for tensor, kind in types.items()
    )


def _gguf_types(source: str) -> dict[str, str]:
    """Types of a GGUF source's matrices, by their names in the file; empty for other sources."""
    parsed = parse_source(source)
    if parsed.kind not in ("gguf", "package") or not parsed.path.is_file() or is_archive(parsed.path):
        return {}
    header = read_gguf_header(parsed.path)
    return {name: kind for name, kind in header.types.items() if len(header.shapes[name]) == 2}
