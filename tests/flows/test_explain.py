from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from flows.explain import explain


class Wanda(BaseModel, extra="forbid"):
    method: Literal["wanda"] = "wanda"
    sparsity: float = Field(0.5, gt=0, lt=1)


class Width(BaseModel, extra="forbid"):
    method: Literal["width"] = "width"
    keep: float = 0.75


Method = Annotated[Wanda | Width, Field(discriminator="method")]


class Candidate(BaseModel, extra="forbid"):
    pruning: Method | None = None


class Recipe(BaseModel, extra="forbid"):
    seed: int = 0
    candidates: dict[str, Candidate]
    methods: tuple[Method, ...] = ()


def explained(**options) -> str:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"candidates": {}, **options})
    return explain(caught.value, Recipe)


def test_a_misspelt_option_names_the_nearest_one():
    text = explained(candidates={"small": {"pruning": {"method": "wanda", "sparcity": 0.5}}})
    assert text == (
        "  candidates.small.pruning.sparcity: there is no such option. Did you mean 'sparsity'? "
        "Allowed: method, sparsity."
    )


def test_a_misspelt_option_at_the_top_and_in_a_list():
    assert "Did you mean 'seed'?" in explained(sede=1)
    assert "  methods.0.keeep: there is no such option. Did you mean 'keep'?" in explained(
        methods=[{"method": "width", "keeep": 1}]
    )


def test_a_wrong_tag_names_the_allowed_ones():
    text = explained(candidates={"small": {"pruning": {"method": "wonda"}}})
    assert text == "  candidates.small.pruning.method: 'wonda' is unknown. Did you mean 'wanda'? Allowed: wanda, width."


def test_a_missing_tag_is_named():
    assert "'method' is missing" in explained(methods=[{"keep": 0.5}])


def test_a_value_out_of_range_shows_the_bound_and_the_value():
    text = explained(candidates={"small": {"pruning": {"method": "wanda", "sparsity": 1.5}}})
    assert text == "  candidates.small.pruning.sparsity: Input should be less than 1; got 1.5."


def test_every_problem_gets_a_line():
    assert explained(sede=1, seed="many").count("\n") == 1
