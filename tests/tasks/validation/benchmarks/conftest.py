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
def damaged_bundle(compile_damaged: Callable[[float], Path]) -> Path:
    """The tiny model with so much noise in one layer that it answers most prompts otherwise."""
    return compile_damaged(0.2)
