"""Compiling a checkpoint for an engine and generating text with it. Each engine is one file and one name here."""

from typing import Annotated

from pydantic import Field

from tasks.engines.naming import describe, label
from tasks.engines.onnxruntime import OnnxRuntime
from tasks.engines.openvino import OpenVino
from tasks.engines.pytorch import PyTorch
from tasks.engines.tensorrt import TensorRT

Engine = Annotated[OnnxRuntime | OpenVino | TensorRT, Field(discriminator="engine")]

__all__ = ["Engine", "OnnxRuntime", "OpenVino", "PyTorch", "TensorRT", "describe", "label"]
