"""torchao's weight-only integers, and HQQ's own package; run by run.py in their environment.

Both read weights alone. The linear layers of every block are quantized as the options say; the embedding, which is the
LM head too, gets 8 bits per row from torchao in either case. Scales and HQQ's real zero points count as 16 bits.
"""

from typing import Any

import torch
from contender import Contender, Floats, main
from hqq.core.quantize import Quantizer
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

EMBEDDING = "model.embed_tokens.weight"
CONTENDERS: dict[str, dict[str, Any]] = {
    "torchao-int8": {"bits": 8},
    "torchao-int4-sym-g32": {"bits": 4, "group_size": 32, "mapping": "symmetric"},
    "torchao-int4-sym-g64": {"bits": 4, "group_size": 64, "mapping": "symmetric"},
    "torchao-int4-asym-g32": {"bits": 4, "group_size": 32, "mapping": "asymmetric"},
    "torchao-int4-asym-g64": {"bits": 4, "group_size": 64, "mapping": "asymmetric"},
    "torchao-int4-hqq-scale-g32": {"bits": 4, "group_size": 32, "mapping": "symmetric", "algorithm": "hqq_scale_only"},
    "torchao-hqq-int4-g64": {"bits": 4, "group_size": 64, "tool": "hqq"},
    "torchao-hqq-int4-g32": {"bits": 4, "group_size": 32, "tool": "hqq"},
}


def quantize(contender: Contender) -> tuple[dict[str, Floats], float]:
    torch.set_num_threads(contender.threads)
    options = contender.options
    weights = {name: torch.from_numpy(values) for name, values in contender.weights().items()}
    num_bits = 0.0
    for name, weight in weights.items():
        if weight.ndim != 2:
            num_bits += 32 * weight.numel()
            continue
        with contender.measured():
            if name == EMBEDDING:
                weights[name], bits = integers(weight, {"bits": 8})
            elif options.get("tool") == "hqq":
                weights[name], bits = half_quadratic(weight, options["bits"], options["group_size"])
            else:
                weights[name], bits = integers(weight, options)
        num_bits += bits
    return {name: weight.numpy() for name, weight in weights.items()}, num_bits


def integers(weight: Tensor, options: dict[str, Any]) -> tuple[Tensor, float]:
    """torchao's grid, de-quantized, and its bits."""
    bits = options["bits"]
    layer = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
    layer[0].weight = nn.Parameter(weight, requires_grad=False)
    symmetric = options.get("mapping", "symmetric") == "symmetric"
    quantize_(
        layer,
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(options["group_size"]) if "group_size" in options else PerAxis(0),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
            intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm(options.get("algorithm", "affine")),
        ),
    )
    quantized = layer[0].weight
    per_scale = 16 if symmetric else 16 + bits
    return quantized.dequantize().float(), bits * quantized.qdata.numel() + per_scale * quantized.scale.numel()


def half_quadratic(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, float]:
    """HQQ's grid along the inputs, de-quantized, and its bits."""
    integers, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group_size, axis=1, device="cpu", compute_dtype=torch.float32
    )
    values = Quantizer.dequantize(integers, meta).reshape(weight.shape).float()
    return values, bits * weight.numel() + 16 * (meta["scale"].numel() + meta["zero"].numel())


if __name__ == "__main__":
    main("torchao and HQQ", ["torchao", "hqq", "torch"], CONTENDERS, quantize)
