"""The flow that people start from the Prefect page: a flat form, from which the recipe is built.

Forms over unions of models are fragile, so every field here is a plain value, with its default filled in. An empty
field keeps what the recipe says.
"""

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field, TypeAdapter
from rich.markup import escape

from flows import recipe as recipes
from flows.optimize import optimize
from flows.outcome import Outcome
from flows.recipe import Recipe, misfit
from infra.console import console
from tasks.engines import Engine, label
from tasks.quantization import QuantizationMethod

EngineName = Literal["onnxruntime", "openvino", "tensorrt"]
PRECISION = {"onnxruntime": "float32", "openvino": "float32", "tensorrt": "float16"}
"""Of engines that the recipe does not name itself."""


@flow(name="start", validate_parameters=True)
def start(
    recipe: Annotated[str, Field(json_schema_extra={"enum": list(recipes.names())})] = "smollm2-135m_cpu",
    source: str = "",
    engines: Annotated[list[EngineName], Field(min_length=1)] = ["onnxruntime", "openvino"],  # noqa: B006 the form's
    max_perplexity_increase_percent: Annotated[float, Field(ge=0)] = 3.0,
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] = 0.9,
    never_slower_than_original: bool = True,
    training_minutes: Annotated[float, Field(ge=0)] = 0.0,
    register_as: str = "",
) -> Outcome:
    """Optimize a model by a shipped recipe, with a few of its options changed.

    Args:
        recipe: Name of a shipped recipe.
        source: Another model: hub id, directory, .gguf, package:, models:/ or s3://.
        engines: Engines of every candidate that names none of its own, as far as they can hold its weights.
        max_perplexity_increase_percent: A candidate that may be above it is not accepted; of recipes for decoders.
        min_top1_agreement: Share of tokens predicted as the original does; of recipes for decoders.
        never_slower_than_original: Reject what is slower than the model in PyTorch.
        training_minutes: Limit for all training together; 0 means as in the recipe.
        register_as: Registered model to join; empty means as in the recipe.
    """
    options = recipes.load(recipes.find(recipe)).model_dump(mode="json")
    if source:
        options["source"] = source
    named = {engine["engine"]: engine for engine in options["engines"]}
    options["engines"] = [named.get(name, {"engine": name, "precision": PRECISION[name]}) for name in engines]
    limits = options["validation"]["limits"]
    limits["never_slower_than"] = ["original"] if never_slower_than_original else []
    if options["validation"]["quality"]:
        limits["perplexity"] = {"max_degradation_percent": max_perplexity_increase_percent}
        limits["top1_agreement"] = {"min": min_top1_agreement}
    if register_as:
        options["register_as"] = register_as
    for note in leave_out_misfits(options):
        console.print(f"[yellow]left out[/] {escape(note)}", soft_wrap=True)
    if training_minutes:
        share_training_time(options, training_minutes)
    return optimize(Recipe.model_validate(options))


def leave_out_misfits(options: dict) -> list[str]:  # type: ignore[type-arg]
    """Take from candidates the engines that cannot hold their weights, and candidates that keep none; in place.

    Returns:
        What was left out and why, a sentence each.
    """
    engines = TypeAdapter(tuple[Engine, ...]).validate_python(options["engines"])
    notes = []
    for name, candidate in list(options["candidates"].items()):
        if candidate["engines"]:
            continue
        method = TypeAdapter(QuantizationMethod | None).validate_python(candidate["quantization"])
        problems = {label(engine): misfit(method, engine) for engine in engines}
        notes += [f"{name} in {engine}: {problem}" for engine, problem in problems.items() if problem]
        fitting = [engine.model_dump(mode="json") for engine in engines if not problems[label(engine)]]
        if not fitting:
            del options["candidates"][name]
        elif len(fitting) < len(engines):
            candidate["engines"] = fitting
    return notes


def share_training_time(options: dict, minutes: float) -> None:  # type: ignore[type-arg]
    """Give every training in `options` its share of `minutes`, by its number of steps; in place."""
    trainings = [
        stage["training"]
        for candidate in options["candidates"].values()
        for stage in (candidate["distillation"], candidate["recovery"], candidate["quantization_training"])
        if stage
    ]
    total = sum(training["max_steps"] for training in trainings)
    for training in trainings:
        training["max_minutes"] = minutes * training["max_steps"] / total
