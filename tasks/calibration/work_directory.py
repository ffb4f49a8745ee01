"""Directories in which an interrupted computation finds what it had done; each belongs to one set of arguments."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def claim(work_dir: Path, content: dict[str, Any]) -> None:
    """Write down what `work_dir` is for, or check that it is for the same.

    Args:
        work_dir: made where it is missing.
        content: what decides the result, by the names of arguments; anything JSON can hold.

    Raises:
        ValueError: it holds the work of a run with other arguments.
    """
    record = work_dir / "arguments.json"
    work_dir.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        partial = record.with_suffix(f".{os.getpid()}.partial")  # the processes of one run all come here
        partial.write_text(json.dumps(content, indent=1, sort_keys=True))
        partial.replace(record)
        return
    earlier = json.loads(record.read_text())
    different = [name for name in content if content[name] != earlier.get(name)]
    if different:
        raise ValueError(
            f"A work directory belongs to one run; {work_dir} holds the work of one with other "
            f"{', '.join(different)}. Delete it, or use another."
        )


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in a directory, by name."""
    return {path.name: digest(path) for path in sorted(directory.iterdir()) if path.is_file()}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
