"""Tensors in safetensors files, read and written a few at a time: no checkpoint has to fit into memory."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
}
"""torch's and numpy's names and those of safetensors, in the order in which its library puts tensors into a file."""
RENAMED = {"embed_out.weight": "lm_head.weight"}
"""Names of tensors in files, of GPT-NeoX, that transformers' own classes call otherwise and rename as they load."""
_COPY_BYTES = 16 << 20


def as_loaded(name: str) -> str:
    """What transformers' classes call a tensor of a file."""
    return RENAMED.get(name, name)


class Tensors:
    """Tensors of a checkpoint directory, read from its safetensors one at a time; a context manager.

    Their names are those that transformers' classes have for them.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        index = checkpoint / "model.safetensors.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        self._files = [_open(checkpoint / file) for file in files]
        self._place = {
            as_loaded(name): (open_file, checkpoint / file, name)
            for open_file, file in zip(self._files, files, strict=True)
            for name in open_file.keys()  # noqa: SIM118
        }
        self.names = sorted(self._place)

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.__exit__(None, None, None)

    def __contains__(self, name: str) -> bool:
        return name in self._place

    @property
    def files(self) -> dict[str, str]:
        """Which file holds each tensor."""
        return {name: file.name for name, (_, file, _) in self._place.items()}

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading it."""
        open_file, _, stored = self._place[name]
        return list(open_file.get_slice(stored).get_shape())

    def tensor(self, name: str) -> "Tensor":
        """The tensor, in its own dtype; mapped, so what was read of it counts as memory until the files are closed."""
        open_file, _, stored = self._place[name]
        return open_file.get_tensor(stored)  # type: ignore[no-any-return]

    def floats(self, name: str) -> NDArray[np.float32]:
        """The tensor as float32, mapped as `tensor` is where it is stored so."""
        values: NDArray[np.float32] = self.tensor(name).float().numpy()
        return values

    def copy(self, name: str) -> "Tensor":
        """The tensor as float32 in memory of its own; nothing stays mapped."""
        import torch

        _, file, stored = self._place[name]
        header, begin = _header(file)
        entry = header[stored]
        start, end = entry["data_offsets"]
        ours = {theirs: ours for ours, theirs in DTYPES.items()}.get(entry["dtype"])
        if ours is None:
            raise ValueError(
                f"Tensors must be of {', '.join(DTYPES)}; {stored} in {file} is {entry['dtype']}. "
                "Convert the checkpoint to float32."
            )
        read = torch.empty(end - start, dtype=torch.uint8)
        with file.open("rb") as stream:
            stream.seek(begin + start)
            stream.readinto(read.numpy())
        return read.view(getattr(torch, ours)).reshape(entry["shape"]).float()

    def rows(self, name: str, index: "Tensor") -> "Tensor":
        """[*index.shape, columns] float32, rows of a table [rows, columns]; the others are not read."""
        _, path, stored = self._place[name]
        with _open(path) as file:
            found: Tensor = file.get_tensor(stored)[index]
        return found.float()


def refuse_not_finite(values: "Tensor", name: str) -> None:
    """Raise ValueError, with the name and how many, where a checkpoint's weights hold NaN or infinite values."""
    num_bad = values.numel() - int(values.isfinite().sum())
    if num_bad:
        raise ValueError(
            f"Weights must be finite; {num_bad} of {values.numel()} weights of {name} are NaN or infinite. "
            "The checkpoint is damaged or its training diverged: use another."
        )


def _open(file: Path) -> Any:
    import safetensors

    safe_open: Any = safetensors.safe_open  # its stub has no types
    return safe_open(file, framework="pt")


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their data begins."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


def metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says about itself."""
    found: dict[str, str] = _header(file)[0].get("__metadata__", {})
    return found


def save_whole(file: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that is there either whole or not at all, even after a crash of the machine."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    partial = file.with_suffix(".partial")
    try:
        save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, partial, dict(metadata))
    except SafetensorError as error:  # also what a full disk raises
        raise OSError(f"The weights cannot be written to {file}: {error}. Free some disk space.") from error
    move_whole(partial, file)


def move_whole(partial: Path, file: Path) -> None:
    """Give a file that is written its name, once the disk has all of it."""
    _sync(partial)
    partial.replace(file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Stored(NamedTuple):
    """Where the bytes of a tensor lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size_bytes: int


