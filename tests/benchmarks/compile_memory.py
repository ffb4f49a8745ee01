"""Peak memory of compiling a checkpoint for an engine, against the checkpoint's bytes.

    python tests/benchmarks/compile_memory.py [--layers 2] [--engines onnxruntime openvino] [--weights float32 int4]

Writes random Llamas of the shape of TinyLlama-1.1B into a scratch directory, tensor by tensor, quantizes them where
asked, and compiles each in a fresh process twice: the engine's graph alone, and the whole of what `slimline compile`
does, with the comparison with PyTorch. Prints the largest resident set (VmHWM: shared libraries and mapped files
included) and the time as a table and, in the last line, as JSON. 22 layers are the whole model.
"""

import argparse
import importlib.metadata
import itertools
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from quantization_memory import VOCAB, write_llama

from infra.isolation import run_isolated
from tasks.engines.compiling import compile_engine
from tasks.engines.onnxruntime import OnnxRuntime
from tasks.engines.openvino import OpenVino
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint

ENGINES = {"onnxruntime": OnnxRuntime(precision="float32"), "openvino": OpenVino(precision="float32")}
INT4 = RoundToNearest(weights=Grid(bits=4, group_size=64, full_range=True), embeddings=Grid(bits=8))


def build(*, checkpoint: Path, engine: str, data: Path, out: Path) -> int:
    """Bytes of the engine's files; what a child process does."""
    ENGINES[engine].compile(checkpoint, out)
    return size_bytes(out)


def compile_and_compare(*, checkpoint: Path, engine: str, data: Path, out: Path) -> int:
    """Bytes of the bundle; what a child process does."""
    summary = compile_engine(checkpoint=checkpoint, data=data, engine=ENGINES[engine], threads=1, out=out)
    sys.stderr.write(f"{summary.parity}\n")
    return size_bytes(out)


def nothing(*, engine: str) -> int:
    """What a child process does that compiles nothing: its memory is that of Python, torch and the engine's library."""
    __import__(engine)
    return 0


def size_bytes(directory: Path) -> int:
    """Bytes of all files in it."""
    return sum(file.stat().st_size for file in directory.iterdir())


def measure(checkpoint: Path, engine: str, what: str, scratch: Path) -> dict[str, Any]:
    """One row of the table, without what it is about."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        bundle_bytes, finished = run_isolated(
            f"{Path(__file__).stem}:{what}",
            {"checkpoint": checkpoint, "engine": engine, "data": scratch, "out": Path(out)},
            result=int,
            log_path=scratch / "log",
        )
    checkpoint_bytes = size_bytes(checkpoint)
    peak_bytes = finished.peak_memory_mib * 2**20
    return {
        "what": what,
        "checkpoint_mib": round(checkpoint_bytes / 2**20),
        "bundle_mib": round(bundle_bytes / 2**20),
        "peak_memory_mib": round(finished.peak_memory_mib),
        "peak_by_checkpoint": round(peak_bytes / checkpoint_bytes, 2),
        "elapsed_s": round(finished.elapsed_s, 1),
    }


def main() -> None:
    """Print the table and, last, the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--weights", nargs="+", choices=["float32", "int4"], default=["float32", "int4"])
    parser.add_argument("--only", choices=[build.__name__, compile_and_compare.__name__], help="one of the two")
    parser.add_argument("--scratch", type=Path, help="where to write, instead of the system's temporary directory")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for engine in options.engines:
            _, finished = run_isolated(
                f"{Path(__file__).stem}:nothing", {"engine": engine}, result=int, log_path=Path(folder) / "log"
            )
            sys.stdout.write(f"A process that only imports {engine}: {finished.peak_memory_mib:.0f} MiB\n")
    sys.stdout.write(
        "layers  engine       weights  what                 checkpoint MiB  bundle MiB  peak MiB  peak/checkpoint  "
        "seconds\n"
    )
    for num_layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            scratch = Path(folder)
            tokens = np.random.default_rng(1).integers(0, VOCAB, (4, 128)).astype(np.int32)
            np.save(scratch / "evaluation.npy", tokens)
            checkpoints = {weights: scratch / weights for weights in ("float32", "int4")}
            checkpoints["float32"].mkdir()
            write_llama(checkpoints["float32"], num_layers)
            if "int4" in options.weights:
                checkpoints["int4"].mkdir()
                np.save(scratch / "calibration.npy", np.zeros((1, 8), np.int32))
                quantize_checkpoint(
                    checkpoint=checkpoints["float32"], data=scratch, method=INT4, out=checkpoints["int4"]
                )
            for weights, engine in itertools.product(options.weights, options.engines):
                for what in [options.only] if options.only else [build.__name__, compile_and_compare.__name__]:
                    row = measure(checkpoints[weights], engine, what, scratch)
                    rows.append({"num_layers": num_layers, "engine": engine, "weights": weights, **row})
                    sys.stdout.write(
                        f"{num_layers:6}  {engine:11}  {weights:7}  {what:19}  {row['checkpoint_mib']:14}  "
                        f"{row['bundle_mib']:10}  {row['peak_memory_mib']:8}  {row['peak_by_checkpoint']:15}  "
                        f"{row['elapsed_s']:7}\n"
                    )
                    sys.stdout.flush()
    versions = {package: importlib.metadata.version(package) for package in ("onnx", "onnxruntime", "openvino")}
    sys.stdout.write(json.dumps({**versions, "python": platform.python_version(), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
