"""Slimline's own contenders; run by run.py in Slimline's environment.

What the other tools' scripts say in code, methods, is a list of recipe options here: methods.json, name by name.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from contender import Contender, Floats, main

from flows.recipe import Candidate
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight, read_weights
from tasks.quantization.mixed import Mixed
from tasks.quantization.sensitivity import measure_sensitivity
from tasks.quantization.training import train_quantized

CONTENDERS = json.loads((Path(__file__).parent / "methods.json").read_text())


def quantize(contender: Contender) -> tuple[dict[str, Floats], float]:
    torch.set_num_threads(contender.threads)
    candidate = Candidate.model_validate(contender.options)
    method, training = candidate.quantization, candidate.quantization_training
    with TemporaryDirectory() as folder:
        data, scores, out, trained, work = (
            Path(folder) / name for name in ("data", "scores", "out", "trained", "work")
        )
        shutil.copytree(contender.data, data)
        for directory in (scores, out, trained, work):
            directory.mkdir()
        if method.method == "gptq" or isinstance(method.weights, Mixed) or training:
            np.save(data / "calibration.npy", contender.calibration_tokens().astype(np.int32))
        given = {"checkpoint": contender.checkpoint, "data": data}
        with contender.measured():
            if isinstance(method.weights, Mixed):
                choices = {"choices": method.weights.choices, "embedding_choices": method.weights.embedding_choices}
                measure_sensitivity(**given, **choices, ignore=method.ignore, out=scores)
            summary = quantize_checkpoint(**given, method=method, out=out, scores=scores)
            if training:
                teacher = {"checkpoint": out, "teacher": contender.checkpoint, "data": data}
                train_quantized(**teacher, options=training, seed=0, work_dir=work, out=trained)
                contender.notes.append(f"trained on {training.training.max_steps} batches of training text")
        if summary.mixed:
            contender.notes.append(summary.mixed.layers)
        found = read_weights(trained if training else out)
    num_floats = summary.num_parameters - summary.num_quantized
    num_bits = summary.bits_per_weight * summary.num_quantized + 32 * num_floats
    weights = {n: v.dequantize() if isinstance(v, QuantizedWeight) else v for n, v in found.items()}
    return weights, num_bits


if __name__ == "__main__":
    main("Slimline", ["slimline"], CONTENDERS, quantize)
