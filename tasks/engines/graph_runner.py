"""One ONNX or OpenVINO graph on the CPU: named arrays in, named arrays out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.engines.onnxruntime import session_options
from tasks.engines.openvino import cpu_properties
from tasks.engines.openvino_session import describe_property

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

        settings = session_options(threads)
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        settings.add_session_config_entry("session.disable_quant_qdq", "1" if activations == "float32" else "0")
        # Without VNNI, ONNX Runtime 1.31 else makes integers in groups unsigned, with zero points that it refuses.
        settings.add_session_config_entry("session.qdqisint8allowed", "1")
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

    def __init__(
        self,
        file: Path,
        *,
        threads: int,
        precision: Literal["float32", "bfloat16"],
        activations: Literal["int8", "float32"],
    ) -> None:
        import openvino

        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": True})
        compiled: Any = core.compile_model(
            core.read_model(file),
            "CPU",
            cpu_properties(precision, activations, threads) | {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1},
        )
        self._request: Any = compiled.create_infer_request()
        self._outputs = [output.any_name for output in compiled.outputs]
        self.inputs = tuple(value.any_name for value in compiled.inputs)
        names = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_NUM_THREADS")
        self.facts = {name.lower(): describe_property(compiled.get_property(name)) for name in names}

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
