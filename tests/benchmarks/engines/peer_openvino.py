"""OpenVINO GenAI on models that optimum-intel exports and NNCF compresses; run by run.py in its own environment.

Its defaults are kept but for prefix caching, which would let memory grow with every prompt and answers nothing here:
every prompt is new. On processors with AMX the default computes in bfloat16; "f32" in a name asks for float32. "sdpa"
is its older stateful backend, the other one paged attention.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from contender import Floats, Generated, Ids, Making, Options, log_probs_of, main, quiet

FORMATS: dict[str, list[str]] = {
    "float32": ["--weight-format", "fp32"],
    "int8": ["--weight-format", "int8"],
    "int4-sym-g64": ["--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0"],
}
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
SDPA = {"ATTENTION_BACKEND": "SDPA"}
CONTENDERS: dict[str, Options] = {
    f"openvino-genai-{name}": {"tool": "OpenVINO GenAI", "kind": kind, "format": weights, "properties": properties}
    for name, kind, weights, properties in (
        ("float32", "float32", "float32", F32),
        ("bfloat16", "bfloat16", "float32", {"INFERENCE_PRECISION_HINT": "bf16"}),
        ("int8", "int8", "int8", {}),
        ("int8-f32", "int8", "int8", F32),
        ("int4-sym-g64", "int4", "int4-sym-g64", {}),
        ("int4-sym-g64-f32", "int4", "int4-sym-g64", F32),
        ("int4-sym-g64-sdpa", "int4", "int4-sym-g64", SDPA),
        ("int4-sym-g64-f32-sdpa", "int4", "int4-sym-g64", F32 | SDPA),
    )
} | {
    f"slimline-{weights}-in-openvino-genai-{name}": {
        "tool": "Slimline",
        "kind": kind,
        "bundle_of": f"slimline-openvino-{weights}",
        "properties": properties,
    }
    for weights, kind in (("int8", "int8"), ("int4-full-g64", "int4"))
    for name, properties in (("default", {}), ("f32", F32))
}
CONTENDERS |= {
    name.replace("-in-", "-student-in-"): {**options, "bundle_of": f"{options['bundle_of']}-student", "student": True}
    for name, options in CONTENDERS.items()
    if "bundle_of" in options
}
"""OpenVINO GenAI's own models, and Slimline's bundles in the same pipeline."""


def make(making: Making) -> None:
    """One export for each format; contenders of one share its files."""
    weights = making.options["format"]
    exported = making.work / weights
    if not exported.exists():
        partial = exported.with_suffix(".partial")
        cli = Path(sys.executable).with_name("optimum-cli")
        task = ["--task", "text-generation-with-past"]
        command = [cli, "export", "openvino", "--model", making.checkpoint, *task, *FORMATS[weights], partial]
        subprocess.run(command, check=True)
        partial.rename(exported)
    for file in exported.iterdir():
        (making.out / file.name).hardlink_to(file)


class GenAI:
    """Its pipeline for text."""

    def __init__(self, bundle: Path, properties: dict[str, str], threads: int) -> None:
        import openvino_genai

        self._genai = openvino_genai
        self._bundle = bundle
        self._properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, **properties}
        options: dict[str, Any] = {}
        if "ATTENTION_BACKEND" not in properties:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False
            scheduler.max_num_batched_tokens = 1 << 16  # as its default without a SchedulerConfig: prompts in one piece
            options["scheduler_config"] = scheduler
        self._pipeline = openvino_genai.LLMPipeline(bundle, "CPU", **self._properties, **options)
        default = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
        self.facts = {"inference_precision_hint": properties.get("INFERENCE_PRECISION_HINT", f"default, {default}")}

    def generate(self, input_ids: Ids, new_tokens: int) -> Generated:
        config = self._genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        prompts = openvino.Tensor(np.ascontiguousarray(input_ids))
        inputs = self._genai.TokenizedInputs(prompts, openvino.Tensor(np.ones_like(input_ids)))
        with quiet():
            started_at = time.perf_counter()
            found = self._pipeline.generate(inputs, config)
            total_s = time.perf_counter() - started_at
        ttft_s = max(found.perf_metrics.raw_metrics.m_times_to_first_token) / 1e6
        return Generated(ttft_s, total_s, [list(tokens) for tokens in found.tokens])

    def log_probs(self, input_ids: Ids) -> Floats | None:
        """From the same graph by OpenVINO alone: the pipeline does not give logits."""
        properties = {name: value for name, value in self._properties.items() if name != "ATTENTION_BACKEND"}
        if "reader" not in self.__dict__:
            compiled = openvino.Core().compile_model(self._bundle / "openvino_model.xml", "CPU", properties)
            self.reader = compiled.create_infer_request()
        self.reader.reset_state()
        ids = input_ids[None, :-1]
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in self.reader.model_inputs for name in port.get_names()}
        outputs = self.reader.infer({name: value for name, value in inputs.items() if name in names})
        return log_probs_of(outputs["logits"][0], input_ids)


def load(options: Options, bundle: Path, threads: int) -> GenAI:
    return GenAI(bundle, options["properties"], threads)


if __name__ == "__main__":
    main(["openvino", "openvino-genai", "optimum-intel", "nncf"], CONTENDERS, make, load)
