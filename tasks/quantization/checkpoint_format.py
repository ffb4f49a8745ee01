"""Quantized checkpoints on disk: compressed-tensors, as stock transformers loads it.

Two of its formats are used, because compressed-tensors 0.20 with transformers 5.23 loads nothing else exactly:

* linear layers: `pack-quantized`. `<layer>.weight_packed` holds the integers (see `packing.py`), `.weight_scale`
  [out, groups], `.weight_shape` [2]. Symmetric layers name the strategy `channel` or `group`, as vLLM reads it.
  Asymmetric ones say the same as `block` of [1, group_size] with `.weight_zero_point` [out, groups] int8: transformers
  expects the packed zero points of `group` unpacked, and then refuses the checkpoint for their shape.
* embedding and LM head: `int-quantized`. `<layer>.weight` is the int8 array itself, because transformers initializes
  an embedding through its `weight` and fails where it is packed. Tied ones are stored once: the LM head has only a
  `.weight_scale`, the embedding's, and `tie_word_embeddings` gives it the embedding's integers.

Real-valued zero points (`grid.quantize_from`) are stored as float32, which `zp_dtype` says; then -zero_point * scale
gives back the offset, a float16, to the last bit. Stock transformers recovers them; other readers have not been tried.

Scales are stored as float16; see `grid.py`. compressed-tensors counts every integer from -2 ** (bits - 1), so its
asymmetric integers and zero points are ours less 2 ** (bits - 1).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.calibration.tensor_files import Tensors
from tasks.quantization.packing import pack, unpack

PACKED = "pack-quantized"
PLAIN = "int-quantized"


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A linear layer's weight as ONNX's QuantizeLinear gives it: (integers - zero_point) * scale."""

    integers: (
        NDArray[np.int8] | NDArray[np.uint8]
    )  # [out, in]; int8 when symmetric, uint8 when not; 4 bits: [-8, 7], [0, 15]
    scale: NDArray[np.float32]  # [out, groups]
    zero_point: NDArray[np.uint8] | NDArray[np.float32] | None  # [out, groups]; None when symmetric; float32: any real
    bits: int
    group_size: int | None  # consecutive inputs that share a scale; None: the whole row, and groups is 1

    def dequantize(self) -> NDArray[np.float32]:
        """The weight's values, [out, in] float32."""
        out_features, in_features = self.integers.shape
        values = self.integers.reshape(out_features, self.scale.shape[1], -1).astype(np.float32)
        if self.zero_point is not None and not self.has_real_zero_point:
            values -= self.zero_point[:, :, None]  # integers: exact in float32
        values *= self.scale[:, :, None]
        if self.has_real_zero_point:
            values += self.offset[:, :, None]  # as GGUF and the engines have it; zero points are rounded quotients
        return values.reshape(out_features, in_features)

    @property
    def has_real_zero_point(self) -> bool:
        """Whether the zero points are no integers, so that engines need `offset` instead."""
        return self.zero_point is not None and self.zero_point.dtype == np.float32

    @property
    def offset(self) -> NDArray[np.float32]:
        """What the integer 0 stands for where zero points are real, [out, groups]: -zero_point * scale, a float16."""
        assert self.zero_point is not None
        assert self.has_real_zero_point
        offset: NDArray[np.float32] = -self.zero_point * self.scale
        return offset.astype(np.float16).astype(np.float32)

    @property
    def size_bits(self) -> int:
        """Bits of the integers, the scales (float16) and the zero points or offsets, as engines can store them."""
        bits = 16 if self.has_real_zero_point else self.bits
        zero_points = 0 if self.zero_point is None else self.zero_point.size * bits
        return self.integers.size * self.bits + self.scale.size * 16 + zero_points


