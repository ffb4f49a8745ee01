"""TensorRT: a serialized plan built from the portable ONNX graph, strongly typed, with a profile for each phase.

Precision is what the graph says: a strongly typed network has no builder flags for it. TensorRT takes symmetric
integers only; measured with TensorRT for RTX 1.7, it fuses 8-bit weights with one scale per channel and 4-bit weights
in blocks into the product, and unpacks 8-bit weights in groups before it. docs/tensorrt.md is for users.
"""

import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from tasks.engines.decoder import Decoder, read_decoder
from tasks.engines.export import Precision, export_decoder
from tasks.engines.tensorrt_library import build_plan, first_gpu, import_library, unusable
from tasks.engines.tensorrt_plan import (
    GRAPH_FILE,
    PLAN_FILE,
    ComputeCapability,
    HardwareCompatibility,
    Library,
    PlanRecord,
    cannot_execute,
    cannot_read,
    number,
    profiles,
    read_record,
    write_record,
)
from tasks.engines.tensorrt_session import TensorRTSession
from tasks.quantization import Activations, Grid
from tasks.quantization.activations import Format

NEEDS = {"FP8": "8.9", "INT4": "8.0"}  # compute capability; TensorRT for RTX 1.7 refuses older targets, measured
RTX_RUNS_ON = ("7.5", "8.0", "8.6", "8.9")  # and 12.x
ONLY_IN: dict[str, tuple[Library, str]] = {  # options that one library has, and what to do with the other
    "compute_capabilities": (
        "tensorrt_rtx",
        "Enterprise TensorRT builds for the GPU of its machine; drop it, or set `hardware_compatibility` for others.",
    ),
    "runtime_cache": (
        "tensorrt_rtx",
        "Enterprise TensorRT has its kernels in the plan; drop it, or keep their timings in `timing_cache`.",
    ),
    "hardware_compatibility": (
        "tensorrt",
        "Plans of TensorRT for RTX run on every GPU they are built for; name those in `compute_capabilities`.",
    ),
    "version_compatible": (
        "tensorrt",
        "Plans of TensorRT for RTX are read by the very version that built them; drop it.",
    ),
    "timing_cache": (
        "tensorrt",
        "TensorRT for RTX times nothing when it builds; drop it, or set `runtime_cache` for what it compiles at load.",
    ),
}


