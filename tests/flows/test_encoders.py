"""An encoder and an encoder-decoder from end to end, through the command line."""

import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from flows.validating import plan_validation
from infra.registry import bundle_at
from infra.settings import settings
from tests.flows.command_line import slimline

INT8 = {"method": "rtn", "weights": {"bits": 8, "symmetric": True}, "embeddings": {"bits": 8, "symmetric": True}}
EMBEDDINGS = {"task": "embeddings", "data": "texts.jsonl", "num_neighbours": 3}


@pytest.fixture(scope="module")
def checkpoint(transformer_checkpoint, save_words, tmp_path_factory):
    """Makes a checkpoint of a class, with a tokenizer."""

    def make(class_name: str, **special: str) -> Path:
        out = tmp_path_factory.mktemp("model") / "checkpoint"
        shutil.copytree(transformer_checkpoint(class_name), out)
        save_words(out, **special)
        return out

    return make


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """With texts of the models' words: documents for windows, and items for benchmarks."""
    home = tmp_path_factory.mktemp("home")
    rng = random.Random(0)

    def text(num_words: int) -> str:
        return " ".join(f"w{rng.randrange(10, 96)}" for _ in range(num_words))

    lines = [json.dumps({"text": text(rng.randrange(4, 30))}) for _ in range(40)]
    (home / "texts.jsonl").write_text("\n".join(lines))
    pairs = [json.dumps({"source": text(12), "reference": text(12)}) for _ in range(12)]
    (home / "pairs.jsonl").write_text("\n".join(pairs))
    (home / "documents.jsonl").write_text("\n".join(json.dumps({"text": text(150)}) for _ in range(60)))
    return home


def recipe(home: Path, source: Path, engine: str, candidate: dict, validation: dict) -> Path:
    corpus = {"corpus": "jsonl", "paths": [str(home / "documents.jsonl")]}
    lengths = {"sequence_length": 32, "evaluation_window": 32, "num_training_tokens": 0}
    content = {
        "name": f"tiny-{engine}",
        "source": str(source),
        "data": {
            **dict.fromkeys(("training", "calibration", "evaluation"), corpus),
            **lengths,
            "num_calibration_sequences": 1,
            "num_evaluation_windows": 4,
        },
        "candidates": {"one": candidate},
        "engines": [{"engine": engine, "precision": "float32"}],
        "validation": {"quality": None, "if_inconclusive": {"max_rounds": 0}, **validation},
        "register_as": f"tiny-{engine}",
    }
    file = home / f"{engine}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def figures(said: str) -> dict:
    return json.loads(Path(re.search(r"figures\s+(/\S+\.json)", said)[1]).read_text())


@pytest.fixture(scope="module")
def encoder(checkpoint, home):
    validation = {
        "tasks": {"texts": {**EMBEDDINGS, "data": str(home / "texts.jsonl")}},
        "speed": {"prompt_tokens": 16, "new_tokens": 0, "batch_sizes": [1, 2], "num_blocks": 4},
        "limits": {"texts.cosine": {"min": 0.9}, "size_mib": {"max": 1}, "samples_per_s": {"min": 0.1}},
    }
    source = checkpoint("BertModel", sep_token="w1", cls_token="w2")
    return source, slimline(
        "run", str(recipe(home, source, "onnxruntime", {"quantization": INT8}, validation)), home=home
    )


def test_an_encoder_is_quantized_measured_judged_and_registered(encoder):
    _, run = encoder
    assert run.returncode == 0, run.stderr + run.stdout
    assert "models:/tiny-onnxruntime@candidate" in run.stdout
    head = run.stdout.split("verdict")[0]
    assert "latency" in head
    assert not {"perplexity", "TTFT", "TPOT"} & set(head.split())
    found = figures(run.stdout)
    assert found["reference"] is None
    assert found["winner"] == "one/onnxruntime"
    (row,) = [row for row in found["rows"] if row["judgement"]]
    assert {check["figure"] for check in row["judgement"]["checks"]} == {
        "texts.cosine",
        "size_mib",
        "samples_per_s.batch_1",
    }
    assert 0.9 < row["figures"]["texts.cosine"]["value"]["value"] < 1
    assert row["parity"]["min_cosine"] > 0.98
    speed = found["speed"]["subjects"]["one/onnxruntime"]
    assert speed["ttft_ms"] is None
    latency = row["figures"]["latency_ms.p50.batch_2"]["value"]["value"]
    assert latency == speed["by_batch_size"]["2"]["latency_ms"]["p50"]["value"]
    tokens, samples = (row["figures"][f"{name}.batch_2"]["value"]["value"] for name in (
        "throughput_tokens_per_s", "samples_per_s"))  # fmt: skip
    assert tokens == pytest.approx(16 * samples)
    assert samples == pytest.approx(2 / latency * 1000, rel=0.01)


