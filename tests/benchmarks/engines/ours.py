"""Slimline's own contenders: engine bundles in Slimline's sessions; run by run.py in Slimline's environment.

Weights are rounded to nearest: an engine's time does not depend on values. The embedding, which is the LM head too, has
8 bits where the blocks have 4.
"""

from pathlib import Path
from typing import Any

import numpy as np
from contender import Floats, Generated, Ids, Making, Options, generate_greedily, log_probs_of, main

from tasks.engines.compiling import compile_engine
from tasks.engines.generation import Session
from tasks.engines.onnxruntime import OnnxRuntime
from tasks.engines.openvino import OpenVino
from tasks.validation.latency_worker import load as load_session

METHODS: dict[str, dict[str, Any]] = {
    "int8": {"weights": {"bits": 8}, "embeddings": {"bits": 8, "group_size": 32}},
    "int4-asym-g32": {
        "weights": {"bits": 4, "symmetric": False, "group_size": 32},
        "embeddings": {"bits": 8, "group_size": 32},
    },
    "int4-full-g64": {"weights": {"bits": 4, "group_size": 64, "full_range": True}, "embeddings": {"bits": 8}},
}
CONTENDERS: dict[str, Options] = {
    f"slimline-{engine}-{weights}": {
        "tool": "Slimline",
        "kind": weights.partition("-")[0],
        "engine": {"engine": engine, "precision": "float32"},
        "weights": weights,
    }
    for engine in ("onnxruntime", "openvino")
    for weights in ("float32", *METHODS)
}
CONTENDERS |= {  # float operations in bfloat16, as OpenVINO does by itself on processors with AMX
    f"slimline-openvino-{weights}-bfloat16": {
        "tool": "Slimline",
        "kind": "bfloat16" if weights == "float32" else weights.partition("-")[0],
        "engine": {"engine": "openvino", "precision": "bfloat16"},
        "weights": weights,
    }
    for weights in ("float32", "int8", "int4-full-g64")
}
CONTENDERS |= {  # made of a smaller student, which the runner is given
    f"{name}-student": {**CONTENDERS[name], "student": True}
    for name in (f"slimline-{engine}-{weights}" for engine in ("onnxruntime", "openvino") for weights in METHODS)
}
ENGINES = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


def make(making: Making) -> None:
    weights = making.options["weights"]
    checkpoint = making.checkpoint
    if weights != "float32":
        checkpoint = making.work / weights
        if not checkpoint.exists():
            quantize(making, weights, checkpoint)
    engine = ENGINES[making.options["engine"]["engine"]].model_validate(making.options["engine"])
    compile_engine(checkpoint=checkpoint, data=making.data, engine=engine, threads=making.threads, out=making.out)


def quantize(making: Making, weights: str, out: Path) -> None:
    from tasks.quantization import RoundToNearest
    from tasks.quantization.apply import quantize_checkpoint

    partial = out.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    method = RoundToNearest.model_validate(METHODS[weights])
    quantize_checkpoint(checkpoint=making.checkpoint, data=making.data, method=method, out=partial)
    partial.rename(out)


class Bundle:
    """A session of any engine."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.facts = session.facts

    def generate(self, input_ids: Ids, new_tokens: int) -> Generated:
        return generate_greedily(
            lambda prompts: self._session.prefill(prompts)[:, -1], self._session.decode, input_ids, new_tokens
        )

    def log_probs(self, input_ids: Ids) -> Floats | None:
        logits = self._session.prefill(np.ascontiguousarray(input_ids[None, :-1]), num_logits=len(input_ids) - 1)
        return log_probs_of(logits[0], input_ids)


def load(options: Options, bundle: Path, threads: int) -> Bundle:
    _, session = load_session(bundle, original=False, threads=threads)
    return Bundle(session)


if __name__ == "__main__":
    main(["onnxruntime", "openvino"], CONTENDERS, make, load)
