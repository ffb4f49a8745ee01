"""Quantization methods. To add one: a module beside these, and its class in `QuantizationMethod`."""

from typing import Annotated

from pydantic import Field

from tasks.quantization.activations import Activations
from tasks.quantization.gptq import Gptq
from tasks.quantization.mixed import possible_grids
from tasks.quantization.ranges import Grid
from tasks.quantization.rtn import RoundToNearest
from tasks.quantization.source import FromSource

QuantizationMethod = Annotated[RoundToNearest | Gptq | FromSource, Field(discriminator="method")]

__all__ = ["Activations", "FromSource", "Gptq", "Grid", "QuantizationMethod", "RoundToNearest", "grids_of"]


def grids_of(method: QuantizationMethod | None) -> tuple[Grid, ...]:
    """Every grid that `method` may put weights on; those that a source has are known from the source only."""
    if method is None:
        return ()
    if isinstance(method, FromSource):
        return (method.otherwise,) if method.otherwise else ()
    return possible_grids(method.weights, method.embeddings)