class TensorRT(BaseModel, frozen=True, extra="forbid"):
    """TensorRT on an NVIDIA GPU; without one, a plan that is built and not run."""

    engine: Literal["tensorrt"] = "tensorrt"
    precision: Precision = Field(description="Of activations, KV cache, float weights and scales.")
    library: Library = Field(
        "tensorrt_rtx",
        description="TensorRT for RTX (GeForce and RTX GPUs; builds anywhere) or enterprise TensorRT (data centers).",
    )
    max_batch_size: int = Field(8, ge=1, description="Most sequences at once.")
    max_prompt: int = Field(1024, ge=1, description="Longest prompt; at most max_length.")
    max_length: int = Field(2048, ge=2, description="Longest sequence, prompt and new tokens; at most the model's own.")
    compute_capabilities: tuple[ComputeCapability, ...] = Field(
        (), description="TensorRT for RTX: GPUs that run the plan; empty: 8.0 and later (with FP8 8.9 and later)."
    )
    hardware_compatibility: HardwareCompatibility | None = Field(
        None, description="Enterprise: other GPUs that run the plan; null: only the kind it was built on, fastest."
    )
    version_compatible: bool = Field(False, description="Enterprise: later versions of TensorRT read the plan too.")
    refit: bool = Field(False, description="The plan's weights can be replaced; built on a machine with a GPU.")
    strip_weights: bool = Field(
        False, description="A plan without weights, which it gets from a graph beside it at load; built with a GPU."
    )
    timing_cache: Path | None = Field(
        None, description="Enterprise: file of kernels' timings, read and written by builds, which it makes faster."
    )
    runtime_cache: Path | None = Field(
        None, description="TensorRT for RTX: file of compiled kernels, read at load and written at the end."
    )

    @model_validator(mode="after")
    def _prompt_fits(self) -> "TensorRT":
        if self.max_prompt > self.max_length:
            raise ValueError(f"max_prompt must be at most max_length, {self.max_length}; got {self.max_prompt}")
        return self

    @model_validator(mode="after")
    def _library_has_the_options(self) -> "TensorRT":
        for option, (library, advice) in ONLY_IN.items():
            if getattr(self, option) and self.library != library:
                raise ValueError(f"`{option}` is an option of library {library!r}; got {self.library!r}. {advice}")
        return self

    @model_validator(mode="after")
    def _capabilities_fit(self) -> "TensorRT":
        named = self.compute_capabilities
        if len(set(named)) < len(named):
            raise ValueError(f"`compute_capabilities` names each once; got {', '.join(named)}.")
        if len(named) > 1 and (self.refit or self.strip_weights):
            raise ValueError(
                "`refit` and `strip_weights` need a plan for one compute capability; got "
                f"{', '.join(named)}. Compile an engine for each."
            )
        return self

    @property
    def executable(self) -> bool:
        """Whether this machine can run the plan that `compile` builds."""
        return self.cannot_run() is None

    def cannot_run(self) -> str | None:
        """Why this machine cannot run the plan that `compile` builds; None if it can."""
        return self.missing() or self._no_gpu()

    def missing(self) -> str | None:
        """Why this machine cannot compile for this engine, and what to do; None if it can."""
        if problem := unusable(self.library):
            return problem
        if first_gpu():
            return None
        if self.library == "tensorrt":
            return (
                "Enterprise TensorRT needs an NVIDIA GPU even to build a plan; the CUDA driver reports none. "
                "Compile on a machine with one, or use library 'tensorrt_rtx'."
            )
        if self.refit or self.strip_weights:
            return (
                f"A plan with `{'refit' if self.refit else 'strip_weights'}` is built on a machine with an NVIDIA GPU; "
                "the CUDA driver reports none. Compile on one, or drop the option."
            )
        return None

    def _no_gpu(self) -> str | None:
        """Why the plan has no GPU to run on here; None if it has."""
        gpu = first_gpu()
        if gpu is None:
            return (
                "Running a TensorRT plan needs an NVIDIA GPU; the CUDA driver reports none. Run it on a machine with "
                "one."
            )
        capability = gpu.compute_capability
        if self.library == "tensorrt_rtx" and not (capability in RTX_RUNS_ON or gpu.generation[0] == 12):
            return (
                f"TensorRT for RTX runs on compute capabilities {', '.join(RTX_RUNS_ON)} and 12.x; this GPU has "
                f"{capability}. Use library 'tensorrt'."
            )
        if self.compute_capabilities and capability not in self.compute_capabilities:
            return (
                f"The plan is for compute capability {', '.join(self.compute_capabilities)}; this GPU has "
                f"{capability}. Add it to `compute_capabilities`."
            )
        import torch

        if not torch.cuda.is_available():
            return (
                "TensorRT's buffers are torch tensors on the GPU; this torch has no CUDA. "
                "Install a CUDA build of torch."
            )
        return None

    def cannot_hold(self, grid: Grid) -> str | None:
        """Why this engine cannot multiply with weights on `grid`; None if it can."""
        if not grid.symmetric:
            return "TensorRT takes no zero points; quantize with `symmetric: true` for it."
        if grid.full_range and grid.bits > 4:
            return (
                f"TensorRT takes 8-bit integers, which hold {grid.bits} bits too, with positive scales only; "
                "drop `full_range`."
            )
        if grid.format == "float8_e4m3":
            return self._too_old("FP8")
        return self._too_old("INT4") if grid.bits <= 4 else None

    def cannot_round(self, activations: Activations | None, kv_cache: Format | None) -> str | None:
        """Why this engine cannot round inputs, or the KV cache, like this; None if it can."""
        if kv_cache:
            return "The portable ONNX graph keeps a float KV cache. Leave `kv_cache` out for TensorRT."
        if activations and not activations.symmetric:
            return "TensorRT takes no zero points, those of inputs neither; set `symmetric: true` in `activations`."
        if activations and "*" not in activations.static:
            return (
                "TensorRT's Q/DQ has no scale per token. Set `static: [\"*\"]` in `activations`, so that every layer's "
                "inputs have one calibrated scale, and `ignore` those that should stay float."
            )
        return self._too_old("FP8") if activations and activations.format == "float8_e4m3" else None

    def _too_old(self, kind: str) -> str | None:
        """Which of the GPUs that the plan is for cannot multiply such numbers; None if all can."""
        older = [c for c in self.compute_capabilities if number(c) < number(NEEDS[kind])]
        if not older:
            return None
        return (
            f"{kind} needs compute capability {NEEDS[kind]} or later; `compute_capabilities` names {', '.join(older)}. "
            "Leave those out, or use INT8."
        )

    def compile(self, checkpoint: Path, out: Path) -> tuple[str, ...]:
        """Writes the plan and its record into `out`; without weights in the plan, the graph that holds them too.

        Returns:
            What a user of the bundle should know: nothing.

        Raises:
            ValueError: the library is missing, the checkpoint has integers with zero points, or TensorRT refuses the
                graph; the message names the node.
        """
        if problem := self.missing():
            raise ValueError(problem)
        decoder = read_decoder(checkpoint)
        _refuse_strange_integers(decoder)
        kinds = _kinds(decoder)
        for kind in kinds:
            if problem := self._too_old(kind):
                raise ValueError(problem)
        sizes = profiles(
            decoder, max_batch_size=self.max_batch_size, max_prompt=self.max_prompt, max_length=self.max_length
        )
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            graph = Path(scratch) / GRAPH_FILE
            export_decoder(decoder, graph, precision=self.precision, max_length=self.max_length)
            built = build_plan(graph, sizes, self)
            if self.strip_weights:
                for file in Path(scratch).iterdir():
                    file.replace(out / file.name)
        (out / PLAN_FILE).write_bytes(built.plan)
        on_gpu = self.library == "tensorrt" or self.refit or self.strip_weights
        record = PlanRecord(
            library=self.library,
            version=built.version,
            built_on=first_gpu() if on_gpu else None,
            compute_capabilities=self.compute_capabilities,
            hardware_compatibility=self.hardware_compatibility,
            version_compatible=self.version_compatible,
            refit=self.refit,
            strip_weights=self.strip_weights,
            float8="FP8" in kinds,
            products=built.products,
        )
        write_record(out, record)
        return ()

    def cannot_load(self, bundle: Path) -> str | None:
        """Why this machine cannot run the plan in `bundle`: no GPU, another one, or another version; None if it can.

        Raises:
            ValueError: the plan's record is missing or damaged.
        """
        if problem := self.cannot_run():
            return problem
        record = read_record(bundle)
        version = str(import_library(self.library).__version__)
        gpu = first_gpu()
        assert gpu  # cannot_run asked
        return cannot_read(record, library=self.library, version=version) or cannot_execute(record, gpu)

    def load(self, bundle: Path, *, threads: int) -> TensorRTSession:
        """A session on the first GPU; `threads` is for engines on the CPU and is not used.

        Raises:
            ValueError: there is no GPU here that the library's runtime supports, the plan is of another version or for
                another GPU, or it does not fit into the GPU's memory.
        """
        if problem := self.cannot_load(bundle):
            raise ValueError(problem)
        return TensorRTSession(bundle, read_record(bundle), runtime_cache=self.runtime_cache)


