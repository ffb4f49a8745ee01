"""Quantization methods. To add one: a module beside these, and its class in `QuantizationMethod`."""

from tasks.quantization.rtn import Grid, RoundToNearest

QuantizationMethod = (
    RoundToNearest  # the second makes it Annotated[RoundToNearest | ..., Field(discriminator="method")]
)

__all__ = ["Grid", "QuantizationMethod", "RoundToNearest"]
