from collections.abc import Callable
from pathlib import Path

import pytest

from flows.check import obstacles
from flows.recipe import Recipe, RecipeError, parse
from flows.sources import source_notes, source_obstacles

SOURCE = {"method": "source"}
INT8 = {"method": "rtn", "weights": {"bits": 8}}
ONNX_RUNTIME = {"engine": "onnxruntime", "precision": "float32"}


@pytest.fixture
def recipe(tiny_checkpoint: Path, tmp_path: Path, write_gguf: Callable[..., None]) -> Callable[..., Recipe]:
    """A recipe on a GGUF whose matrices have the types given by patterns."""

    def make(kinds: dict[str, str], *engines: dict[str, str], **candidates: dict[str, object]) -> Recipe:
        file = tmp_path / "tiny.gguf"
        write_gguf(tiny_checkpoint, file, kinds=kinds)
        made = {name: {"quantization": method} for name, method in candidates.items()}
        engines = engines or (ONNX_RUNTIME,)
        return parse({"name": "a", "source": str(file), "candidates": made, "engines": list(engines)})

    return make


def test_a_source_that_engines_hold_is_no_obstacle(recipe: Callable[..., Recipe]) -> None:
    fine = recipe({"*embed*": "Q8_0", "*": "Q4_1"}, int4=SOURCE)
    assert obstacles(fine) == []
    assert source_notes(fine) == []


def test_an_engine_without_zero_points_cannot_take_them_from_the_source(recipe: Callable[..., Recipe]) -> None:
    engines = ({"engine": "tensorrt", "precision": "float16"}, ONNX_RUNTIME)
    (problem,) = source_obstacles(recipe({"*": "Q4_1"}, *engines, int4=SOURCE))
    assert "the source's weights (Q4_1) do not suit tensorrt-float16. TensorRT takes no zero points" in problem
    assert source_obstacles(recipe({"*": "Q4_0"}, *engines, int4=SOURCE)) == []


def test_a_float_source_has_nothing_to_carry_over(recipe: Callable[..., Recipe]) -> None:
    (problem,) = source_obstacles(recipe({}, int4=SOURCE))
    assert "needs a quantized source" in problem
    assert problem.endswith("tiny.gguf is of floats.")


def test_types_that_cannot_be_carried_need_another_grid(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    types = {"token_embd.weight": "Q6_K", "blk.0.ffn_up.weight": "Q4_0"}
    monkeypatch.setattr("flows.sources._gguf_types", lambda source: types)
    (problem,) = source_obstacles(recipe({}, int4=SOURCE))
    assert "cannot carry 1 of 2 weights over; the first is token_embd.weight (Q6_K)" in problem
    assert source_obstacles(recipe({}, int4={**SOURCE, "otherwise": {"bits": 8}})) == []


def test_rounding_a_second_time_is_said(recipe: Callable[..., Recipe]) -> None:
    recovered = {
        "method": "rtn",
        "weights": {"bits": 4, "symmetric": False, "group_size": 32, "zero_point": "real"},
        "embeddings": {"bits": 8, "group_size": 32},
    }
    gptq = {"method": "gptq", "weights": recovered["weights"]}
    told = recipe({"*embed*": "Q8_0", "*": "Q4_1"}, as_it_is=SOURCE, exact=recovered, int8=INT8, gptq=gptq)
    (note,) = source_notes(told)
    assert note.startswith("int8, gptq: the source is quantized already (GGUF Q4_1, Q8_0)")
    assert source_notes(recipe({}, int8=INT8)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"pruning": {"method": "width", "keep": 0.5}},
        {"distillation": {"student": {"layers": 2}, "training": {"max_steps": 1}}},
        {"quantization_training": {"training": {"max_steps": 1}}},
    ],
)
def test_weights_that_a_candidate_changes_are_not_the_sources(change: dict[str, object]) -> None:
    candidate = {**change, "quantization": SOURCE}
    with pytest.raises(RecipeError, match=f"`{next(iter(change))}` changes them; use `method: gptq` or `rtn` with it"):
        parse({"name": "a", "source": "./x", "candidates": {"a": candidate}, "engines": [ONNX_RUNTIME]})
