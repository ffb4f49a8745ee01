import copy
import json

import pytest
import yaml
from jsonschema import Draft202012Validator

from flows import recipe as recipes
from flows.recipe import Recipe, RecipeError, load, parse

INT8 = {"method": "rtn", "weights": {"bits": 8, "symmetric": True}}
GOOD = {
    "name": "tiny_cpu",
    "source": "./tiny",
    "candidates": {"int8": {"quantization": INT8}},
    "engines": [{"engine": "onnxruntime", "precision": "float32"}],
}


def changed(**changes) -> dict:
    return {**copy.deepcopy(GOOD), **changes}


def refusal(content: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(content)
    return str(caught.value)


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_is_valid_and_names_the_schema(name):
    path = recipes.directory() / f"{name}.yaml"
    assert load(path).name == name
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")


def test_the_shipped_schema_is_the_one_of_the_code():
    shipped = json.loads((recipes.directory() / "recipe.schema.json").read_text())
    assert shipped == Recipe.model_json_schema(), "run: slimline schema -o recipes/recipe.schema.json"


@pytest.mark.parametrize("name", recipes.names())
def test_shipped_recipes_keep_the_schema_that_editors_use(name):
    schema = json.loads((recipes.directory() / "recipe.schema.json").read_text())
    content = yaml.safe_load((recipes.directory() / f"{name}.yaml").read_text())
    Draft202012Validator(schema).validate({k: v for k, v in content.items() if not k.startswith("x-")})


def test_a_recipe_survives_json():
    recipe = parse(GOOD)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_misspelt_option_names_the_nearest():
    text = refusal(changed(candidates={"a": {"pruning": {"method": "width", "keeep": 0.5}}}))
    assert "candidates.a.pruning.keeep: there is no such option. Did you mean 'keep'?" in text


def test_a_wrong_method_names_the_allowed_ones():
    text = refusal(changed(candidates={"a": {"pruning": {"method": "wonda"}}}))
    assert "'wonda' is unknown. Did you mean 'wanda'? Allowed: magnitude, wanda, width" in text


def test_a_value_out_of_range_names_value_and_bound():
    text = refusal(changed(candidates={"a": {"quantization": {**INT8, "weights": {"bits": 9}}}}))
    assert "candidates.a.quantization.weights.bits" in text
    assert "less than or equal to 8; got 9" in text


@pytest.mark.parametrize(
    ("engine", "grid", "message"),
    [
        ("onnxruntime", {"bits": 4, "group_size": 24}, "groups divisible by 16; got 24"),
        ("tensorrt", {"bits": 8, "symmetric": False}, "TensorRT takes no zero points"),
        ("tensorrt", {"bits": 4, "symmetric": False, "zero_point": "real"}, "TensorRT takes no zero points"),
        ("tensorrt", {"bits": 5, "full_range": True}, "TensorRT takes 8-bit integers, which hold 5 bits too"),
    ],
)
def test_a_grid_that_an_engine_cannot_hold_is_refused_before_anything_starts(engine, grid, message):
    engines = [{"engine": "openvino", "precision": "float32"}, {"engine": engine, "precision": "float32"}]
    content = changed(candidates={"a": {"quantization": {**INT8, "weights": grid}}}, engines=engines)
    assert f"candidate 'a': {message}" in refusal(content).replace("ONNX Runtime needs quantization ", "")


def test_a_full_range_without_symmetry_is_refused():
    weights = {"bits": 4, "symmetric": False, "full_range": True}
    text = refusal(changed(candidates={"a": {"quantization": {**INT8, "weights": weights}}}))
    assert "an asymmetric grid uses all integers anyway; drop `full_range`" in text


TIMED = {
    "method": "rtn",
    "weights": {"choices": [{"bits": 4, "group_size": 32}, {"bits": 8}], "tpot_ms": 20},
}


def test_a_budget_of_time_on_several_engines_is_refused():
    engines = [*GOOD["engines"], {"engine": "openvino", "precision": "float32"}]
    content = changed(candidates={"a": {"quantization": TIMED}}, engines=engines)
    assert "candidate 'a': `tpot_ms` is a budget on one engine; got 2: onnxruntime, openvino. Name" in refusal(content)
    parse(changed(candidates={"a": {"quantization": TIMED, "engines": GOOD["engines"]}}, engines=engines))


def test_a_budget_of_time_needs_measured_speed():
    content = changed(candidates={"a": {"quantization": TIMED}}, validation={"speed": None})
    assert "`tpot_ms` is measured as validation.speed says, and that is null" in refusal(content)


def test_a_choice_that_the_engine_of_a_budget_of_time_cannot_hold_is_refused():
    choices = [{"bits": 4, "group_size": 24}, {"bits": 8}]
    quantization = {**TIMED, "weights": {"choices": choices, "tpot_ms": 20}}
    assert "groups divisible by 16; got 24" in refusal(changed(candidates={"a": {"quantization": quantization}}))


def test_recovery_without_pruning_is_refused():
    text = refusal(changed(candidates={"a": {"recovery": {"training": {"max_steps": 3}}}}))
    assert "`recovery` trains a pruned model" in text


def test_training_after_quantization_without_quantization_is_refused():
    text = refusal(changed(candidates={"a": {"quantization_training": {"train": "all"}}}))
    assert "`quantization_training` trains a quantized model; add `quantization`" in text


def limits_refused(limits: dict, **validation) -> str:
    return refusal(changed(validation={"limits": limits, **validation}))


def test_a_limit_on_what_is_not_measured_is_refused():
    text = limits_refused({"tpot_ms": {"max": 10}}, speed=None)
    assert "limits.tpot_ms needs validation.speed, which does not measure it here. Set it, or drop the limit." in text
    assert "never_slower_than needs measured speed" in limits_refused({"never_slower_than": ["original"]}, speed=None)


def test_a_limit_on_an_unknown_metric_names_the_nearest_and_what_is_measured():
    text = limits_refused({"perplexty": {"max": 10}}, speed=None)
    assert "there is no such metric. Did you mean 'perplexity'? This recipe measures: bits_per_byte, " in text
    assert "tpot_ms" not in text


def test_an_option_that_limits_do_not_have_names_the_allowed_ones():
    for goals in ({"max_increase_percent": 3}, [{"max_increase_percent": 3}]):
        text = limits_refused({"perplexity": goals})
        assert "max_increase_percent: there is no such option." in text
        assert "Allowed: batch_size, max, max_degradation, max_degradation_percent" in text


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        ({"never_slower_than": "original"}, False),
        ({"perplexity": {"max_increase_percent": 3}}, False),
        ({"perplexty": {"max": 3}}, False),
        ({"perplexity": 3}, False),
        ({"perplexity": {"max_degradation_percent": 3}, "never_slower_than": ["original"]}, True),
        ({"throughput_tokens_per_s": [{"min": 50}, {"min": 90, "batch_size": 8}]}, True),
    ],
)
def test_the_schema_knows_every_metric_and_every_kind_of_limit(limits, what):
    content = changed(validation={"limits": limits})
    assert Draft202012Validator(Recipe.model_json_schema()).is_valid(content) == what


