"""The header of a GGUF file: what it says of itself, read in milliseconds and checked against the file's length.

The layout is that of the GGUF specification, version 2 and 3
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, number of tensors, number of
key-value pairs, the pairs, the tensors' names, shapes, types and offsets, then the aligned data.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its data."""

    metadata: dict[str, Any]
    """Scalars and strings by key; an array is replaced by its length."""
    shapes: dict[str, tuple[int, ...]]
    """[out, in] by tensor name, outermost first (the file stores the reverse)."""
    types: dict[str, str]
    """Storage type (F32, Q4_1, …) by tensor name."""

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the GGUF file `path`.

    Raises:
        ValueError: when it is no GGUF file, corrupt, or shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                f"A GGUF file must begin with the bytes 'GGUF'; {path} does not. It is corrupt or no GGUF."
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header, end = _parse(data)
            except (struct.error, UnicodeDecodeError, KeyError, IndexError, OverflowError, ZeroDivisionError) as error:
                raise ValueError(
                    f"{path} is a corrupt or truncated GGUF file ({size} bytes): its header cannot be read. "
                    "Fetch it again."
                ) from error
    if size < end:
        raise ValueError(
            f"{path} is a truncated GGUF file: its header promises {end} bytes; got {size}. Fetch it again."
        )
    return header


def _parse(data: mmap.mmap) -> tuple[GgufHeader, int]:
    """The header, and the length in bytes that the file must have."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    at = 4

    def scalar(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def skip(length: int) -> None:
        nonlocal at
        if length > len(data) - at:
            raise IndexError(length)
        at += length

    def string() -> str:
        length = scalar("Q")
        start = at
        skip(length)
        return data[start:at].decode("utf-8")

    def value(kind: int) -> Any:
        if kind == _STRING:
            return string()
        if kind != _ARRAY:
            return scalar(_SCALARS[kind])
        element, length = scalar("I"), scalar("Q")
        if element in (_STRING, _ARRAY):
            for _ in range(length):
                skip(scalar("Q")) if element == _STRING else value(_ARRAY)
        else:
            skip(struct.calcsize("<" + _SCALARS[element]) * length)
        return length

    version = scalar("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version 2 or 3 is needed; got {version}. Convert the model with a current llama.cpp.")
    num_tensors, num_pairs = scalar("Q"), scalar("Q")
    metadata = {}
    for _ in range(num_pairs):
        key = string()
        metadata[key] = value(scalar("I"))
    shapes, types = {}, {}
    needed = 0
    for _ in range(num_tensors):
        name = string()
        shape = tuple(scalar("Q") for _ in range(scalar("I")))
        kind, offset = scalar("I"), scalar("Q")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError as error:
            raise KeyError(kind) from error
        shapes[name] = shape[::-1]
        types[name] = GGMLQuantizationType(kind).name
        needed = max(needed, offset + math.prod(shape) // block * block_bytes)
    alignment = metadata.get("general.alignment", 32)
    start = -(-at // alignment) * alignment
    return GgufHeader(metadata=metadata, shapes=shapes, types=types), start + needed
