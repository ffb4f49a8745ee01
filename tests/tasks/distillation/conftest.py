"""Tokens for the tiny model, of text that its tokenizer was trained on."""

import inspect
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def tiny_data(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare_data` writes, as far as training reads it: sequences of 32 tokens."""
    from tasks.calibration.checkpoints import load_tokenizer, tokenizer_digest

    out = tmp_path_factory.mktemp("data")
    ids = load_tokenizer(tiny_checkpoint)(inspect.getsource(textwrap))["input_ids"]
    sequences = np.array(ids[: len(ids) // 32 * 32], dtype=np.int32).reshape(-1, 32)
    np.save(out / "calibration.npy", sequences[:12])
    np.save(out / "training.npy", sequences[12:])
    record = {"tokenizer_sha256": tokenizer_digest(tiny_checkpoint), "vocab_size": 512}
    (out / "data.json").write_text(json.dumps(record))
    return out
