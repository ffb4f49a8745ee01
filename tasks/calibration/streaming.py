"""A walk through a decoder's blocks in the memory of one: weights come from the checkpoint, hidden states go to a file.

The hidden states are kept, rather than computed again from finished blocks, because a walk that goes on after a kill
then has the very bits of one that was not disturbed, at the price of `tokens * hidden_size * 4` bytes of disk, twice.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from tasks.calibration.architectures import Architecture
from tasks.calibration.memory import trim
from tasks.calibration.tensor_files import move_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Weights(Protocol):
    """A checkpoint's weights as float32, by the names of a model's parameters: `tensor_files.Tensors`, for one."""

    def copy(self, name: str) -> Tensor:
        """The weight, in memory of its own."""

    def rows(self, name: str, index: Tensor) -> Tensor:
        """[*index.shape, columns], rows of a table [rows, columns]."""


class Streamed:
    """The residence of an `empty_model`: on disk, but for the block at work and one batch of hidden states."""

    def __init__(
        self, model: "PreTrainedModel", family: Architecture, tensors: Weights, work_dir: Path, first_block: int = 0
    ) -> None:
        """Start where block `first_block` reads; when it is not the first, an earlier walk has left what it reads."""
        self._model = model
        self._embedding = f"{family.embedding}.weight"
        # Gemma's embedding multiplies the rows, in float32 here as transformers does.
        self._scale = getattr(model.get_submodule(family.embedding), "scalar_embed_scale", None)
        self._tensors = tensors
        self._work_dir = work_dir
        self._index = first_block
        if family.positions:  # a small table, which stays
            weight = tensors.copy(f"{family.positions}.weight")
            model.get_submodule(family.positions).load_state_dict({"weight": weight}, assign=True)

    def embed(self, input_ids: Tensor) -> Tensor:
        """The rows of the embedding that are needed."""
        rows = self._tensors.rows(self._embedding, input_ids)
        return rows if self._scale is None else rows * torch.tensor(self._scale)

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        """Read the block's weights as float32; forget them, with their changes, after it."""
        module = self._model.get_submodule(name)
        module.load_state_dict({key: self._tensors.copy(f"{name}.{key}") for key in module.state_dict()}, assign=True)
        try:
            yield
        finally:
            module.to("meta")
            trim()

    def keep(self, index: int, hidden: Iterable[Tensor]) -> None:
        """Write them to a file, which is there only when it is whole; the file that is read meanwhile stays."""
        for file in self._work_dir.glob("hidden-*"):
            if file != self._file(self._index):
                file.unlink()
        partial = self._file(index).with_suffix(".partial")
        with partial.open("wb") as out:
            for batch in hidden:
                np.save(out, batch.numpy(), allow_pickle=False)
        move_whole(partial, self._file(index))
        self._index = index

    def hidden(self) -> Iterator[Tensor]:
        """The batches, in order, each in memory of its own."""
        file = self._file(self._index)
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            while stream.tell() < size_bytes:
                # A copy, because numpy aligns less than torch, and products of matrices depend on that to the last bit.
                yield torch.from_numpy(np.load(stream, allow_pickle=False)).clone()

    def _file(self, index: int) -> Path:
        return self._work_dir / f"hidden-{index}.npy"
