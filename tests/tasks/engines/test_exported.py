"""From a checkpoint to a bundle and a session, and bundles that cannot be loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.engines.encoder import EncoderSession, PyTorchEncoder, compare_encoders
from tasks.engines.encoder_decoder import Greedy
from tasks.engines.exported import compile_exported, load_exported, read_exported, write_graphs
from tasks.engines.exported_graph import missing
from tasks.quantization.exported_checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def bundle(transformer_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if problem := missing():
        pytest.skip(problem)
    out = tmp_path_factory.mktemp("bundle")
    compile_exported(transformer_checkpoint("BertForSequenceClassification"), "onnxruntime", out)
    return out


def test_checkpoint_becomes_a_session(bundle: Path, transformer_checkpoint: Callable[[str], Path]) -> None:
    session = load_exported(bundle, "onnxruntime", 1)
    assert isinstance(session, EncoderSession)
    source = read_checkpoint(transformer_checkpoint("BertForSequenceClassification"))
    input_ids = np.random.default_rng(0).integers(3, 96, (2, 2))  # as many tokens as classes
    assert session.encode(input_ids)["logits"].shape == (2, 2)
    assert compare_encoders(session, PyTorchEncoder(source, None), input_ids).max_abs_error < 1e-5


def test_bundle_says_what_it_is(bundle: Path) -> None:
    assert {file.name for file in bundle.iterdir()} == {"encoder.onnx", "encoder.onnx.data", "exported.json"}
    assert read_exported(bundle).model_dump() == {
        "format": 1,
        "engine": "onnxruntime",
        "family": "bert",
        "architecture": "BertForSequenceClassification",
        "answers": ("logits",),
        "vocab_size": 96,
        "num_token_types": 2,
        "max_length": 40,
        "activations": "int8",
        "greedy": None,
        "cache_shape": None,
    }


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_same_graphs_give_the_same_bytes(engine: str, exported: Callable[..., Any], tmp_path: Path) -> None:
    found = exported("MarianMTModel")
    greedy = Greedy(decoder_start_token_id=95, eos_token_ids=(0,), pad_token_id=95)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_graphs(found.graphs, found.source, engine, tmp_path / name, greedy=greedy)
    names = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "second").iterdir())
    assert all((tmp_path / "first" / n).read_bytes() == (tmp_path / "second" / n).read_bytes() for n in names)


def test_bundle_of_another_engine_is_refused(bundle: Path) -> None:
    with pytest.raises(ValueError, match="was compiled for onnxruntime; got openvino"):
        load_exported(bundle, "openvino", 1)


def test_precision_that_there_is_not_is_refused(bundle: Path) -> None:
    with pytest.raises(ValueError, match="in float32; got bfloat16"):
        load_exported(bundle, "onnxruntime", 1, precision="bfloat16")


def test_directory_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no exported\.json"):
        read_exported(tmp_path)
    (tmp_path / "exported.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="is not what compiling wrote"):
        read_exported(tmp_path)


def test_decoder_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    if problem := missing():
        pytest.skip(problem)
    with pytest.raises(ValueError, match=r"families bert, .*, marian; got 'llama'"):
        compile_exported(tiny_checkpoint, "onnxruntime", tmp_path)
