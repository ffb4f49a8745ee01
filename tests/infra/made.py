"""What tests of the store publish."""

import random
from pathlib import Path

from infra.artifacts import new_directory


def bytes_of(seed: int, size: int) -> bytes:
    """Random ones, the same every time."""
    return random.Random(seed).randbytes(size)


def directory(**contents: bytes) -> Path:
    """A new directory that holds these files."""
    out = new_directory()
    for name, content in contents.items():
        (out / name).write_bytes(content)
    return out
