"""The integers of a quantized source, read from what the import keeps beside the float checkpoint.

They stand in for a float weight only where they give it back exactly, so that a weight which something has changed is
never taken for the source's.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.calibration.source_quantization import DESCRIPTION, FOLDER
from tasks.calibration.tensor_files import Tensors
from tasks.quantization.checkpoint_format import QuantizedWeight, layer_group, read_quantized
from tasks.quantization.ranges import Grid
from tasks.quantization.source import GGUF_GRIDS, REAL_TABLE, FromSource
from tasks.quantization.summary import Measured

GGUF_BLOCK = 32


class SourceWeights:
    """What the layers of a checkpoint's source were quantized to, if they were; a context manager."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self.forms: dict[str, str] = {}
        """How the source has a module: "GGUF Q4_1", "compressed-tensors int4"."""
        self._types: dict[str, str] = {}  # GGUF's
        self._quantization: dict[str, Any] = {}  # compressed-tensors'
        self._rounds_inputs = False
        self._tensors: Tensors | None = None
        folder = checkpoint / FOLDER
        if not folder.is_dir():
            return
        description = json.loads((folder / DESCRIPTION).read_text())
        self._tensors = Tensors(folder)
        if description["format"] == "gguf":
            self._types = {name.removesuffix(".weight"): kind for name, kind in description["types"].items()}
            self.forms = {module: f"GGUF {kind}" for module, kind in self._types.items()}
        else:
            self._quantization = description["quantization_config"]
            for group in self._quantization["config_groups"].values():
                self._rounds_inputs |= group.pop("input_activations", None) is not None
            for name in self._tensors.names:
                module, _, parameter = name.rpartition(".")
                if parameter == "weight_scale":
                    arguments = layer_group(module, self._quantization)["weights"]
                    self.forms[module] = f"compressed-tensors {arguments.get('type', 'int')}{arguments['num_bits']}"

    def __enter__(self) -> "SourceWeights":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tensors:
            self._tensors.__exit__(*exception)

    def targets(
        self, method: FromSource, modules: Sequence[str], tables: Collection[str]
    ) -> dict[str, Grid | FromSource | None]:
        """What becomes of each module: carried over, put on the grid `otherwise`, or, being a float, left alone.

        Args:
            method: its options.
            modules: that could be carried over.
            tables: those of them that are stored as a table (embedding and LM head).

        Raises:
            ValueError: the source has no integers for any; or some cannot be carried over and there is no `otherwise`.
        """
        if not any(module in self.forms for module in modules):
            raise ValueError(
                f"`method: source` needs a checkpoint as it was imported from a quantized source; {self._checkpoint} "
                + ("has none of these layers quantized there." if self.forms else "keeps no integers of one: it came ")
                + ("" if self.forms else "as floats, or was trained or pruned since. ")
                + "Use `method: rtn` or `gptq`."
            )
        problems = {module: problem for module in modules if (problem := self._problem(module, module in tables))}
        if problems and method.otherwise is None:
            module, problem = next(iter(problems.items()))
            raise ValueError(
                f"{len(problems)} of {sum(module in self.forms for module in modules)} quantized layers cannot be "
                f"carried over as the source has them; the first is {module} ({self.forms[module]}): {problem}. "
                "Set `otherwise` to a grid for such layers, name them in `ignore`, or use `method: rtn` or `gptq`."
            )
        return {
            module: (method.otherwise if module in problems else method) if module in self.forms else None
            for module in modules
        }

    def carry(self, module: str, values: NDArray[np.float32]) -> QuantizedWeight:
        """The source's integers for a module.

        Args:
            module: one that `targets` finds to be carried over.
            values: [out, in] float32, its weight in the checkpoint.

        Raises:
            ValueError: they do not stand for `values`.
        """
        weight = self._read(module)
        expected = weight.dequantize()
        if weight.has_real_zero_point and self._quantization:
            expected = _through_zero_point(weight)
        if expected.shape != values.shape or not np.array_equal(expected, values):
            changed = f"{int((expected != values).sum())} of its " if expected.shape == values.shape else "all "
            raise ValueError(
                f"{module} must be as it was imported for `method: source`; {changed}{values.size} weights are not "
                f"what the source's integers ({self.forms[module]}) stand for. Use `method: rtn` or `gptq` for a "
                "checkpoint that was trained or pruned; import the source again if it was not."
            )
        return weight

    def costs(self, measured: Sequence[Measured]) -> list[str]:
        """Notes on what of the source is lost: by re-quantizing layers, and what is not of weights."""
        inputs = "The source rounds the inputs of linear layers too; that is not carried over."
        return self._requantized(measured) + ([inputs] if self._rounds_inputs else [])

    def _requantized(self, measured: Sequence[Measured]) -> list[str]:
        again = [each for each in measured if each.layer.name in self.forms and each.error_squared > 0]
        norm_squared = sum(each.norm_squared for each in again)
        if not norm_squared:
            return []
        error = (sum(each.error_squared for each in again) / norm_squared) ** 0.5
        forms = ", ".join(sorted({self.forms[each.layer.name] for each in again}))
        note = (
            f"The source was quantized ({forms}); re-quantizing {len(again)} of its layers changed their weights by "
            f"{error:.2%} (relative error)."
        )
        return [note]

    def _problem(self, module: str, is_table: bool) -> str | None:
        """Why a module cannot be carried over; None if it can, or is a float."""
        if module not in self.forms:
            return None
        if self._types:
            kind = self._types[module]
            if kind not in GGUF_GRIDS:
                return f"its scales are products of two; types that can be are {', '.join(GGUF_GRIDS)}"
            return REAL_TABLE if is_table and GGUF_GRIDS[kind].zero_point == "real" else None
        if layer_group(module, self._quantization)["weights"].get("type", "int") != "int":
            return "its floats of 8 bits are no integers"
        try:
            weight = self._read(module)
        except ValueError as error:
            return str(error).rstrip(".")
        if not np.array_equal(_half(weight.scale), weight.scale):
            return "its scales are no float16"
        if not weight.has_real_zero_point:
            return None
        if is_table:
            return REAL_TABLE
        exact = np.isclose(-np.asarray(weight.zero_point), weight.offset / weight.scale, rtol=1e-6, atol=1e-5)
        return None if exact.all() else "its zero points stand for no float16 offsets"

    def _read(self, module: str) -> QuantizedWeight:
        assert self._tensors is not None
        if self._types:
            return from_gguf(self._tensors.tensor(f"{module}.weight").numpy(), self._types[module])
        return read_quantized(self._tensors, module, self._quantization)


