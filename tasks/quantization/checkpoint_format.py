"""Quantized checkpoints on disk: compressed-tensors, as stock transformers loads it.

These of its formats are used, because compressed-tensors 0.20 with transformers 5.23 loads nothing else exactly:

* linear layers: `pack-quantized`. `<layer>.weight_packed` holds the integers (see `packing.py`), `.weight_scale`
  [out, groups], `.weight_shape` [2]. Symmetric layers name the strategy `channel` or `group`, as vLLM reads it.
  Asymmetric ones say the same as `block` of [1, group_size] with `.weight_zero_point` [out, groups] int8: transformers
  expects the packed zero points of `group` unpacked, and then refuses the checkpoint for their shape.
* embedding and LM head: `int-quantized`. `<layer>.weight` is the int8 array itself, because transformers initializes
  an embedding through its `weight` and fails where it is packed. Tied ones are stored once: the LM head has only a
  `.weight_scale`, the embedding's, and `tie_word_embeddings` gives it the embedding's integers.
* linear layers whose inputs are rounded too (`activations.py`): `int-quantized` as well, which vLLM reads as W8A8, with
  `input_activations` in their group. Static ones have `.input_scale` [1] float32 and, unless symmetric,
  `.input_zero_point` [1] int8. FP8 weights are `float-quantized`: `.weight` is float8_e4m3fn.
* a quantized KV cache: `kv_cache_scheme`, and `self_attn.k_scale` and `.v_scale` [1] float32 of every block.

Real-valued zero points (`grid.quantize_from`) are stored as float32, which `zp_dtype` says; then -zero_point * scale
gives back the offset, a float16, to the last bit. Stock transformers recovers them; other readers have not been tried.

Scales are stored as float16; see `grid.py`. compressed-tensors counts every integer from -2 ** (bits - 1), so its
asymmetric integers and zero points are ours less 2 ** (bits - 1).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.calibration.architectures import architecture
from tasks.calibration.tensor_files import Tensors
from tasks.quantization.activations import Format, Inputs
from tasks.quantization.packing import pack, unpack

PACKED = "pack-quantized"
PLAIN = "int-quantized"
FLOAT = "float-quantized"
EMBEDDINGS = ("embed_tokens", "embed_in")  # ends of their names
TABLES = (*EMBEDDINGS, "lm_head")


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
    inputs: Inputs | None = None  # how the layer's inputs are rounded; None: they are not
    format: Format = "int8"  # float8_e4m3: `integers` are the bits of FP8 values, as uint8

    def dequantize(self) -> NDArray[np.float32]:
        """The weight's values, [out, in] float32."""
        if self.format == "float8_e4m3":
            return _float8(self.integers) * self.scale
        out_features, in_features = self.shape
        values = self.integers.reshape(out_features, self.scale.shape[1], -1).astype(np.float32)
        if self.zero_point is not None and not self.has_real_zero_point:
            values -= self.zero_point[:, :, None]  # integers: exact in float32
        values *= self.scale[:, :, None]
        if self.has_real_zero_point:
            values += self.offset[:, :, None]  # as GGUF and the engines have it; zero points are rounded quotients
        return values.reshape(out_features, in_features)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out_features, in_features = self.integers.shape
        return out_features, in_features

    def rows(self, indices: NDArray[np.int64]) -> "QuantizedWeight":
        """Some outputs, in that order: the same integers, with the scales and zero points of their rows."""
        zero_point = None if self.zero_point is None else self.zero_point[indices]
        return replace(self, integers=self.integers[indices], scale=self.scale[indices], zero_point=zero_point)

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
        out_features, in_features = self.shape
        return out_features * in_features * self.bits + self.scale.size * 16 + zero_points


