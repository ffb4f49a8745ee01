"""What of a recipe does not suit an encoder or encoder-decoder, told from config.json before anything runs.

Where only importing tells what a source is, the stage that cannot do it says so.
"""

from collections.abc import Iterator

from flows.recipe import Candidate, Recipe
from tasks.calibration.checkpoints import model_type
from tasks.calibration.exported_families import a_kind, kind_of
from tasks.engines import label
from tasks.engines.exported_bundle import cannot_compile
from tasks.quantization.exported import cannot_quantize

OF_DECODERS = ("distillation", "pruning", "quantization_training", "tune")
"""Stages of a candidate that no other kind of model takes; `recovery` comes with pruning."""


def kind_obstacles(recipe: Recipe) -> list[str]:
    """Why the kind of the source's model does not suit the recipe; empty where it does, or only importing tells."""
    family = model_type(recipe.source)
    if family is None:
        return []
    kind, validation = kind_of(family), recipe.validation
    what = f"the source is {a_kind(kind)} ({family})"
    found = []
    if validation.speed and (problem := validation.speed.misfit(kind)):
        found.append(f"validation.speed: {problem}")
    for name, benchmark in validation.tasks.items():
        if kind not in benchmark.ASKS:
            asked = " or ".join(f"{each}s" for each in benchmark.ASKS)
            found.append(f"validation.tasks.{name}: `task: {benchmark.task}` asks {asked}; {what}. Leave it out.")
    if kind == "decoder":
        return found
    if validation.quality:
        task = "embeddings" if kind == "encoder" else "translation or summarization"
        found.append(
            f"validation.quality is perplexity and agreement of next tokens, which are measured of decoders; {what}. "
            f"Write `quality: null`, and how good answers are in validation.tasks: {task}."
        )
    if validation.load:
        found.append(f"validation.load puts decoders under load; {what}. Leave `load` out.")
    for name, candidate in recipe.candidates.items():
        found += [f"candidate {name!r}: {problem}" for problem in _unsuited(recipe, candidate, family, what)]
    return found


def _unsuited(recipe: Recipe, candidate: Candidate, family: str, what: str) -> Iterator[str]:
    for stage in OF_DECODERS:
        if getattr(candidate, stage):
            yield f"`{stage}` is of decoders; {what}. Leave it out: `quantization` by `method: rtn` is what it takes."
    if candidate.quantization and (problem := cannot_quantize(candidate.quantization, family)):
        yield problem
    for engine in recipe.engines_of(candidate):
        if problem := cannot_compile(engine):
            yield f"engine {label(engine)}: {problem}"
