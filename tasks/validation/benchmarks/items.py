"""Items of a benchmark: the lines of a JSON-lines file, each checked, some of them drawn."""

import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tasks.calibration.packages import package_file

PACKAGE, S3 = "package:", "s3://"


@dataclass(frozen=True)
class Item:
    """One line of a data file."""

    line: int  # counted from 1
    fields: dict[str, Any]
    document: int  # items of one document resemble each other, and are resampled together

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


def local_file(data: str) -> Path:
    """Where the file `data` lies on this machine: a path, or package:NAME/FILE.

    Raises:
        ValueError: the package is not installed or has no such file; or `data` is behind a service.
        FileNotFoundError: there is no such file.
    """
    if data.startswith(S3):
        raise ValueError(f"{data} has to be downloaded first; give the file itself.")
    if data.startswith(PACKAGE):
        package, _, file = data.removeprefix(PACKAGE).partition("/")
        if not package or not file:
            raise ValueError(f"A file in a package is written package:NAME/FILE; got {data!r}.")
        return package_file(package, file, install=f"pip install {package.replace('_', '-')}")
    path = Path(data).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"The data file {data} must exist; nothing is there ({Path.cwd()}).")
    return path


def fingerprint(data: str) -> str:
    """A digest that changes with the local file `data`: its name, size and time."""
    file = local_file(data)
    facts = [file.name, file.stat().st_size, file.stat().st_mtime_ns]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_items(file: Path, required: type[BaseModel], document_field: str | None) -> list[Item]:
    """Every line of a JSON-lines file (.jsonl, .jsonl.gz); empty lines are skipped.

    Args:
        file: UTF-8.
        required: fields that each line must have, and their types.
        document_field: names the document of an item; None: each item is a document of its own.

    Raises:
        ValueError: there is no item, or a line is not as it has to be; the message names it.
    """
    items: list[Item] = []
    documents: dict[str, int] = {}
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            fields = _parse(text, number, file)
            _check(fields, required, number, file)
            name = str(number)
            if document_field is not None:
                if document_field not in fields:
                    raise ValueError(_missing(document_field, fields, number, file))
                name = json.dumps(fields[document_field], sort_keys=True)
            items.append(Item(number, fields, documents.setdefault(name, len(documents))))
    if not items:
        raise ValueError(f"A benchmark needs items; {file.name} has none. Give a file with one JSON object per line.")
    return items


def draw(items: Sequence[Item], num_items: int | None, seed: int, file: Path) -> list[Item]:
    """`num_items` of the items, drawn without regard to their order and kept in it; None: all.

    Raises:
        ValueError: there are fewer.
    """
    if num_items is None:
        return list(items)
    if num_items > len(items):
        raise ValueError(
            f"num_items {num_items} needs as many items; {file.name} has {len(items)}. Lower it, or leave it out."
        )
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), num_items))]


def save_items(items: Sequence[Item], file: Path) -> None:
    """Writes items so that `load_items` gives them back."""
    lines = [json.dumps([item.line, item.document, item.fields], ensure_ascii=False) for item in items]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_items(file: Path) -> list[Item]:
    """What `save_items` wrote."""
    read = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [Item(line, fields, document) for line, document, fields in read]


def _parse(text: str, number: int, file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Line {number} of {file.name} must be JSON; it is not: {error}.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"Line {number} of {file.name} must be a JSON object; got {type(fields).__name__}.")
    return fields


def _check(fields: dict[str, Any], required: type[BaseModel], number: int, file: Path) -> None:
    try:
        required.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "missing" and len(first["loc"]) == 1:
            raise ValueError(_missing(name, fields, number, file)) from None
        described = required.model_fields[name].description or required.model_fields[name].annotation
        raise ValueError(
            f"The field {name!r} in line {number} of {file.name} must be: {described} Got {fields[name]!r:.100}."
        ) from None


def _missing(name: str, fields: dict[str, Any], number: int, file: Path) -> str:
    return (
        f"Line {number} of {file.name} must have the field {name!r}; it has {', '.join(map(repr, fields)) or 'none'}."
    )