def read_weights(checkpoint: Path) -> dict[str, NDArray[np.float32] | QuantizedWeight]:
    """Every weight of a checkpoint, float or quantized, by the name of the module's parameter.

    The LM head is absent where the configuration ties it to the embedding.

    Args:
        checkpoint: directory with config.json and safetensors; plain, or compressed-tensors of the formats
            pack-quantized and int-quantized, also as llm-compressor writes them.

    Returns:
        float32 arrays, and a QuantizedWeight for each `<module>.weight` that is quantized.

    Raises:
        ValueError: a quantized layer is stored in a way this reader does not know.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    quantization = config.get("quantization_config")
    if quantization is not None and quantization.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f"A quantized checkpoint must be in the compressed-tensors format; got "
            f"{quantization.get('quant_method')!r} in {checkpoint}. Start from the model before it was quantized."
        )
    tied = bool(config.get("tie_word_embeddings", False))
    weights: dict[str, NDArray[np.float32] | QuantizedWeight] = {}
    with Tensors(checkpoint) as tensors:
        for name in tensors.names:
            module, _, parameter = name.rpartition(".")
            if tied and module == "lm_head":
                continue
            if quantization is not None and f"{module}.weight_scale" in tensors:
                if parameter in ("weight", "weight_packed"):
                    weights[f"{module}.weight"] = read_quantized(tensors, module, quantization)
                elif not parameter.startswith("weight_"):
                    weights[name] = tensors.floats(name)
            else:
                weights[name] = tensors.floats(name)
    return weights


def read_quantized(tensors: Tensors, module: str, quantization: Mapping[str, Any]) -> QuantizedWeight:
    """A quantized layer's weight, as `quantization_config` and the tensors of its checkpoint have it.

    Raises:
        ValueError: it is stored in a way this reader does not know.
    """
    if f"{module}.weight_g_idx" in tensors:
        raise ValueError(
            f"{module} must keep its inputs in order; it has an activation order (weight_g_idx). "
            "Quantize the model again without `actorder`."
        )
    arguments = layer_scheme(module, quantization)
    bits = int(arguments["num_bits"])
    if arguments.get("type", "int") != "int" or not 1 <= bits <= 8:
        raise ValueError(
            f"{module} must be quantized to integers of at most 8 bits; got {bits}-bit {arguments.get('type')}. "
            "Start from the model before it was quantized."
        )
    offset = 1 << (bits - 1)
    scale = tensors.floats(f"{module}.weight_scale")
    if f"{module}.weight_packed" in tensors:
        out_features, in_features = (int(n) for n in tensors.tensor(f"{module}.weight_shape"))
        stored = unpack(tensors.tensor(f"{module}.weight_packed").numpy(), bits, in_features)
    else:
        stored = (tensors.tensor(f"{module}.weight").numpy().astype(np.int16) + offset).astype(np.uint8)
        out_features, in_features = stored.shape
    scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    if scale.shape[0] != out_features or in_features % scale.shape[1]:
        raise ValueError(
            f"{module} must have its scales per row or per group of inputs; got {list(scale.shape)} for a weight of "
            f"{[out_features, in_features]}. Start from the model before it was quantized."
        )
    num_groups = scale.shape[1]
    whole_row = num_groups == 1 and arguments.get("strategy") != "group"
    group_size = None if whole_row else in_features // num_groups
    if arguments.get("symmetric", True):
        return QuantizedWeight((stored.astype(np.int16) - offset).astype(np.int8), scale, None, bits, group_size)
    points = tensors.tensor(f"{module}.weight_zero_point").numpy()
    if points.dtype == np.float32:
        return QuantizedWeight(stored, scale, points + np.float32(offset), bits, group_size)
    if points.dtype == np.int32:  # packed down the rows, as the strategies group and channel have it
        zero_point = np.ascontiguousarray(unpack(np.ascontiguousarray(points.T), bits, out_features).T)
    else:
        zero_point = (points.astype(np.int16) + offset).astype(np.uint8)
    return QuantizedWeight(stored, scale, zero_point, bits, group_size)


def layer_scheme(module: str, quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of the group that `module` belongs to: by exact name, else by pattern, else by class."""
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
    groups = quantization["config_groups"].values()
    by_name = [group for group in groups if module in group["targets"]]
    by_pattern = [group for group in groups if any(_matches(target, module) for target in group["targets"])]
    by_class = [group for group in groups if kind in group["targets"]]
    for group in by_name + by_pattern + by_class:
        weights: Mapping[str, Any] = group["weights"]
        return weights
    raise ValueError(f"{module} is quantized, but no group of quantization_config names it. Save the model again.")


