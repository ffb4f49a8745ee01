"""Bundles: compiled, compared, read back, and refused when they are not what their manifest says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tasks.engines import OnnxRuntime
from tasks.engines.compiling import MANIFEST, EngineSummary, compile_engine, load_bundle, load_generator, read_manifest
from tasks.engines.pytorch import PyTorch
from tasks.engines.runtimes import SessionRuntime
from tasks.engines.text import Sampling, TextGenerator
from tasks.quantization import RoundToNearest
from tasks.quantization.apply import quantize_checkpoint

ENGINE = OnnxRuntime(precision="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    np.save(out / "evaluation.npy", np.random.default_rng(0).integers(0, 512, (3, 48)).astype(np.int32))
    return out


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized")
    quantize_checkpoint(checkpoint=tiny_checkpoint, data=tiny_checkpoint, method=RoundToNearest(), out=out)
    return out


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineSummary]:
    out = tmp_path_factory.mktemp("bundle")
    return out, compile_engine(checkpoint=checkpoint, data=data, engine=ENGINE, threads=1, out=out)


def test_bundle_generates_the_text_of_pytorch(compiled: tuple[Path, EngineSummary], checkpoint: Path) -> None:
    generator = load_generator(compiled[0], threads=1)
    prompts = [generator.encode(prompt) for prompt in ("def main():", "import")]

    answers, _ = generator.answer(prompts, Sampling(max_new_tokens=8))

    session = PyTorch(precision="float32").load(checkpoint, threads=1)
    reference = TextGenerator(SessionRuntime(session), generator.tokenizer, [0])
    assert answers == reference.answer(prompts, Sampling(max_new_tokens=8))[0]


def test_summary_says_how_close_the_engine_is(compiled: tuple[Path, EngineSummary]) -> None:
    bundle, summary = compiled
    assert summary.status == "run"
    assert summary.parity is not None
    assert summary.parity.num_positions == 3 * 48
    assert 0 < summary.parity.max_abs_error < 0.02
    assert 0 < summary.parity.decode_max_abs_error < 0.02
    assert summary.parity.top1_agreement > 0.98
    assert summary.size_bytes == sum(file.stat().st_size for file in bundle.iterdir())


def test_manifest_names_engine_precision_versions_and_every_file(compiled: tuple[Path, EngineSummary]) -> None:
    bundle, summary = compiled
    manifest = read_manifest(bundle)

    assert manifest.engine == ENGINE
    assert manifest.engine.precision == "float32"
    assert manifest.facts == summary.facts
    assert manifest.facts["products"] == "17 MatMulIntegerToFloat"
    assert manifest.versions.keys() == {"onnx", "onnxruntime", "onnxruntime-genai"}
    assert set(manifest.files) == {file.name for file in bundle.iterdir()} - {MANIFEST}
    assert "model.safetensors" in manifest.checkpoint_files
    assert manifest.processor


def test_same_inputs_give_the_same_bytes(
    compiled: tuple[Path, EngineSummary], checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    compile_engine(checkpoint=checkpoint, data=data, engine=ENGINE, threads=1, out=tmp_path)

    for file in sorted(compiled[0].iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_changed_and_lost_files_are_refused(compiled: tuple[Path, EngineSummary], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(compiled[0], bundle)
    weights = bytearray((bundle / "model.weights").read_bytes())
    weights[5000] ^= 1
    (bundle / "model.weights").write_bytes(weights)

    with pytest.raises(ValueError, match=r"model\.weights .* was changed"):
        load_bundle(bundle, threads=1)
    load_bundle(bundle, threads=1, verify=False)  # for those who checked already
    (bundle / "model.weights").unlink()
    with pytest.raises(ValueError, match=r"lost its file model\.weights"):
        load_bundle(bundle, threads=1)


def _with(bundle: Path, out: Path, **changes: object) -> Path:
    """A copy of a bundle whose manifest says something else."""
    shutil.copytree(bundle, out)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(manifest | changes))
    return out


def test_a_bundle_of_a_newer_library_is_refused_before_it_is_read(compiled, tmp_path: Path) -> None:
    newer = _with(compiled[0], tmp_path / "newer", versions={"onnxruntime": "99.1.0"})
    (newer / "model.onnx").chmod(0o000)
    with pytest.raises(ValueError, match=r"compiled with onnxruntime 99\.1\.0; here is .* older"):
        load_generator(newer, threads=1, verify=False)


def test_another_machine_or_an_older_library_is_pointed_out(compiled, tmp_path: Path, caplog) -> None:
    older = _with(compiled[0], tmp_path / "older", versions={"onnxruntime": "1.2.0"}, processor="Abacus 3000")
    load_bundle(older, threads=1)
    assert "1.2.0" in caplog.text
    assert "Abacus 3000" in caplog.text


def test_a_damaged_graph_is_refused_in_words(compiled, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(compiled[0], damaged)
    (damaged / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"model\.onnx of the engine bundle .* was changed"):
        load_generator(damaged, threads=1)


def test_a_directory_without_manifest_is_no_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        load_bundle(tiny_checkpoint, threads=1)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="not the manifest of an engine bundle"):
        load_bundle(tmp_path, threads=1)


def test_engine_that_is_not_installed_says_how_to_install_it(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'slimline"):
        compile_engine(checkpoint=checkpoint, data=data, engine=ENGINE, threads=1, out=tmp_path)
    assert not list(tmp_path.iterdir())