class StoredWeight(QuantizedWeight):
    """One whose integers stay in the checkpoint and are read whenever they are asked for.

    In memory they take a byte each, twice what 4 bits take in the file.
    """

    def __init__(
        self,
        read: Callable[[], NDArray[Any]],
        shape: tuple[int, int],
        scale: NDArray[np.float32],
        zero_point: NDArray[np.uint8] | NDArray[np.float32] | None,
        bits: int,
        group_size: int | None,
        inputs: Inputs | None = None,
        format: Format = "int8",
    ) -> None:
        values = {"_read": read, "_shape": shape, "scale": scale, "zero_point": zero_point, "bits": bits}
        values |= {"group_size": group_size, "inputs": inputs, "format": format}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # as a frozen dataclass does

    _read: Callable[[], NDArray[Any]]
    _shape: tuple[int, int]

    @property
    def integers(self) -> NDArray[Any]:
        """[out, in], read now."""
        return self._read()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._shape

    def rows(self, indices: NDArray[np.int64]) -> "StoredWeight":
        """Some outputs, in that order; their integers are read with the others'."""
        return StoredWeight(
            lambda: self.integers[indices],
            (len(indices), self.shape[1]),
            self.scale[indices],
            None if self.zero_point is None else self.zero_point[indices],
            self.bits,
            self.group_size,
            self.inputs,
            self.format,
        )

    def in_memory(self) -> QuantizedWeight:
        """The same with its integers."""
        return QuantizedWeight(
            self.integers, self.scale, self.zero_point, self.bits, self.group_size, self.inputs, self.format
        )


def _float8(bits: NDArray[Any]) -> NDArray[np.float32]:
    """What bits of float8_e4m3fn, as uint8, stand for."""
    import torch

    values: NDArray[np.float32] = torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()
    return values


def read_weights(checkpoint: Path) -> dict[str, NDArray[np.float32] | QuantizedWeight]:
    """Every weight of a checkpoint, float or quantized, by the name of the module's parameter.

    The LM head is absent where the configuration ties it to the embedding.

    Args:
        checkpoint: directory with config.json and safetensors; plain, or compressed-tensors of the formats
            pack-quantized and int-quantized, also as llm-compressor writes them.

    Returns:
        float32 arrays, mapped where they are stored so, and a StoredWeight for each `<module>.weight` that is
        quantized, which reads its integers from the checkpoint later; without the scales of a KV cache, see
        `read_cache_scales`.

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
        for name, quantized in list_weights(tensors, quantization):
            if tied and name.rpartition(".")[0] == "lm_head":
                continue
            weights[name] = find_quantized(tensors, quantized, quantization) if quantized else tensors.floats(name)
    return weights


def list_weights(tensors: Tensors, quantization: Mapping[str, Any] | None) -> Iterator[tuple[str, str | None]]:
    """The names of a checkpoint's weights, and of the module whose quantized weight it is; None: it is float.

    What is stored beside a quantized weight, and the scales of a KV cache, are none.
    """
    for name in tensors.names:
        module, _, parameter = name.rpartition(".")
        if quantization is None:
            yield name, None
        elif parameter in ("k_scale", "v_scale"):
            continue
        elif f"{module}.weight_scale" not in tensors:
            yield name, None
        elif parameter in ("weight", "weight_packed"):
            yield f"{module}.weight", module
        elif not parameter.startswith(("weight_", "input_")):
            yield name, None


def read_inputs(checkpoint: Path) -> dict[str, Inputs]:
    """How the inputs of layers are rounded, by the layer's name; those that are not are absent."""
    quantization = json.loads((checkpoint / "config.json").read_text()).get("quantization_config")
    if not quantization:
        return {}
    found: dict[str, Inputs] = {}
    with Tensors(checkpoint) as tensors:
        for name in tensors.names:
            module, _, parameter = name.rpartition(".")
            if parameter == "weight_scale":
                inputs = _read_inputs(tensors, module, layer_group(module, quantization).get("input_activations"))
                found |= {module: inputs} if inputs else {}
    return found


@dataclass(frozen=True)
class CacheScales:
    """How a quantized KV cache is kept."""

    format: Format
    of_blocks: tuple[tuple[float, float], ...]  # of keys (after their rotation) and of values