def _matches(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def packed_tensors(module: str, weight: QuantizedWeight) -> dict[str, NDArray[Any]]:
    """What the file holds for a linear layer, in the format pack-quantized."""
    offset = 1 << (weight.bits - 1)
    stored = weight.integers if weight.zero_point is not None else (weight.integers.astype(np.int16) + offset)
    return {
        f"{module}.weight_packed": pack(stored.astype(np.uint8), weight.bits),
        f"{module}.weight_shape": np.array(weight.integers.shape, dtype=np.int64),
        **_scales(module, weight),
    }


def plain_tensors(module: str, weight: QuantizedWeight) -> dict[str, NDArray[Any]]:
    """What the file holds for an embedding or LM head, in the format int-quantized."""
    return {f"{module}.weight": _signed(weight.integers, weight), **_scales(module, weight)}


def tied_tensors(module: str, weight: QuantizedWeight) -> dict[str, NDArray[Any]]:
    """What the file holds for a layer that shares the integers of another."""
    return _scales(module, weight)


def _scales(module: str, weight: QuantizedWeight) -> dict[str, NDArray[Any]]:
    scales: dict[str, NDArray[Any]] = {f"{module}.weight_scale": weight.scale.astype(np.float16)}
    if weight.zero_point is not None:
        scales[f"{module}.weight_zero_point"] = _signed(weight.zero_point, weight)
    return scales


def _signed(values: NDArray[Any], weight: QuantizedWeight) -> NDArray[np.int8] | NDArray[np.float32]:
    if values.dtype == np.float32:
        return np.asarray(values - np.float32(1 << (weight.bits - 1)))
    if weight.zero_point is None:
        return values.astype(np.int8)
    return (values.astype(np.int16) - (1 << (weight.bits - 1))).astype(np.int8)


@dataclass(frozen=True)
class Scheme:
    """How a layer is stored, as quantization_config says it."""

    format: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    real_zero_point: bool = False

    def options(self, targets: list[str]) -> dict[str, Any]:
        """The group of `config_groups` for these layers."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "dynamic": False,
        }
        if self.real_zero_point:
            weights["zp_dtype"] = "torch.float32"
        if self.strategy == "group":
            weights["group_size"] = self.group_size
        if self.strategy == "block":
            weights["block_structure"] = [1, self.group_size]
        return {"targets": targets, "format": self.format, "weights": weights}


def packed_scheme(weight: QuantizedWeight) -> Scheme:
    """How `packed_tensors` stores a layer."""
    if weight.zero_point is not None:
        size = weight.group_size or weight.integers.shape[1]
        return Scheme(PACKED, weight.bits, False, "block", size, weight.has_real_zero_point)
    return Scheme(PACKED, weight.bits, True, "group" if weight.group_size else "channel", weight.group_size)


def plain_scheme(weight: QuantizedWeight) -> Scheme:
    """How `plain_tensors` and `tied_tensors` store a layer."""
    strategy = "group" if weight.group_size else "channel"
    return Scheme(PLAIN, weight.bits, weight.zero_point is None, strategy, weight.group_size)


def quantization_config(schemes: Mapping[str, Scheme], left_float: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        schemes: of every quantized layer, by its name.
        left_float: linear layers that are not quantized.
    """
    targets: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        targets.setdefault(scheme, []).append(module)
    formats = sorted({scheme.format for scheme in targets})
    linear = [scheme for scheme in targets if scheme.format == PACKED]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "ignore": left_float,
        "config_groups": {
            f"group_{index}": scheme.options(["Linear"] if linear == [scheme] else modules)
            for index, (scheme, modules) in enumerate(targets.items())
        },
    }