def test_its_page_has_no_columns_of_what_it_has_not(encoder):
    page = Path(re.search(r"report\s+(/\S+\.html)", encoder[1].stdout)[1]).read_text()
    for word in ("perplexity", "TTFT", "TPOT", "next token"):
        assert word not in page.split("<h3")[0] + page.split("<h2>Words</h2>")[1], word
    assert "texts<br>cosine" in page
    assert "latency of a batch of 2" in page


def test_its_bundle_is_validated_against_the_original_with_defaults_of_its_kind(encoder, home):
    source, _ = encoder
    (bundle,) = [
        path.parent for path in home.glob("artifacts/*/files/manifest.json") if _weights(path.parent) == "int8"
    ]
    planned, _ = plan_validation(str(bundle), str(source), recipe=None, options=[])
    assert planned.validation.quality is None
    assert planned.validation.speed.new_tokens == 0
    with pytest.raises(ValueError, match=r"Give a benchmark in `tasks`"):
        plan_validation(str(bundle), str(source), recipe=None, options=["validation.limits.size_mib.max=1"])
    with pytest.raises(ValueError, match=r"speed.new_tokens is 8. Write `new_tokens: 0`"):
        plan_validation(str(bundle), str(source), recipe=None, options=["validation.speed.new_tokens=8"])
    run = slimline(
        "validate", str(bundle), "--against", str(source), "--recipe", str(home / "onnxruntime.yaml"),
        "--set", "validation.speed=null", "--set", "validation.limits={texts.cosine: {min: 0.99999}}", home=home,
    )  # fmt: skip
    assert run.returncode == 3, run.stderr + run.stdout
    (row,) = figures(run.stdout)["rows"]
    assert row["judgement"]["verdict"] == "REJECT"
    assert row["diagnosis"]["of"] == "worse"


@pytest.fixture
def at_home(home, monkeypatch):
    """This process has the home of the runs."""
    monkeypatch.setenv("SLIMLINE_HOME", str(home))
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.usefixtures("at_home")
def test_its_registered_version_gives_vectors(encoder):
    from tasks.engines.embedding import embed
    from tasks.engines.exported import load_exported
    from tasks.serving import Served

    bundle = bundle_at("models:/tiny-onnxruntime@candidate")
    assert _weights(bundle) == "int8"
    served, texts = Served(), ["w10 w11 w12", "w13"]
    served.load_context(SimpleNamespace(artifacts={"bundle": str(bundle)}))
    vectors = served.predict(None, pd.DataFrame({"prompt": texts}))
    expected = list(embed(load_exported(bundle, "onnxruntime", 1), served.tokenizer, texts))
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    assert np.shape(vectors) == (2, 32)


def _weights(bundle: Path) -> str:
    config = json.loads((bundle / "config.json").read_text())
    return "int8" if config.get("quantization_config") else "float"


def test_an_encoder_decoder_is_measured_and_judged_by_what_it_writes(checkpoint, home):
    validation = {
        "tasks": {
            "pairs": {
                "task": "translation",
                "data": str(home / "pairs.jsonl"),
                "prompt": "{source}",
                "max_new_tokens": 6,
            }
        },
        "speed": {"prompt_tokens": 12, "new_tokens": 5, "batch_sizes": [1, 2], "num_blocks": 3},
        "limits": {"pairs.chrf": {"max_degradation": 90, "max_gain_percent": 1000}, "size_mib": {"max": 1}},
    }
    source = checkpoint("T5ForConditionalGeneration", eos_token="w1")
    run = slimline("run", str(recipe(home, source, "openvino", {}, validation)), home=home)
    assert run.returncode == 0, run.stderr + run.stdout
    found = figures(run.stdout)
    (row,) = [row for row in found["rows"] if row["judgement"]]
    assert row["judgement"]["verdict"] == "ACCEPT"
    speed = found["speed"]["subjects"]["one/openvino"]
    assert speed["inter_token_ms"]["num"] == 3 * 4
    assert found["speed"]["subjects"]["original"]["tpot_ms"]["p50"]["value"] > 0
    assert row["parity"]["top1_agreement"] > 0.9
