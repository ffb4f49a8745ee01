"""One ONNX or OpenVINO graph on the CPU: named arrays in, named arrays out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

SPIN_US = "20"  # how long an idle thread of ONNX Runtime waits awake (docs/decisions/0003)

Array = NDArray[Any]


class GraphRunner(Protocol):
    """A loaded graph. What it gives may be handed to it again without a copy."""

    inputs: tuple[str, ...]
    facts: dict[str, str]  # what the engine says it computes in

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Every output by name; `array` makes numpy of one."""

    def array(self, value: Any) -> Array:
        """An output as numpy; the caller's own."""

    def close(self) -> None:
        """Frees the weights."""


class OnnxRuntimeRunner:
    """A graph in ONNX Runtime's CPU provider.

    Args:
        activations: what quantized weights behind DequantizeLinear are multiplied with. int8: inputs rounded by blocks;
            float32: the weights are dequantized when the graph is loaded, and take the memory of floats.
    """

    def __init__(self, file: Path, *, threads: int, activations: Literal["int8", "float32"]) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.set_denormal_as_zero", "1")
        settings.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        settings.add_session_config_entry("session.disable_quant_qdq", "1" if activations == "float32" else "0")
        if not _has_vnni():  # there, fast products of unsigned and signed bytes overflow; with it this only slows down
            settings.add_session_config_entry("session.x64quantprecision", "1")
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._session: Any = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.facts = {"provider": ", ".join(self._session.get_providers()), "threads": str(threads)}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Every output by name, in ONNX Runtime's memory."""
        values = {
            name: self._value(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            for name, value in inputs.items()
        }
        return dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, values), strict=True))

    def array(self, value: Any) -> Array:
        """An output as numpy."""
        found: Array = value.numpy()
        return found

    def close(self) -> None:
        """Frees the weights."""
        self._session = None


class OpenVinoRunner:
    """A graph in OpenVINO's CPU plugin.

    Args:
        activations: what quantized weights are multiplied with: inputs rounded in groups of 32, or as they are.
    """

    def __init__(self, file: Path, *, threads: int, precision: str, activations: Literal["int8", "float32"]) -> None:
        import openvino

        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": True})
        compiled: Any = core.compile_model(
            core.read_model(file),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32 if activations == "int8" else 0,
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": threads,
                # Two processes that both pin would share a core and leave another idle.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._request: Any = compiled.create_infer_request()
        self._outputs = [output.any_name for output in compiled.outputs]
        self.inputs = tuple(value.any_name for value in compiled.inputs)
        names = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_NUM_THREADS")
        self.facts = {name.lower(): _describe(compiled.get_property(name)) for name in names}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Every output by name, copied: the next call overwrites what it has."""
        outputs = self._request.infer(dict(inputs), share_inputs=True, share_outputs=False)
        return {name: outputs[name] for name in self._outputs}

    def array(self, value: Any) -> Array:
        """An output, which is numpy already."""
        found: Array = value
        return found

    def close(self) -> None:
        """Frees the weights."""
        self._request = None


def _has_vnni() -> bool:
    """Whether the processor sums byte products in 32 bits; an unknown one (not x86 Linux) is taken to."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return "vnni" in flags or "avx" not in flags


def _describe(value: Any) -> str:
    """A property's value as text, an element type by its short name."""
    return str(value.get_type_name()) if hasattr(value, "get_type_name") else str(value)
