"""The flow that people and schedules start to measure a bundle again: a flat form for `slimline validate`."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows import recipe as recipes
from flows.outcome import Outcome
from flows.validating import command_line, plan_validation, validate

DEFAULTS = "defaults"
"""In place of a recipe's name."""


@flow(name="benchmark", validate_parameters=True)
def benchmark(
    bundle: Annotated[str, Field(min_length=1)] = "models:/smollm2-135m@candidate",
    against: str = "",
    recipe: Annotated[str, Field(json_schema_extra={"enum": [DEFAULTS, *recipes.names()]})] = "smollm2-135m_cpu",
    limits: Annotated[list[str], Field(examples=[["perplexity.max_degradation_percent=1"]])] = [],  # noqa: B006 the form's
) -> Outcome:
    """Measure and judge one engine bundle against another, or against a model.

    Args:
        bundle: What to measure: a directory on the worker, or models:/NAME@ALIAS.
        against: The same, or a model: hub id, directory, package:, s3://. Empty: the model that the recipe starts from.
        recipe: Whose data, validation and limits to take.
        limits: Limits that differ from the recipe's, as NAME=VALUE.
    """
    chosen = None if recipe == DEFAULTS else recipes.load(recipes.find(recipe))
    if not against:
        if chosen is None:
            raise ValueError("against: a bundle is judged against something; got none, and no recipe. Name either.")
        against = chosen.source
    options = [f"validation.limits.{limit}" for limit in limits]
    planned, directory = plan_validation(bundle, against, recipe=chosen, options=options)
    again = command_line(bundle, against, recipe if chosen else None, options)
    return validate(planned, bundle, str(directory), again)