class TensorWriter:
    """Writes tensors to a checkpoint directory as they come, in files of limited size; a context manager.

    Holds none of them in memory. The files are complete, with their index, once the context ends.
    """

    def __init__(self, out: Path, max_file_bytes: int = 2 << 30) -> None:
        self.size_bytes = 0
        self._out = out
        self._max_file_bytes = max_file_bytes
        self._tensors: dict[str, _Stored] = {}
        self._spool = (out / "tensors.partial").open("wb")

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._spool.close()
        if kind is None:
            self._write_files()
        Path(self._spool.name).unlink()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def add(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Take tensors over, by their names in the file."""
        for name, array in tensors.items():
            values = np.ascontiguousarray(array)
            dtype, start = DTYPES[values.dtype.name], self._spool.tell()
            self._spool.write(values.reshape(-1).view(np.uint8).data)
            self._place(_Stored(name, dtype, values.shape, Path(self._spool.name), start, values.nbytes))

    def add_file(self, file: Path) -> None:
        """Take over the tensors of a safetensors file, which must stay where it is until the context ends."""
        header, begin = _header(file)
        for name, tensor in header.items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                place = (file, begin + start, end - start)
                self._place(_Stored(name, tensor["dtype"], tuple(tensor["shape"]), *place))

    def _place(self, tensor: _Stored) -> None:
        self._tensors[tensor.name] = tensor
        self.size_bytes += tensor.size_bytes

    def _write_files(self) -> None:
        files: list[list[_Stored]] = [[]]
        file_bytes = 0
        for tensor in sorted(self._tensors.values()):
            if files[-1] and file_bytes + tensor.size_bytes > self._max_file_bytes:
                files.append([])
                file_bytes = 0
            files[-1].append(tensor)
            file_bytes += tensor.size_bytes
        if len(files) == 1:
            _assemble(files[0], self._out / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(files, start=1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            _assemble(tensors, self._out / name)
            weight_map |= dict.fromkeys((tensor.name for tensor in tensors), name)
        content = {"metadata": {"total_size": self.size_bytes}, "weight_map": weight_map}
        (self._out / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _assemble(tensors: list[_Stored], file: Path) -> None:
    """Copy tensors into one safetensors file, byte for byte what its library would write."""
    order = list(DTYPES.values())
    tensors = sorted(tensors, key=lambda tensor: (order.index(tensor.dtype), tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            with tensor.file.open("rb") as source:
                _copy(source, tensor.start, tensor.size_bytes, target)


def _copy(source: BinaryIO, start: int, size_bytes: int, target: BinaryIO) -> None:
    source.seek(start)
    while size_bytes:
        chunk = source.read(min(size_bytes, _COPY_BYTES))
        assert chunk, "the file has become shorter"
        target.write(chunk)
        size_bytes -= len(chunk)


def append_tensors(out: Path, tensors: Mapping[str, NDArray[Any]]) -> int:
    """Add a file with more tensors to a complete checkpoint directory, and to its index.

    Returns:
        Bytes of the tensors.
    """
    index = out / "model.safetensors.index.json"
    with Tensors(out) as present:
        weight_map = present.files
    files = sorted({*weight_map.values()})
    renamed = {old: f"model-{i:05d}-of-{len(files) + 1:05d}.safetensors" for i, old in enumerate(files, start=1)}
    for old, new in renamed.items():
        (out / old).rename(out / new)
    with TensorWriter(out) as writer:
        writer.add(tensors)
    last = f"model-{len(files) + 1:05d}-of-{len(files) + 1:05d}.safetensors"
    (out / "model.safetensors").rename(out / last)
    whole = {name: renamed[file] for name, file in weight_map.items()} | dict.fromkeys(tensors, last)
    size_bytes = sum((out / file).stat().st_size for file in set(whole.values()))
    content = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(whole.items()))}
    index.write_text(json.dumps(content, indent=2) + "\n")
    return writer.size_bytes
