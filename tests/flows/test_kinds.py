"""What of a recipe does not suit an encoder or encoder-decoder is said by name before anything runs."""

import json
import zipfile

import pytest

from flows.check import obstacles
from flows.kinds import kind_obstacles
from flows.recipe import RecipeError, parse

INT8 = {"quantization": {"method": "rtn", "weights": {"bits": 8}}}
EMBEDDINGS = {"texts": {"task": "embeddings", "data": "stdlib"}}
TRANSLATION = {"news": {"task": "translation", "data": "news.jsonl", "prompt": "{source}"}}
OF_ENCODER = {"quality": None, "tasks": EMBEDDINGS, "speed": {"new_tokens": 0}}
OF_ENCODER_DECODER = {"quality": None, "tasks": TRANSLATION}
ONNXRUNTIME = {"engine": "onnxruntime", "precision": "float32"}


@pytest.fixture
def recipe(tmp_path):
    def make(family: str, validation: dict, candidate: dict = INT8, engine: dict = ONNXRUNTIME):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        content = {
            "name": "some",
            "source": str(tmp_path),
            "candidates": {"one": candidate},
            "engines": [engine],
            "validation": validation,
        }
        return parse(content)

    return make


@pytest.mark.parametrize(
    ("family", "validation"),
    [("bert", OF_ENCODER), ("t5", OF_ENCODER_DECODER), ("llama", {}), ("bert", {**OF_ENCODER, "speed": None})],
)
def test_what_suits_is_no_obstacle(recipe, family, validation):
    assert kind_obstacles(recipe(family, validation)) == []


@pytest.mark.parametrize(
    ("family", "validation", "candidate", "said"),
    [
        ("bert", {**OF_ENCODER, "quality": {}}, INT8, "source is an encoder (bert). Write `quality: null`"),
        ("bert", {**OF_ENCODER, "speed": {}}, INT8, "speed.new_tokens is 48. Write `new_tokens: 0`"),
        ("llama", {"speed": {"new_tokens": 0}}, INT8, "new_tokens 0 is of encoders; this is a decoder"),
        ("t5", {**OF_ENCODER_DECODER, "speed": {"new_tokens": 0}}, INT8, "this is an encoder-decoder"),
        ("bert", {**OF_ENCODER, "load": {}}, INT8, "validation.load puts decoders under load"),
        ("bert", {**OF_ENCODER, "tasks": TRANSLATION}, INT8, "`task: translation` asks decoders or encoder-decoders"),
        ("llama", {"tasks": EMBEDDINGS}, INT8, "`task: embeddings` asks encoders; the source is a decoder (llama)"),
        (
            "bert",
            OF_ENCODER,
            {"pruning": {"method": "width", "keep": 0.5}},
            "candidate 'one': `pruning` is of decoders",
        ),
        ("t5", OF_ENCODER_DECODER, {"distillation": {"student": {"layers": 1}}}, "`distillation` is of decoders"),
        ("bert", OF_ENCODER, {**INT8, "tune": {}}, "`tune` is of decoders"),
        ("bert", OF_ENCODER, {"quantization": {"method": "gptq"}}, "the family bert are quantized by `method: rtn`"),
        (
            "bert",
            OF_ENCODER,
            {"quantization": {**INT8["quantization"], "activations": {}}},
            "on one grid; got `activations`",
        ),
    ],
)
def test_what_does_not_suit_is_named(recipe, family, validation, candidate, said):
    (problem,) = kind_obstacles(recipe(family, validation, candidate))
    assert said in problem


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"engine": "tensorrt", "precision": "float16"}, "compile for 'onnxruntime' and 'openvino'; got 'tensorrt'"),
        ({**ONNXRUNTIME, "max_length": 64}, "engine onnxruntime: max_length applies to decoders"),
    ],
)
def test_engines_without_a_graph_of_it_are_named(recipe, engine, said):
    (problem,) = kind_obstacles(recipe("bert", OF_ENCODER, {}, engine))
    assert said in problem
    assert problem in obstacles(recipe("bert", OF_ENCODER, {}, engine))


def test_what_only_importing_tells_is_no_obstacle(recipe, tmp_path):
    found = recipe("bert", {})
    (tmp_path / "config.json").unlink()
    assert kind_obstacles(found) == []
    assert kind_obstacles(found.model_copy(update={"source": "s3://bucket/model"})) == []
    assert kind_obstacles(found.model_copy(update={"source": "./nowhere"})) == []


def test_a_source_in_a_zip_file_of_a_package_is_looked_into(recipe, tmp_path, monkeypatch):
    (tmp_path / "some_weights").mkdir()
    with zipfile.ZipFile(tmp_path / "some_weights" / "model.zip", "w") as archive:
        archive.writestr("config.json", '{"model_type": "roberta"}')
    monkeypatch.syspath_prepend(tmp_path)
    found = recipe("llama", {}).model_copy(update={"source": "package:some_weights/model.zip"})
    assert any("source is an encoder (roberta)" in problem for problem in kind_obstacles(found))


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"quality": None, "limits": {"size_mib": {"max": 9}}}, "accepted whatever it answers. Give a benchmark"),
        (
            {**OF_ENCODER, "limits": {"perplexity": {"max_degradation_percent": 3}}},
            "limits.perplexity needs validation.quality, which does not measure it here",
        ),
        ({**OF_ENCODER, "limits": {"ttft_ms": {"max": 9}}}, "limits.ttft_ms needs validation.speed"),
        ({"limits": {"samples_per_s": {"min": 9}}}, r"of an encoder \(`new_tokens: 0`\), which does not measure it"),
        ({"speed": {"new_tokens": 1}}, "speed.new_tokens: must be at least 2"),
        ({"tasks": {"a": {**EMBEDDINGS["texts"], "document": "name"}}}, "leave `document` out"),
    ],
)
def test_limits_on_what_an_encoder_or_decoder_has_not_are_refused(recipe, validation, message):
    with pytest.raises(RecipeError, match=message):
        recipe("bert", validation)


def test_limits_on_what_an_encoder_has_are_taken(recipe):
    limits = {
        "texts.cosine": {"min": 0.99},
        "latency_ms": [{"max_degradation_percent": 0}, {"max": 100, "batch_size": 8}],
        "samples_per_s": {"min": 10, "batch_size": 8},
        "never_slower_than": ["original", "unquantized"],
    }
    assert kind_obstacles(recipe("bert", {**OF_ENCODER, "limits": limits})) == []
