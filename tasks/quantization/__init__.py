"""Quantization methods. To add one: a module beside these, and its class in `QuantizationMethod`."""

from typing import Annotated

from pydantic import Field

from tasks.quantization.activations import Activations
from tasks.quantization.gptq import Gptq
from tasks.quantization.ranges import Grid
from tasks.quantization.rtn import RoundToNearest

QuantizationMethod = Annotated[RoundToNearest | Gptq, Field(discriminator="method")]

__all__ = ["Activations", "Gptq", "Grid", "QuantizationMethod", "RoundToNearest"]
