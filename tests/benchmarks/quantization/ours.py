"""Slimline's own contenders; run by run.py in Slimline's environment.

What the other tools' scripts say in code, methods, is a list of recipe options here: methods.json, name by name.
"""

import hashlib
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
        data, out, trained, work = (Path(folder) / name for name in ("data", "out", "trained", "work"))
        shutil.copytree(contender.data, data)
        for directory in (out, trained, work):
            directory.mkdir()
        scores = None
        if method.method == "gptq" or isinstance(method.weights, Mixed) or training:
            np.save(data / "calibration.npy", contender.calibration_tokens().astype(np.int32))
        given = {"checkpoint": contender.checkpoint, "data": data}
        with contender.measured():
            if isinstance(method.weights, Mixed):
                scores = sensitivity(contender, method.weights, data)
            summary = quantize_checkpoint(**given, method=method, out=out, scores=scores)
            if training:
                teacher = {"checkpoint": out, "teacher": contender.checkpoint, "data": data}
                train_quantized(**teacher, options=training, seed=0, work_dir=work, out=trained)
                contender.notes.append(f"trained on {training.training.max_steps} batches of training text")
        if summary.mixed:
            contender.notes.append(summary.mixed.layers)
        found = read_weights(trained if training else out)  # integers are read when they are asked for
        weights = {n: v.dequantize() if isinstance(v, QuantizedWeight) else v for n, v in found.items()}
    num_floats = summary.num_parameters - summary.num_quantized
    num_bits = summary.bits_per_weight * summary.num_quantized + 32 * num_floats
    return weights, num_bits


def sensitivity(contender: Contender, weights: Mixed, data: Path) -> Path:
    """The scores of the choices; measured for the first contender that has them, as a flow's cache would."""
    digest = hashlib.sha256(repr((weights.choices, weights.embedding_choices)).encode()).hexdigest()[:12]
    scores = contender.prepared / f"scores-{digest}"
    if scores.exists():
        contender.notes.append("sensitivity was measured for an earlier contender, and its time is not counted here")
        return scores
    partial = scores.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    choices = {"choices": weights.choices, "embedding_choices": weights.embedding_choices}
    measure_sensitivity(checkpoint=contender.checkpoint, data=data, ignore=(), out=partial, **choices)
    return partial.rename(scores)


if __name__ == "__main__":
    main("Slimline", ["slimline"], CONTENDERS, quantize)
