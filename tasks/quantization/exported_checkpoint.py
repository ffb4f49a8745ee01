"""Checkpoints of encoders (BERT's family) and encoder-decoders (T5, BART, Marian), as their export needs them.

Float weights, or a quantized checkpoint's integers dequantized, go into transformers' own model; the integers are kept
beside it, by the names of the model's modules.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.calibration.exported_families import (
    ENCODER_DECODERS,
    ENCODERS,
    architecture_name,
    is_exported,
)
from tasks.calibration.tensor_files import Tensors
from tasks.quantization.checkpoint_format import QuantizedWeight, read_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARAMETERS_OF_QUANTIZATION = ("weight_scale", "weight_zero_point", "weight_packed", "weight_shape", "weight_g_idx")


@dataclass(frozen=True)
class ExportedCheckpoint:
    """transformers' model of a checkpoint, in float32, and the integers it was dequantized from."""

    model: "PreTrainedModel"  # in evaluation mode
    quantized: dict[str, QuantizedWeight]  # by module: linear layers, and the word embedding

    @property
    def is_encoder(self) -> bool:
        """Whether it has no decoder."""
        return self.model.config.model_type in ENCODERS

    @property
    def max_length(self) -> int | None:
        """The longest sequence, special tokens included; None: positions are relative."""
        config = self.model.config
        if config.model_type == "t5":
            return None
        length = int(config.max_position_embeddings)
        return length - int(config.pad_token_id) - 1 if config.model_type == "roberta" else length


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of a checkpoint that `is_exported`.

    Raises:
        ValueError: there is none, or it is of another family.
    """
    file = checkpoint / "config.json"
    if not file.exists():
        raise ValueError(f"A checkpoint is a directory with a config.json; {checkpoint} has none.")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    family = config.get("model_type", "")
    if not is_exported(family):
        raise ValueError(
            f"Graphs are exported for the families {', '.join([*ENCODERS, *ENCODER_DECODERS])}; got {family!r}. "
            "Use a model of one of these."
        )
    return config


def read_checkpoint(checkpoint: Path, *, attention: str | None = "eager") -> ExportedCheckpoint:
    """The model of a checkpoint directory, float or quantized.

    Args:
        checkpoint: of a family that `is_exported`.
        attention: how transformers computes it. eager: the smallest graph, and one that engines know
            (docs/decisions/0008); None: as transformers chooses, which is the fastest.

    Raises:
        ValueError: its family, its class or how it is quantized is unknown; weights are missing or do not fit.
    """
    import torch
    import transformers

    config = read_config(checkpoint)
    name = architecture_name(config)
    values, quantized = _read_tensors(checkpoint, config.pop("quantization_config", None))
    settings = transformers.AutoConfig.for_model(**config)
    if attention is not None:
        settings._attn_implementation = attention
    if name in ("BertModel", "RobertaModel"):
        prefix = f"{settings.model_type}."
        options = {"add_pooling_layer": any(key.startswith("pooler.") for key in _without_prefix(values, prefix))}
    else:
        options = {}
    model_class = getattr(transformers, name)
    try:
        model, loading = model_class.from_pretrained(
            None,
            config=settings,
            state_dict={key: torch.from_numpy(value) for key, value in values.items()},
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except RuntimeError as error:
        raise ValueError(f"The weights of {checkpoint} do not fit its config.json: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"The checkpoint {checkpoint} must hold every weight of a {name}; it lacks {len(missing)}: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}."
        )
    found = ExportedCheckpoint(model.eval(), quantized)
    _refuse_unknown_modules(found, checkpoint)
    return found


def _without_prefix(names: Any, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in names]


def _read_tensors(
    checkpoint: Path, quantization: dict[str, Any] | None
) -> tuple[dict[str, NDArray[Any]], dict[str, QuantizedWeight]]:
    """Every weight as floats by its name, and the integers of those that are quantized by module."""
    if quantization is not None and quantization.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f"A quantized checkpoint must be in the compressed-tensors format; got "
            f"{quantization.get('quant_method')!r} in {checkpoint}. Start from the model before it was quantized."
        )
    values: dict[str, NDArray[Any]] = {}
    quantized: dict[str, QuantizedWeight] = {}
    with Tensors(checkpoint) as tensors:
        for name in tensors.names:
            module, _, parameter = name.rpartition(".")
            if quantization is None or f"{module}.weight_scale" not in tensors:
                tensor = tensors.tensor(name)
                values[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            elif parameter in ("weight", "weight_packed"):
                quantized[module] = _weight_only(read_quantized(tensors, module, quantization), module)
                values[f"{module}.weight"] = quantized[module].dequantize()
            elif parameter not in PARAMETERS_OF_QUANTIZATION:
                values[name] = tensors.floats(name)
    for name, value in values.items():
        if value.dtype == np.float32 and not np.isfinite(value).all():
            raise ValueError(f"Weights must be finite; {name} of {checkpoint} holds NaN or infinite numbers.")
    return values, quantized


def _weight_only(weight: QuantizedWeight, module: str) -> QuantizedWeight:
    if weight.inputs is not None or weight.format != "int8":
        raise ValueError(
            f"Weights of an exported graph must be integers multiplied with float inputs; {module} is "
            + ("FP8" if weight.format != "int8" else "quantized together with its inputs")
            + ". Quantize the weights alone, to integers."
        )
    if weight.has_real_zero_point:
        raise ValueError(
            f"ONNX's DequantizeLinear needs integer zero points; {module} has real-valued ones. Quantize with "
            "`zero_point: integer` or `symmetric: true`."
        )
    return weight


def _refuse_unknown_modules(checkpoint: ExportedCheckpoint, path: Path) -> None:
    import torch

    modules = dict(checkpoint.model.named_modules())
    for name in checkpoint.quantized:
        module = modules.get(name)
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            kind = "no layer of it" if module is None else f"a {type(module).__name__}"
            raise ValueError(
                f"Quantized weights must belong to linear layers or embeddings of a "
                f"{type(checkpoint.model).__name__}; {name} of {path} is {kind}."
            )