def read_cache_scales(checkpoint: Path) -> CacheScales | None:
    """The scales of the KV cache; None where the checkpoint has none.

    Raises:
        ValueError: it is quantized in another way than symmetrically, with 8 bits and one static scale per block.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    if not scheme:
        return None
    expected = {"num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
    got = {key: scheme.get(key, value) for key, value in expected.items()}
    if got != expected:
        raise ValueError(f"The KV cache must be quantized with {expected}; got {got}. Quantize the model again.")
    blocks, family = [], architecture(config["model_type"])
    with Tensors(checkpoint) as tensors:
        for index in range(int(config[family.num_layers_option])):
            attention = f"{family.block(index)}.{family.attention_module}"
            key, value = (tensors.floats(f"{attention}.{name}_scale").item() for name in "kv")
            blocks.append((float(key), float(value)))
    return CacheScales("float8_e4m3" if scheme.get("type") == "float" else "int8", tuple(blocks))


def read_quantized(tensors: Tensors, module: str, quantization: Mapping[str, Any]) -> QuantizedWeight:
    """A quantized layer's weight with its integers; see `find_quantized`."""
    return find_quantized(tensors, module, quantization).in_memory()


def find_quantized(tensors: Tensors, module: str, quantization: Mapping[str, Any]) -> StoredWeight:
    """A quantized layer's weight, as `quantization_config` and the tensors of its checkpoint have it.

    Raises:
        ValueError: it is stored in a way this reader does not know.
    """
    if f"{module}.weight_g_idx" in tensors:
        raise ValueError(
            f"{module} must keep its inputs in order; it has an activation order (weight_g_idx). "
            "Quantize the model again without `actorder`."
        )
    group = layer_group(module, quantization)
    arguments, inputs = group["weights"], _read_inputs(tensors, module, group.get("input_activations"))
    bits = int(arguments["num_bits"])
    if arguments.get("type") == "float" and bits == 8 and arguments.get("strategy") == "channel":
        shape = quantized_shape(tensors, module)
        scale = tensors.floats(f"{module}.weight_scale").reshape(-1, 1)
        read = partial(_read_float8, tensors.checkpoint, module)
        return StoredWeight(read, shape, scale, None, 8, None, inputs, format="float8_e4m3")
    if arguments.get("type", "int") != "int" or not 1 <= bits <= 8:
        raise ValueError(
            f"{module} must be quantized to integers of at most 8 bits, or to FP8 per channel; got {bits}-bit "
            f"{arguments.get('type')}. Start from the model before it was quantized."
        )
    offset = 1 << (bits - 1)
    scale = tensors.floats(f"{module}.weight_scale")
    shape = out_features, in_features = quantized_shape(tensors, module)
    scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    if scale.shape[0] != out_features or in_features % scale.shape[1]:
        raise ValueError(
            f"{module} must have its scales per row or per group of inputs; got {list(scale.shape)} for a weight of "
            f"{[out_features, in_features]}. Start from the model before it was quantized."
        )
    num_groups = scale.shape[1]
    whole_row = num_groups == 1 and arguments.get("strategy") != "group"
    group_size = None if whole_row else in_features // num_groups
    symmetric = bool(arguments.get("symmetric", True))
    read = partial(_read_integers, tensors.checkpoint, module, bits, symmetric=symmetric)
    if symmetric:
        return StoredWeight(read, shape, scale, None, bits, group_size, inputs)
    points = tensors.tensor(f"{module}.weight_zero_point").numpy()
    if points.dtype == np.float32:
        return StoredWeight(read, shape, scale, points + np.float32(offset), bits, group_size, inputs)
    if points.dtype == np.int32:  # packed down the rows, as the strategies group and channel have it
        zero_point = np.ascontiguousarray(unpack(np.ascontiguousarray(points.T), bits, out_features).T)
    else:
        zero_point = (points.astype(np.int16) + offset).astype(np.uint8)
    return StoredWeight(read, shape, scale, zero_point, bits, group_size, inputs)


