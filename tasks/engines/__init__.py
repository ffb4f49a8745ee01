"""Compiling a checkpoint for an engine and generating text with it. Each engine is one file and one name here."""

import sys
from typing import Annotated

from pydantic import Field

from tasks.engines.naming import describe, label, title
from tasks.engines.onnxruntime import OnnxRuntime
from tasks.engines.openvino import OpenVino
from tasks.engines.pytorch import PyTorch
from tasks.engines.tensorrt import TensorRT

# Importing openvino reports to Google Analytics, from a process of its own, unless this module cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

Engine = Annotated[OnnxRuntime | OpenVino | TensorRT, Field(discriminator="engine")]

__all__ = ["Engine", "OnnxRuntime", "OpenVino", "PyTorch", "TensorRT", "describe", "label", "title"]