def test_registering_without_limits_is_refused():
    assert "needs a limit" in refusal(changed(register_as="tiny"))


def test_tuning_an_engine_without_settings_is_refused():
    engines = [*GOOD["engines"], {"engine": "tensorrt", "precision": "float16"}]
    content = changed(candidates={"a": {"tune": {}, "engines": engines}})
    assert "`tune` searches settings of onnxruntime, openvino; tensorrt-float16 has none" in refusal(content)


def test_the_same_engine_twice_is_refused():
    assert "lists the same engine twice: onnxruntime" in refusal(changed(engines=GOOD["engines"] * 2))


def test_a_candidate_cannot_take_the_name_of_the_unchanged_model():
    assert "'original' names the unchanged model" in refusal(changed(candidates={"original": {}}))


def test_a_missing_file_lists_the_shipped_recipes(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe .*nope\.yaml\. Shipped recipes: .*smollm2-135m_cpu"):
        load(tmp_path / "nope.yaml")


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- a", "must be a mapping")])
def test_a_file_that_holds_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load(tmp_path / "recipe.yaml")


def test_load_and_price_give_metrics_that_can_be_limited():
    within = {"latency_ms": 2000}
    limits = {
        "goodput_requests_per_s": {"min": 1},
        "cost_per_million_tokens": {"max": 2, "batch_size": 8},
        "cost_per_million_tokens_under_load": {"max": 2},
    }
    price = {"amount": 0.1, "currency": "EUR"}
    found = parse(changed(validation={"load": {"within": within}, "price_per_hour": price, "limits": limits}))
    metrics = found.validation.metrics()
    assert metrics["cost_per_million_tokens"].unit == "EUR per 10⁶ tokens"
    without_price = refusal(changed(validation={"limits": {"cost_per_million_tokens": {"max": 2}}}))
    assert "cost_per_million_tokens" in without_price
    assert "price_per_hour" in without_price
    without_load = refusal(changed(validation={"limits": {"goodput_requests_per_s": {"min": 1}}}))
    assert "validation.load" in without_load


def test_a_price_without_a_measured_throughput_is_refused():
    price = {"amount": 0.1, "currency": "EUR"}
    assert "`price_per_hour` needs a measured throughput" in refusal(
        changed(validation={"speed": None, "price_per_hour": price})
    )
