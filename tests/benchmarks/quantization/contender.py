"""A contender: a quantized model as the float32 weights that it stands for, whatever tool made it.

A directory with `model.safetensors`, every tensor of the float checkpoint by its Hugging Face name, de-quantized, and
`contender.json`, see `Contender.write`. So the scorer compares weights alone: no kernel, no rounding of activations.

It is imported in the environments of all peers, so it needs numpy and safetensors only. It runs one contender in each
process, because a process' peak memory cannot be reset.
"""

import argparse
import importlib.metadata
import json
import logging
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

Floats = NDArray[np.float32]
Options = dict[str, Any]

logger = logging.getLogger("benchmark")


class Contender:
    """One run of a tool: what it is given, and what is measured of it."""

    def __init__(self, name: str, options: Options, arguments: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.checkpoint: Path = arguments.checkpoint
        self.prepared: Path = arguments.prepared
        self.data: Path = arguments.data
        self.threads: int = arguments.threads
        self.notes: list[str] = []
        self.elapsed_s = 0.0
        self.peak_rss_mib = 0.0
        self._num_sequences: int | None = arguments.sequences
        self._calibration: dict[str, int] | None = None

    def calibration_tokens(self) -> NDArray[np.int64]:
        """[sequences, length], the same for all peers."""
        tokens = np.load(self.data / "calibration.npy", allow_pickle=False)[: self._num_sequences].astype(np.int64)
        self._calibration = {"sequences": tokens.shape[0], "length": tokens.shape[1]}
        return tokens

    def input_mean_squares(self) -> dict[str, Floats]:
        """[in_features] of every linear layer's inputs on those tokens, by the weight's name; from inputs.py."""
        self.calibration_tokens()
        with np.load(self.prepared / "inputs.npz") as file:
            return dict(file)

    def weights(self) -> dict[str, Floats]:
        """The float checkpoint, by its tensors' names."""
        with safe_open(self.checkpoint / "model.safetensors", framework="np") as file:
            return {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Adds the time of what is inside; the peak of memory is that of the whole process until then."""
        started_at = time.perf_counter()
        yield
        self.elapsed_s += time.perf_counter() - started_at
        self.peak_rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def write(self, out: Path, tool: str, packages: list[str], weights: Mapping[str, Floats], num_bits: float) -> None:
        """Writes the directory `out`.

        Args:
            out: where to; made if it is not there.
            tool: how the tool is called in tables.
            packages: whose versions are recorded.
            weights: every tensor of the checkpoint, de-quantized.
            num_bits: of all of them as the tool stores them, with scales and zero points.
        """
        shapes = {name: values.shape for name, values in self.weights().items()}
        found = {name: values.shape for name, values in weights.items()}
        if found != shapes:
            differing = sorted(name for name in found | shapes if found.get(name) != shapes.get(name))
            raise ValueError(f"{self.name} must have the checkpoint's tensors; {differing[:5]} differ.")
        damaged = [name for name, values in weights.items() if not np.isfinite(values).all()]
        if damaged:
            raise ValueError(f"{self.name} must be finite; {damaged[:5]} are not.")
        out.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: np.ascontiguousarray(weights[name], dtype=np.float32) for name in weights}, out / "model.safetensors"
        )
        record = {
            "name": self.name,
            "tool": tool,
            "versions": {package: importlib.metadata.version(package) for package in packages},
            "options": self.options,
            "bits_per_weight": num_bits / sum(int(np.prod(shape)) for shape in shapes.values()),
            "elapsed_s": self.elapsed_s,
            "peak_rss_mib": self.peak_rss_mib,
            "threads": self.threads,
            "calibration": self._calibration,
            "notes": self.notes,
        }
        (out / "contender.json").write_text(json.dumps(record, indent=2) + "\n")
        logger.info("%s: %.2f bits per weight, %.0f s", self.name, record["bits_per_weight"], self.elapsed_s)


def main(
    tool: str,
    packages: list[str],
    contenders: Mapping[str, Options],
    quantize: Callable[[Contender], tuple[Mapping[str, Floats], float]],
) -> None:
    """The command line that every peer's script has.

    Args:
        tool: how it is called in tables.
        packages: whose versions are recorded; those that make up the tool.
        contenders: options by the contender's name.
        quantize: returns what `Contender.write` takes as `weights` and `num_bits`.
    """
    parser = argparse.ArgumentParser(description=f"Quantizes a checkpoint with {tool}.")
    parser.add_argument("name", choices=contenders, nargs="?", help="Which contender to make; none: list them.")
    parser.add_argument("--checkpoint", type=Path, help="Float checkpoint with one model.safetensors.")
    parser.add_argument("--data", type=Path, help="Prepared data; its calibration tokens are used.")
    parser.add_argument("--prepared", type=Path, help="What run.py has made of the checkpoint for all contenders.")
    parser.add_argument("--out", type=Path, help="Directory for the contender.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequences", type=int, help="Use so many calibration sequences only.")
    arguments = parser.parse_args()
    if arguments.name is None:
        print(*contenders, sep="\n")  # noqa: T201
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    contender = Contender(arguments.name, contenders[arguments.name], arguments)
    weights, num_bits = quantize(contender)
    contender.write(arguments.out, tool, packages, weights, num_bits)
