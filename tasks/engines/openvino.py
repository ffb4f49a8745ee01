"""OpenVINO on the CPU: its options, and what it compiles."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from tasks.engines.decoder import read_decoder
from tasks.engines.genai_files import write_openvino_tokenizer
from tasks.engines.openvino_graph import build_model
from tasks.engines.openvino_session import MODEL_FILE, OpenVinoSession, open_session
from tasks.quantization import Activations, Grid
from tasks.quantization.activations import Format


class OpenVino(BaseModel, frozen=True, extra="forbid"):
    """OpenVINO's CPU plugin."""

    engine: Literal["openvino"] = "openvino"
    precision: Literal["float32", "bfloat16"] = Field(
        description="Of everything that is not a quantized weight's product. bfloat16 needs a processor that has it."
    )
    activations: Literal["int8", "float32"] = Field(
        "int8",
        description="What a quantized weight is multiplied with: the inputs rounded to 8 bits in groups of 32 as they "
        "come (fast), or as they are (exact, slow). Float weights are not affected; nor is anything on processors "
        "without VNNI or AMX, where OpenVINO multiplies in floats.",
    )
    kv_cache: Literal["uint8", "float16", "float32"] = Field("uint8", description="How keys and values are kept.")

    @property
    def executable(self) -> bool:
        """Whether what `compile` writes runs on this machine."""
        return self.cannot_run() is None

    def cannot_run(self) -> str | None:
        """Why this machine cannot run what `compile` builds as these options say; None if it can."""
        if problem := self.missing():
            return problem
        if self.precision == "bfloat16" and not _has_bfloat16():
            return (
                "OpenVINO computes in bfloat16 where the processor does (AVX-512, AMX); this one does not, and would "
                "compute in float32. Set `precision: float32`, or measure on another machine."
            )
        return None

    def cannot_load(self, bundle: Path) -> str | None:
        """Why this machine cannot load the bundle; None if it can. Without bfloat16 it answers in float32."""
        return self.missing()

    def missing(self) -> str | None:
        """What this machine lacks to compile and run it; None if nothing."""
        if importlib.util.find_spec("openvino") is None:
            return "The engine 'openvino' needs openvino. Install it: pip install 'slimline[openvino]'"
        return None

    def cannot_hold(self, grid: Grid) -> str | None:
        """Why this engine cannot multiply with weights on `grid`; None: it takes all integers."""
        if grid.format == "float8_e4m3":
            return "OpenVINO's CPU plugin has no FP8 products. Use integers, or the engine 'tensorrt'."
        return None

    def cannot_round(self, activations: Activations | None, kv_cache: Format | None) -> str | None:
        """Why this engine cannot round inputs, or the KV cache, like this; None if it can."""
        if activations:
            return (
                "OpenVINO rounds the inputs of weight-only layers itself, by groups of 32 as they come (its option "
                "`activations`), and does not take a checkpoint's scales. Leave `activations` of the quantization out, "
                "or use the engine 'onnxruntime'."
            )
        if kv_cache:
            return (
                "OpenVINO quantizes its KV cache itself (its option `kv_cache: uint8`) and takes no calibrated scales. "
                "Leave `kv_cache` of the quantization out."
            )
        return None

    def compile(self, checkpoint: Path, out: Path) -> tuple[str, ...]:
        """Writes the graph of a checkpoint, its weights and OpenVINO GenAI's files into the directory `out`.

        The same checkpoint and options give the same bytes. The graph names the precision of the KV cache and how
        inputs are rounded, so that they hold in OpenVINO GenAI too; the rest of the options apply when it is loaded.

        Returns:
            What a user of the bundle should know: why it cannot be loaded by OpenVINO GenAI, if so.

        Raises:
            ValueError: the checkpoint's family is not one that `read_decoder` knows.
        """
        import openvino

        model = build_model(read_decoder(checkpoint))
        for name, value in self._runtime_options().items():
            model.set_rt_info(value, ["runtime_options", name])
        openvino.save_model(model, out / MODEL_FILE, compress_to_fp16=False)
        problem = write_openvino_tokenizer(checkpoint, out)
        return (problem,) if problem else ()

    def load(self, bundle: Path, *, threads: int, profile: bool = False) -> OpenVinoSession:
        """A session of the graph in the directory `bundle`, with the attention that OpenVINO GenAI serves it with.

        With `profile`, it times every operator, see `OpenVinoSession.profile`.
        """
        properties = self.properties(threads) | {"NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        return open_session(bundle, properties | ({"PERF_COUNT": True} if profile else {}))

    def properties(self, threads: int) -> dict[str, Any]:
        """The CPU plugin's properties for these options."""
        return cpu_properties(self.precision, self.activations, threads) | self._runtime_options()

    def _runtime_options(self) -> dict[str, Any]:
        return {
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": _group_size(self.activations),
            "KV_CACHE_PRECISION": _ELEMENT_TYPES[self.kv_cache],
        }


_ELEMENT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8"}


def cpu_properties(
    precision: Literal["float32", "bfloat16"], activations: Literal["int8", "float32"], threads: int
) -> dict[str, Any]:
    """The CPU plugin's properties for any graph."""
    return {
        "INFERENCE_PRECISION_HINT": _ELEMENT_TYPES[precision],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _group_size(activations),
        "INFERENCE_NUM_THREADS": threads,
        # Two processes that both pin would share a core and leave another idle.
        "ENABLE_CPU_PINNING": False,
    }


@cache
def _has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _group_size(activations: Literal["int8", "float32"]) -> int:
    """Inputs that share a scale when they are rounded; 0: they are not."""
    return 32 if activations == "int8" else 0
