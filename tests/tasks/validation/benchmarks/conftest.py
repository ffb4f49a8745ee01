"""Items in files, and what the tiny model writes, by transformers itself."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def write_lines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Iterable[Any]], Path]:
    """Writes a JSON-lines file."""

    def write(items: Iterable[Any]) -> Path:
        file = tmp_path_factory.mktemp("items") / "items.jsonl"
        file.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def greedy(tiny_checkpoint: Path) -> Callable[[str, int], str]:
    """What transformers itself writes greedily with the tiny model after a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)

    def write(prompt: str, max_new_tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    return write


@pytest.fixture(scope="session")
def damaged_bundle(tiny_checkpoint: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with noise in one layer, in ONNX Runtime: it answers most prompts otherwise."""
    import shutil

    import numpy as np
    from safetensors.numpy import load_file, save_file

    from tasks.engines.compiling import compile_engine
    from tasks.engines.onnxruntime import OnnxRuntime

    damaged, bundle = tmp_path_factory.mktemp("damaged") / "checkpoint", tmp_path_factory.mktemp("damaged-bundle")
    shutil.copytree(tiny_checkpoint, damaged)
    weights = load_file(damaged / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] + np.random.default_rng(0).normal(0, 0.2, weights[name].shape).astype(np.float32)
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    engine = OnnxRuntime(precision="float32")
    compile_engine(checkpoint=damaged, data=small_data, engine=engine, threads=1, out=bundle)
    return bundle