def _kinds(decoder: Decoder) -> list[str]:
    """Which of `NEEDS` the decoder has."""
    weights = [weight for _, weight in decoder.quantized()]
    formats = {weight.format for weight in weights} | {weight.inputs.format for weight in weights if weight.inputs}
    kinds = {"FP8": "float8_e4m3" in formats, "INT4": any(weight.bits <= 4 for weight in weights)}
    return [kind for kind, there in kinds.items() if there]


def _refuse_strange_integers(decoder: Decoder) -> None:
    for name, weight in decoder.quantized():
        if weight.zero_point is not None:
            raise ValueError(
                f"TensorRT takes float checkpoints and symmetric integers (int8 or int4, zero point 0); {name} is "
                "asymmetric. Quantize with `symmetric: true` for this engine."
            )
        if weight.bits > 4 and weight.scale.min() < 0:
            raise ValueError(
                f"TensorRT takes 8-bit integers with positive scales only; {name} has scales down to "
                f"{weight.scale.min():.4g}, as `full_range` and GGUF's Q5_0 have. Quantize without either."
            )
        if weight.inputs and (weight.inputs.scale is None or weight.inputs.zero_point):
            raise ValueError(
                f"TensorRT takes static scales of inputs without zero points; those of {name} are "
                f"{'per token' if weight.inputs.scale is None else 'asymmetric'}. Quantize with symmetric static ones."
            )
    if decoder.cache:
        raise ValueError(
            f"The portable ONNX graph keeps a float KV cache; this one is {decoder.cache.format}. Quantize without "
            "`kv_cache` for this engine."
        )