def quantized_shape(tensors: Tensors, module: str) -> tuple[int, int]:
    """(out, in) of a quantized layer's weight."""
    stored = f"{module}.weight_shape"
    found = tensors.tensor(stored).tolist() if stored in tensors else tensors.shape(f"{module}.weight")
    return int(found[0]), int(found[1])


def _read_integers(checkpoint: Path, module: str, bits: int, *, symmetric: bool) -> NDArray[Any]:
    """[out, in], int8 when symmetric, else uint8; sums of bytes wrap around, which gives the right ones."""
    offset = np.uint8(1 << (bits - 1))
    with Tensors(checkpoint) as tensors:
        if f"{module}.weight_packed" not in tensors:
            signed: NDArray[np.int8] = tensors.tensor(f"{module}.weight").numpy()
            return signed.copy() if symmetric else signed.view(np.uint8) + offset
        stored = unpack(tensors.tensor(f"{module}.weight_packed").numpy(), bits, quantized_shape(tensors, module)[1])
        return (stored - offset).view(np.int8) if symmetric else stored


def _read_float8(checkpoint: Path, module: str) -> NDArray[np.uint8]:
    """[out, in], the bits."""
    import torch

    with Tensors(checkpoint) as tensors:
        bits: NDArray[np.uint8] = tensors.tensor(f"{module}.weight").view(torch.uint8).numpy().copy()
        return bits


def _read_inputs(tensors: Tensors, module: str, arguments: Mapping[str, Any] | None) -> Inputs | None:
    if arguments is None:
        return None
    kind: Format = "float8_e4m3" if arguments.get("type") == "float" else "int8"
    dynamic, symmetric = bool(arguments.get("dynamic")), bool(arguments.get("symmetric", True))
    expected = ("token", 8, True) if dynamic else ("tensor", 8, symmetric)
    got = (arguments.get("strategy"), int(arguments["num_bits"]), symmetric)
    if got != expected:
        raise ValueError(
            f"Inputs of {module} must be rounded to 8 bits with one static scale, or symmetric ones per token; got "
            f"{got[1]} bits, strategy {got[0]}, dynamic {dynamic}, symmetric {symmetric}. Quantize the model again."
        )
    if dynamic:
        return Inputs(kind)
    point = f"{module}.input_zero_point"
    zero_point = 0 if symmetric else int(tensors.tensor(point).item())
    return Inputs(kind, float(tensors.floats(f"{module}.input_scale").item()), zero_point, symmetric)


