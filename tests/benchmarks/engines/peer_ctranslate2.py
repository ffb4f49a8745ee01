"""CTranslate2 on models that its own converter writes; run by run.py in its own environment."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from contender import Floats, Generated, Ids, Making, Options, main, quiet

CONTENDERS: dict[str, Options] = {
    "ctranslate2-float32": {"tool": "CTranslate2", "kind": "float32", "quantization": "float32"},
    "ctranslate2-int8": {"tool": "CTranslate2", "kind": "int8", "quantization": "int8"},
}


def make(making: Making) -> None:
    cli = Path(sys.executable).with_name("ct2-transformers-converter")
    command = [cli, "--model", making.checkpoint, "--output_dir", making.out, "--force"]
    subprocess.run([*command, "--quantization", making.options["quantization"]], check=True)


class CTranslate2:
    """A generator; it reads and writes tokens as text."""

    def __init__(self, bundle: Path, threads: int) -> None:
        self._generator = ctranslate2.Generator(str(bundle), device="cpu", inter_threads=1, intra_threads=threads)
        self._vocabulary: list[str] = json.loads((bundle / "vocabulary.json").read_text())
        self.facts = {"compute_type": self._generator.compute_type}

    def generate(self, input_ids: Ids, new_tokens: int) -> Generated:
        prompts = self._text(input_ids)
        first_at: list[float] = []

        def seen(result: Any) -> bool:
            if result.step == 0:
                first_at.append(time.perf_counter())
            return False

        with quiet():
            started_at = time.perf_counter()
            found = self._generator.generate_batch(
                prompts,
                max_length=new_tokens,
                min_length=new_tokens,  # so the end-of-text token is not chosen
                include_prompt_in_result=False,
                callback=seen,
            )
            total_s = time.perf_counter() - started_at
        return Generated(max(first_at) - started_at, total_s, [result.sequences_ids[0] for result in found])

    def log_probs(self, input_ids: Ids) -> Floats | None:
        (found,) = self._generator.score_batch(self._text(input_ids[None]))
        log_probs: Floats = np.array(found.log_probs, np.float32)
        if len(log_probs) != len(input_ids) - 1:
            raise RuntimeError(f"{len(input_ids)} tokens must have one score less; got {len(log_probs)}.")
        return log_probs

    def _text(self, input_ids: Ids) -> list[list[str]]:
        return [[self._vocabulary[token] for token in row] for row in input_ids.tolist()]


def load(options: Options, bundle: Path, threads: int) -> CTranslate2:
    return CTranslate2(bundle, threads)


if __name__ == "__main__":
    main(["ctranslate2"], CONTENDERS, make, load)
