"""ONNX Runtime GenAI on models that its own builder writes; run by run.py in its own environment."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from contender import Floats, Generated, Ids, Making, Options, log_probs_of, main, quiet

HEAD8 = ["algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8"]
CONTENDERS: dict[str, Options] = {
    f"onnxruntime-genai-{name}": {
        "tool": "ONNX Runtime GenAI",
        "kind": kind,
        "precision": precision,
        "extra": extra,
        "float_embedding": precision == "int8",  # beside the LM head, though they are one weight
    }
    for name, kind, precision, extra in (
        ("float32", "float32", "fp32", []),
        ("int8", "int8", "int8", []),
        ("int8-kquant", "int8", "int8", ["algo_config=k_quant"]),
        ("int4", "int4", "int4", []),
        ("int4-kquant-head8", "int4", "int4", HEAD8),
        ("int4-g64-head8", "int4", "int4", ["block_size=64", "matmul_mixed_precision=last_matmul:int8"]),
    )
}
NO_END = 3
"""A token, <repo_name>, that takes the place of the end-of-text token, so that nothing ends early."""


def make(making: Making) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", making.checkpoint, "-o", making.out]
    command += ["-p", making.options["precision"], "-e", "cpu", "-c", making.work / "cache"]
    if making.options["extra"]:
        command += ["--extra_options", *making.options["extra"]]
    subprocess.run(command, check=True)


class GenAI:
    """Its model; each batch of prompts gets a generator of its own, as its examples do."""

    def __init__(self, bundle: Path, threads: int) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(bundle))
        session_options = {"intra_op_num_threads": threads}
        config.overlay(
            json.dumps({"model": {"eos_token_id": [NO_END], "decoder": {"session_options": session_options}}})
        )
        self._model = onnxruntime_genai.Model(config)
        self.facts = {"intra_op_num_threads": str(threads)}

    def generate(self, input_ids: Ids, new_tokens: int) -> Generated:
        batch_size, length = input_ids.shape
        with quiet():
            started_at = time.perf_counter()
            generator = self._generator(input_ids, length + new_tokens)
            generator.generate_next_token()
            ttft_s = time.perf_counter() - started_at
            while not generator.is_done():
                generator.generate_next_token()
            total_s = time.perf_counter() - started_at
        return Generated(ttft_s, total_s, [generator.get_sequence(row)[length:].tolist() for row in range(batch_size)])

    def log_probs(self, input_ids: Ids) -> Floats | None:
        generator = self._generator(input_ids[None], len(input_ids) + 1)
        return log_probs_of(generator.get_output("logits")[0], input_ids)

    def _generator(self, input_ids: Ids, max_length: int) -> "object":
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=max_length, batch_size=len(input_ids), do_sample=False)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(input_ids.astype(np.int32))
        return generator


def load(options: Options, bundle: Path, threads: int) -> GenAI:
    return GenAI(bundle, threads)


if __name__ == "__main__":
    main(["onnxruntime-genai", "onnxruntime"], CONTENDERS, make, load)
