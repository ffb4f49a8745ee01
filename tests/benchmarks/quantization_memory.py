"""Peak memory of quantization against the number of layers: is it flat?

    python tests/benchmarks/quantization_memory.py [--full] [--sequences 128] [--method gptq]

Writes random Llamas of the shape of TinyLlama-1.1B with 2 and 4 (--full: and 22) layers into a scratch directory,
tensor by tensor, and quantizes each in a fresh process; prints the largest resident set (VmHWM, shared libraries
included) as a table and, in the last line, as JSON.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from infra.isolation import run_isolated
from tasks.calibration.tensor_files import TensorWriter
from tasks.quantization import Gptq, Grid, RoundToNearest
from tasks.quantization.summary import QuantizationSummary

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 4, 32000
GRID = Grid(bits=4, group_size=128)
METHODS = {
    "rtn": RoundToNearest(weights=GRID),
    "gptq": Gptq(weights=GRID),
    "gptq-mse-awq": Gptq(weights=GRID.model_copy(update={"range": "mse"}), awq=True),
}


def write_llama(out: Path, num_layers: int) -> int:
    """Write a random checkpoint of the 1.1B shape, float32; returns the number of its parameters."""
    rng = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCAB, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (VOCAB, HIDDEN),
    }
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in block.items()}
    with TensorWriter(out) as writer:
        for name, shape in shapes.items():
            values = np.ones(shape, np.float32)
            if len(shape) == 2:
                values = rng.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
            writer.add({f"{name}.weight": values})
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(out)
    (out / "tokenizer.json").write_text("{}")  # copied, never read
    return sum(int(np.prod(shape)) for shape in shapes.values())


def measure(num_layers: int, method: str, num_sequences: int, length: int, scratch: Path) -> dict[str, Any]:
    """One row of the table."""
    checkpoint, data, out, work = (scratch / name for name in ("checkpoint", "data", "out", "work"))
    for directory in (checkpoint, data, out, work):
        directory.mkdir(parents=True)
    num_parameters = write_llama(checkpoint, num_layers)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (num_sequences, length)).astype(np.int32)
    np.save(data / "calibration.npy", tokens)
    summary, finished = run_isolated(
        "tasks.quantization.apply:quantize_checkpoint",
        {"checkpoint": checkpoint, "data": data, "method": METHODS[method], "out": out, "work_dir": work},
        result=QuantizationSummary,
        log_path=scratch / "log",
    )
    return {
        "num_layers": num_layers,
        "num_parameters": num_parameters,
        "method": method,
        "num_sequences": num_sequences,
        "sequence_length": length,
        "peak_memory_mib": round(finished.peak_memory_mib),
        "size_mib": round(summary.size_bytes / 2**20),
        "elapsed_s": round(finished.elapsed_s, 1),
    }


def main() -> None:
    """Print the table and, last, the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also 22 layers")
    parser.add_argument("--layers", type=int, nargs="+", help="instead of 2 and 4")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--method", choices=METHODS, default="gptq")
    options = parser.parse_args()
    layers = options.layers or ([2, 4, 22] if options.full else [2, 4])
    rows = []
    sys.stdout.write("layers  parameters  sequences  method        peak MiB  checkpoint MiB  seconds\n")
    for num_layers in layers:
        with tempfile.TemporaryDirectory() as scratch:
            row = measure(num_layers, options.method, options.sequences, options.length, Path(scratch))
        rows.append(row)
        sys.stdout.write(
            f"{num_layers:6}  {row['num_parameters']:10}  {row['num_sequences']:9}  {row['method']:12}  "
            f"{row['peak_memory_mib']:8}  {row['size_mib']:14}  {row['elapsed_s']:7}\n"
        )
        sys.stdout.flush()
    about: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    about["num_threads"] = torch.get_num_threads()
    sys.stdout.write(json.dumps({**about, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
