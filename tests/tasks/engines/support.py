"""Which families run on which engine in which precision, tried on tiny models; writes docs/support.md.

    python -m tests.tasks.engines.support > docs/support.md

`test_support.py` tries each again and compares, so the table holds what happens and nothing else.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnxruntime

from tasks.engines import OnnxRuntime, OpenVino, PyTorch
from tasks.engines.decoder import read_decoder
from tasks.engines.export import export_decoder
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tests.tasks.engines import tiny_families

PRECISIONS = {"float32": None, "int8": Grid(bits=8), "int4": Grid(bits=4, group_size=32)}
ENGINES = {
    "ONNX Runtime": OnnxRuntime(precision="float32", activations="float32"),
    "OpenVINO": OpenVino(precision="float32", activations="float32", kv_cache="float32"),
}
PORTABLE = "portable ONNX"
LENGTH, DECODED = 24, 4
LARGEST_ERROR = 1e-4  # of logits below 7: float32 sums in another order
HEAD = """# Which models run where

Written by `python -m tests.tasks.engines.support > docs/support.md`; `tests/tasks/engines/test_support.py` tries every
line again. Do not edit it by hand.

Each line is a tiny random model of the family with what makes it different switched on (windows, soft caps, biases,
learned positions, parts of heads that turn). "yes": an engine's graph of it reads a prompt of {prompt} tokens and
{decoded} more one by one, two sequences at once, and every logit is within {error} of PyTorch's on the same weights.
int8 is per channel, int4 in groups of 32, both rounded to nearest, with embedding and LM head of 8 bits; the engines
multiply with the integers and float32 inputs. "{portable}" is the graph that TensorRT takes, here run by ONNX Runtime;
TensorRT for RTX builds a float16 plan of it for every family (`test_support.py`, where it is installed), which was not
run.

"""
TAIL = """
What a family's configuration can ask for beside that:

* Refused by name: rotary scaling other than default, linear, llama3 and longrope; activations other than silu, gelu,
  the tanh forms of gelu, and relu; OPT with norms after the attention, without a final norm or with projected
  embeddings; bidirectional attention; cross attention. The engine `pytorch` runs what transformers runs.
* longrope (Phi-3 with 128k) runs up to the length that the model was first trained with, `max_length` is cut to it:
  beyond, every earlier key would turn otherwise.
* ONNX Runtime needs heads of a multiple of 8 dimensions.
* OpenVINO fuses attention unless its scores are capped (Gemma 2): then it is computed step by step, and keys and values
  stay as they are computed, whatever the engine's `kv_cache` says, and OpenVINO GenAI's pipeline cannot serve it:
  Slimline's own session answers, without lookup or draft.

What the other stages do with a family:

* Quantization (all methods) and pruning take every family but GPT-2.
* A quantized KV cache (`kv_cache`) is refused for OPT and GPT-NeoX, for which stock transformers takes no scales.
* compressed-tensors 0.20 in stock transformers does not see the tokens in the inputs of OPT's feed-forward layers and
  leaves them unrounded where `activations` are dynamic; PyTorch here and ONNX Runtime round them per token.
* AWQ and SmoothQuant leave the last projection of networks without a gate (OPT, GPT-NeoX) as it is.
* Distillation and training of quantized models refuse capped logits (Gemma 2).
"""


def line(family: str, precision: str, folder: Path) -> str:
    """The row of the table, tried."""
    checkpoint = tiny_families.save(family, tiny_families.FAMILIES[family], folder / "float")
    cells, reasons = [], []
    try:
        checkpoint = _quantized(checkpoint, precision, folder)
        expected = _logits(PyTorch().load(checkpoint, threads=1).prefill, None)
        tries: dict[str, Callable[[], np.ndarray]] = {
            **{name: lambda name=name: _engine(name, checkpoint, folder) for name in ENGINES},
            PORTABLE: lambda: _portable(checkpoint, folder),
        }
        for name, attempt in tries.items():
            try:
                error = float(np.abs(attempt() - expected).max())
                cells.append("yes" if error <= LARGEST_ERROR else f"off by {error:.1g}")
            except ValueError as refusal:
                cells.append("no")
                reasons.append(f"{name}: {refusal}")
    except ValueError as refusal:
        cells, reasons = ["no"] * (len(ENGINES) + 1), [str(refusal)]
    return f"| {family} | {precision} | {' | '.join(cells)} | {' '.join(reasons)} |"


def document(lines: Iterable[str]) -> str:
    """docs/support.md."""
    head = HEAD.format(prompt=LENGTH - DECODED, decoded=DECODED, error=LARGEST_ERROR, portable=PORTABLE)
    columns = ["family", "weights", *ENGINES, PORTABLE, "why not"]
    table = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *lines]
    return head + "\n".join(table) + "\n" + TAIL


def _quantized(checkpoint: Path, precision: str, folder: Path) -> Path:
    grid = PRECISIONS[precision]
    if grid is None:
        return checkpoint
    out = folder / precision
    out.mkdir()
    method = RoundToNearest(weights=grid, embeddings=Grid(bits=8))
    quantize_checkpoint(checkpoint=checkpoint, data=checkpoint, method=method, out=out)
    return out


def _tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, tiny_families.VOCAB_SIZE, (2, LENGTH))


def _logits(
    prefill: Callable[[np.ndarray, int], np.ndarray], decode: Callable[[np.ndarray], np.ndarray] | None
) -> np.ndarray:
    """[2, LENGTH, vocab_size]: of a prompt, and of the rest token by token; of all at once without `decode`."""
    tokens = _tokens()
    if decode is None:
        return prefill(tokens, LENGTH)
    prompt = LENGTH - DECODED
    parts = [prefill(tokens[:, :prompt], prompt)]
    parts += [decode(tokens[:, position])[:, None] for position in range(prompt, LENGTH)]
    return np.concatenate(parts, axis=1)


def _engine(name: str, checkpoint: Path, folder: Path) -> np.ndarray:
    bundle = folder / name
    bundle.mkdir()
    ENGINES[name].compile(checkpoint, bundle)
    session = ENGINES[name].load(bundle, threads=1)
    return _logits(session.prefill, session.decode)


def _portable(checkpoint: Path, folder: Path) -> np.ndarray:
    decoder, file = read_decoder(checkpoint), folder / "portable.onnx"
    export_decoder(decoder, file, precision="float32", max_length=LENGTH)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # inputs as they are
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    caches = [f"past_key_values.{i}.{half}" for i in range(len(decoder.layers)) for half in ("key", "value")]
    past = [np.zeros((2, decoder.num_kv_heads, 0, decoder.head_dim), np.float32)] * len(caches)

    def run(input_ids: np.ndarray) -> np.ndarray:
        start, length = past[0].shape[2], input_ids.shape[1]
        feeds = {
            "input_ids": input_ids,
            "attention_mask": np.ones((2, start + length), np.int64),
            "position_ids": np.tile(np.arange(start, start + length), (2, 1)),
            "logit_indices": np.arange(length),
        }
        logits, *past[:] = session.run(None, feeds | dict(zip(caches, past, strict=True)))
        return np.asarray(logits)

    return _logits(lambda prompt, _: run(prompt), lambda token: run(token[:, None])[:, 0])


def main() -> None:
    """Write the document to standard output."""
    lines = []
    for family in tiny_families.FAMILIES:
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                lines.append(line(family, precision, Path(folder)))
    sys.stdout.write(document(lines))


if __name__ == "__main__":
    main()
