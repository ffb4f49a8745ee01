"""As the source has it: the integers, scales and offsets of a quantized source, carried over instead of rounded again.

GGUF's block types (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h) with one scale for each 32 weights
are grids of ours: d * (q - 2 ** (bits - 1)) symmetric, where d may be negative, and d * q + m with a real zero point.
Its k-quants multiply two scales, which no float16 holds; they are rounded to another grid, or refused.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, model_validator

from tasks.quantization.ranges import Grid
from tasks.quantization.rtn import round_to_nearest

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.quantization.checkpoint_format import QuantizedWeight

GGUF_GRIDS = {
    "Q4_0": Grid(bits=4, group_size=32),
    "Q4_1": Grid(bits=4, symmetric=False, group_size=32, zero_point="real"),
    "Q5_0": Grid(bits=5, group_size=32),
    "Q5_1": Grid(bits=5, symmetric=False, group_size=32, zero_point="real"),
    "Q8_0": Grid(bits=8, group_size=32),
}
"""The grids of GGUF's types that are carried over."""

REAL_TABLE = "embeddings are looked up by integer kernels, which take no real zero points"


class FromSource(BaseModel, frozen=True, extra="forbid"):
    """Keep what a quantized source (GGUF, compressed-tensors) came with; for weights that nothing has changed since."""

    method: Literal["source"] = "source"
    otherwise: Grid | None = Field(
        None,
        description="Grid for layers that the source holds in a form that cannot be carried over (GGUF's k-quants), "
        "rounded to nearest; the report says what that cost. null: such a source is refused. Floats stay floats.",
    )
    ignore: tuple[str, ...] = Field(
        (), description="Layers to leave float32: names with wildcards, such as model.layers.0.* or *.down_proj."
    )

    @model_validator(mode="after")
    def _tables_can_have_the_other_grid(self) -> "FromSource":
        if self.otherwise and self.otherwise.zero_point == "real":
            raise ValueError(f"{REAL_TABLE}: the `zero_point` of `otherwise` must be integer.")
        if self.otherwise and self.otherwise.format == "float8_e4m3":
            raise ValueError("embeddings are integers or float32: `otherwise` must be of integers; drop its `format`.")
        return self

    def quantize(self, weight: "Tensor", grid: Grid, layer: str) -> "QuantizedWeight":
        """`weight` [out, in] float32, which cannot be carried over, on `grid`; `layer` names it in errors."""
        return round_to_nearest(weight, grid, layer)