def layer_group(module: str, quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of `config_groups` that `module` belongs to: by exact name, else by pattern, else by class."""
    kind = "Embedding" if module.endswith(EMBEDDINGS) else "Linear"
    groups = quantization["config_groups"].values()
    by_name = [group for group in groups if module in group["targets"]]
    by_pattern = [group for group in groups if any(_matches(target, module) for target in group["targets"])]
    by_class = [group for group in groups if kind in group["targets"]]
    for group in by_name + by_pattern + by_class:
        return group  # type: ignore[no-any-return]
    raise ValueError(f"{module} is quantized, but no group of quantization_config names it. Save the model again.")


def _matches(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def is_plain(weight: QuantizedWeight) -> bool:
    """Whether a linear layer is stored as `plain_tensors`: those that compute with rounded inputs, and FP8."""
    return weight.inputs is not None or weight.format != "int8"


def linear_tensors(module: str, weight: QuantizedWeight) -> dict[str, NDArray[Any]]:
    """What the file holds for a linear layer of a block."""
    return plain_tensors(module, weight) if is_plain(weight) else packed_tensors(module, weight)


def linear_scheme(weight: QuantizedWeight) -> "Scheme":
    """How `linear_tensors` stores a layer."""
    return plain_scheme(weight) if is_plain(weight) else packed_scheme(weight)


def packed_tensors(module: str, weight: QuantizedWeight) -> dict[str, NDArray[Any]]:
    """What the file holds for a linear layer, in the format pack-quantized."""
    offset = 1 << (weight.bits - 1)
    stored = weight.integers if weight.zero_point is not None else (weight.integers.astype(np.int16) + offset)
    return {
        f"{module}.weight_packed": pack(stored.astype(np.uint8), weight.bits),
        f"{module}.weight_shape": np.array(weight.shape, dtype=np.int64),
        **_scales(module, weight),
    }


def plain_tensors(module: str, weight: QuantizedWeight) -> dict[str, NDArray[Any]]:
    """What the file holds for an embedding, an LM head or a W8A8 layer, in the formats int- and float-quantized."""
    if weight.format == "float8_e4m3":
        import ml_dtypes

        return {f"{module}.weight": weight.integers.view(ml_dtypes.float8_e4m3fn), **_scales(module, weight)}
    return {f"{module}.weight": _signed(weight.integers, weight), **_scales(module, weight)}


def input_tensors(module: str, inputs: Inputs) -> dict[str, NDArray[Any]]:
    """What the file holds for a layer's static inputs; nothing for those per token."""
    if inputs.scale is None:
        return {}
    tensors: dict[str, NDArray[Any]] = {f"{module}.input_scale": np.array([inputs.scale], dtype=np.float32)}
    if not inputs.symmetric:
        tensors[f"{module}.input_zero_point"] = np.array([inputs.zero_point], dtype=np.int8)
    return tensors


def table_tensors(module: str, weight: QuantizedWeight, tied: str | None) -> dict[str, NDArray[Any]]:
    """What the file holds for an embedding or LM head, and for the layer `tied` that shares its integers."""
    return plain_tensors(module, weight) | (_scales(tied, weight) if tied else {})


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
    inputs: tuple[tuple[str, object], ...] = ()  # of `input_activations`

    def options(self, targets: list[str]) -> dict[str, Any]:
        """The group of `config_groups` for these layers."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "float" if self.format == FLOAT else "int",
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
        group = {"targets": targets, "format": self.format, "weights": weights}
        return group | {"input_activations": dict(self.inputs)} if self.inputs else group


def packed_scheme(weight: QuantizedWeight) -> Scheme:
    """How `packed_tensors` stores a layer."""
    if weight.zero_point is not None:
        size = weight.group_size or weight.shape[1]
        return Scheme(PACKED, weight.bits, False, "block", size, weight.has_real_zero_point)
    return Scheme(PACKED, weight.bits, True, "group" if weight.group_size else "channel", weight.group_size)


def plain_scheme(weight: QuantizedWeight) -> Scheme:
    """How `plain_tensors` and `table_tensors` store a layer."""
    strategy = "group" if weight.group_size else "channel"
    format = FLOAT if weight.format == "float8_e4m3" else PLAIN
    inputs = tuple(weight.inputs.arguments.items()) if weight.inputs else ()
    return Scheme(format, weight.bits, weight.zero_point is None, strategy, weight.group_size, inputs=inputs)


def quantization_config(
    schemes: Mapping[str, Scheme], left_float: list[str], kv_cache: Format | None = None
) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        schemes: of every quantized layer, by its name.
        left_float: linear layers that are not quantized.
        kv_cache: how keys and values are kept.
    """
    targets: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        targets.setdefault(scheme, []).append(module)
    formats = sorted({scheme.format for scheme in targets})
    of_blocks = {scheme for module, scheme in schemes.items() if not module.endswith(TABLES)}
    of_tables = {scheme for module, scheme in schemes.items() if module.endswith(TABLES)}
    cache = {"kv_cache_scheme": dict(Inputs(kv_cache, 1.0).arguments)} if kv_cache else {}
    return {
        **cache,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "ignore": left_float,
        "config_groups": {
            f"group_{index}": scheme.options(
                ["Linear"] if of_blocks == {scheme} and scheme not in of_tables else modules
            )
            for index, (scheme, modules) in enumerate(targets.items())
        },
    }
