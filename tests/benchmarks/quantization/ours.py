"""Slimline's own contenders; run by run.py in Slimline's environment.

What the other tools' scripts say in code, methods, is a list of recipe options here: methods.json, name by name.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from contender import Contender, Floats, main
from pydantic import TypeAdapter

from tasks.quantization import QuantizationMethod
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight, read_weights

CONTENDERS = json.loads((Path(__file__).parent / "methods.json").read_text())


def quantize(contender: Contender) -> tuple[dict[str, Floats], float]:
    torch.set_num_threads(contender.threads)
    method = TypeAdapter(QuantizationMethod).validate_python(contender.options)
    with TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "out"
        data.mkdir()
        out.mkdir()
        if method.method == "gptq":
            np.save(data / "calibration.npy", contender.calibration_tokens().astype(np.int32))
        with contender.measured():
            summary = quantize_checkpoint(checkpoint=contender.checkpoint, data=data, method=method, out=out)
        found = read_weights(out)
    num_floats = summary.num_parameters - summary.num_quantized
    num_bits = summary.bits_per_weight * summary.num_quantized + 32 * num_floats
    weights = {n: v.dequantize() if isinstance(v, QuantizedWeight) else v for n, v in found.items()}
    return weights, num_bits


if __name__ == "__main__":
    main("Slimline", ["slimline"], CONTENDERS, quantize)