def from_gguf(rows: NDArray[np.uint8], kind: str) -> QuantizedWeight:
    """The weight in rows of GGUF blocks.

    A block is d float16, then m float16 (Q4_1, Q5_1), 32 high bits (Q5_0, Q5_1), and 32 integers: int8 (Q8_0), or low
    halves of bytes for the first 16 and high halves for the others. Where d is 0, integers mean nothing: they become
    those of the weights' value on a scale of 1.

    Args:
        rows: [out, bytes] uint8.
        kind: one of `GGUF_GRIDS`.

    Returns:
        [out, in], in groups of 32.
    """
    grid = GGUF_GRIDS[kind]
    widths = [2, 0 if grid.symmetric else 2, 4 if grid.bits == 5 else 0, 32 if grid.bits == 8 else 16]
    blocks = rows.reshape(len(rows), -1, sum(widths))
    d, m, high, low = np.split(blocks, np.cumsum(widths)[:-1], axis=2)
    scale, offset = _floats(d), None if grid.symmetric else _floats(m)
    if grid.bits == 8:
        integers: NDArray[Any] = low.view(np.int8)
    else:
        integers = np.concatenate([low & 15, low >> 4], axis=2)
        if grid.bits == 5:
            integers |= np.unpackbits(high, axis=2, bitorder="little") << 4
        if grid.symmetric:
            integers = integers.view(np.int8) - np.int8(1 << (grid.bits - 1))
    integers = np.where(scale[:, :, None] == 0, integers.dtype.type(0), integers)
    scale = np.where(scale == 0, np.float32(1), scale)
    return QuantizedWeight(
        integers=integers.reshape(len(rows), -1),
        scale=scale,
        zero_point=None if offset is None else -offset / scale,
        bits=grid.bits,
        group_size=GGUF_BLOCK,
    )


def _floats(halves: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[out, groups] float32 of [out, groups, 2] bytes."""
    return np.ascontiguousarray(halves).view("<f2").astype(np.float32)[:, :, 0]


def _half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """`values` as float16 holds them."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _through_zero_point(weight: QuantizedWeight) -> NDArray[np.float32]:
    """[out, in] float32 as compressed-tensors has it, (q - z) * scale; with `offset`, the last bits may differ."""
    groups = weight.integers.reshape(*weight.scale.shape, -1).astype(np.float32)
    values: NDArray[np.float32] = (groups - np.asarray(weight.zero_point)[:, :, None]) * weight.scale[:, :, None]
    return values.reshape(weight.integers.shape)
