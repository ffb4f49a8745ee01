import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tasks.validation import latency
from tasks.validation.machine import Machine

LIMITS = Machine(
    threads=1,
    read_bytes_per_s={10**7: 2e10, 10**8: 1e10},
    operations_per_s={"float32": 1e11, "bfloat16": 2e11, "int8": 4e11},
)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes seconds, and test_machine.py does it."""
    monkeypatch.setattr(latency, "machine", lambda threads: LIMITS)


@pytest.fixture(scope="session")
def small_data(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six evaluation windows of 48 tokens from the sources of a few modules, prepared as a flow would."""
    import argparse
    import dataclasses
    import difflib
    import optparse
    import pathlib
    import tarfile
    import typing
    import zipfile

    from tasks.calibration.corpora import Data
    from tasks.calibration.tokens import prepare_data

    text = tmp_path_factory.mktemp("text")
    roles = {
        "training": (argparse,),
        "calibration": (difflib,),
        "evaluation": (dataclasses, optparse, pathlib, tarfile, typing, zipfile),
    }
    for role, modules in roles.items():
        for module in modules:
            source = Path(str(module.__file__)).read_text(encoding="utf-8")
            (text / f"{role}-{module.__name__}.txt").write_text(source[2000:8000], encoding="utf-8")
    data = Data.model_validate(
        {role: {"corpus": "text", "paths": [str(text / f"{role}-*.txt")]} for role in roles}
        | {
            "sequence_length": 32,
            "evaluation_window": 48,
            "num_training_tokens": 256,
            "num_calibration_sequences": 2,
            "num_evaluation_windows": 6,
        }
    )
    out = tmp_path_factory.mktemp("data")
    prepare_data(checkpoint=tiny_checkpoint, data=data, seed=0, out=out)
    return out


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, unquantized, in ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    from tasks.engines.compiling import compile_engine
    from tasks.engines.onnxruntime import OnnxRuntime

    out = tmp_path_factory.mktemp("bundle")
    engine = OnnxRuntime(precision="float32")
    compile_engine(checkpoint=tiny_checkpoint, data=small_data, engine=engine, threads=1, out=out)
    return out


@pytest.fixture(scope="session")
def compile_damaged(
    tiny_checkpoint: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[float], Path]:
    """Makes a bundle in ONNX Runtime of the tiny model with noise of a standard deviation in one layer."""
    pytest.importorskip("onnxruntime")
    from safetensors.numpy import load_file, save_file

    from tasks.engines.compiling import compile_engine
    from tasks.engines.onnxruntime import OnnxRuntime

    def make(noise: float) -> Path:
        damaged, bundle = tmp_path_factory.mktemp("damaged") / "checkpoint", tmp_path_factory.mktemp("damaged-bundle")
        shutil.copytree(tiny_checkpoint, damaged)
        weights = load_file(damaged / "model.safetensors")
        name = "model.layers.1.mlp.down_proj.weight"
        added = np.random.default_rng(0).normal(0, noise, weights[name].shape).astype(np.float32)
        weights[name] = weights[name] + added
        save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
        engine = OnnxRuntime(precision="float32")
        compile_engine(checkpoint=damaged, data=small_data, engine=engine, threads=1, out=bundle)
        return bundle

    return make
