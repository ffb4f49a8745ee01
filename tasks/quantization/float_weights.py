"""A checkpoint's weights as floats, one at a time: quantized ones are de-quantized as they are read, and not kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.calibration.tensor_files import Tensors
from tasks.quantization.checkpoint_format import QuantizedWeight, list_weights, quantized_shape, read_quantized

if TYPE_CHECKING:
    from torch import Tensor


class FloatWeights:
    """Reads a plain or compressed-tensors checkpoint by the names of a model's parameters.

    Files are open only while they are read: what is mapped of them counts as memory.
    """

    def __init__(self, checkpoint: Path, base: str) -> None:
        """Read the headers alone.

        Args:
            checkpoint: directory with config.json and safetensors.
            base: the attribute that holds the bare model, such as `model`; files of the bare model name their
                tensors without it.
        """
        self._checkpoint = checkpoint
        config = json.loads((checkpoint / "config.json").read_text())
        self._quantization: dict[str, Any] | None = config.get("quantization_config")
        self._stored: dict[str, str] = {}  # by a parameter's name, that in the files
        self._quantized: dict[str, str] = {}  # by a parameter's name, its module's in the files
        self.shapes: dict[str, list[int]] = {}
        with Tensors(checkpoint) as tensors:
            bare = not any(name.startswith(f"{base}.") for name in tensors.names)
            for stored, module in list_weights(tensors, self._quantization):
                name = f"{base}.{stored}" if bare and not stored.startswith("lm_head.") else stored
                if module:
                    self._quantized[name] = module
                    self.shapes[name] = list(quantized_shape(tensors, module))
                else:
                    self._stored[name] = stored
                    self.shapes[name] = tensors.shape(stored)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def copy(self, name: str) -> "Tensor":
        """The weight as float32, in memory of its own."""
        import torch

        if name in self._quantized:
            return torch.from_numpy(self._read(name).dequantize())
        with Tensors(self._checkpoint) as tensors:
            return tensors.copy(self._stored[name])

    def rows(self, name: str, index: "Tensor") -> "Tensor":
        """[*index.shape, columns] float32, rows of a table [rows, columns]."""
        import torch

        if name in self._quantized:
            found = self._read(name).rows(index.reshape(-1).numpy()).dequantize()
            return torch.from_numpy(found).reshape(*index.shape, -1)
        with Tensors(self._checkpoint) as tensors:
            return tensors.rows(self._stored[name], index)

    def pieces(self, name: str, num_rows: int) -> "Iterator[Tensor]":
        """All rows of a table, float32, `num_rows` at a time."""
        import torch

        total = self.shapes[name][0]
        weight = self._read(name) if name in self._quantized else None
        for start in range(0, total, num_rows):
            index = np.arange(start, min(start + num_rows, total))
            yield (
                torch.from_numpy(weight.rows(index).dequantize())
                if weight
                else self.rows(name, torch.from_numpy(index))
            )

    def _read(self, name: str) -> QuantizedWeight:
        assert self._quantization
        with Tensors(self._checkpoint) as tensors:
            return read_quantized(tensors, self._quantized[name], self._quantization)
