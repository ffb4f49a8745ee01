"""What every quantization method can be told: which layers, on which grids, and how their inputs are rounded."""

from pydantic import BaseModel, Field, model_validator

from tasks.quantization.activations import Activations, Format
from tasks.quantization.mixed import Mixed
from tasks.quantization.ranges import Grid


class Targets(BaseModel, frozen=True, extra="forbid"):
    """What every quantization method can be told about the layers beside those of the blocks."""

    embeddings: Grid | None = Field(
        Grid(),
        description="Grid of the embedding and the LM head; tied ones share their integers. An LM head is quantized by "
        "`method`, a table that is only looked up is rounded to nearest. null: float32.",
    )
    ignore: tuple[str, ...] = Field(
        (), description="Layers to leave alone: names with wildcards, such as model.layers.0.* or *.down_proj."
    )
    weights: Grid | Mixed
    activations: Activations | None = Field(None, description="Round the inputs of linear layers too; null: float.")
    kv_cache: Format | None = Field(
        None, description="Keys and values of attention, with a calibrated scale per layer; null: the engine decides."
    )

    @model_validator(mode="after")
    def _tables_have_integer_zero_points(self) -> "Targets":
        if self.embeddings and self.embeddings.zero_point == "real":
            raise ValueError("embeddings are looked up by integer kernels: their `zero_point` must be integer.")
        if self.embeddings and self.embeddings.format == "float8_e4m3":
            raise ValueError("embeddings are integers or float32: drop their `format`, or set `embeddings: null`.")
        return self

    @model_validator(mode="after")
    def _tables_have_one_choice(self) -> "Targets":
        if isinstance(self.weights, Mixed) and self.weights.embedding_choices and self.embeddings != Grid():
            raise ValueError("`embedding_choices` choose the grid of the embeddings; drop them, or `embeddings`.")
        return self

    @model_validator(mode="after")
    def _activations_suit_the_weights(self) -> "Targets":
        if not self.activations:
            return self
        weights = self.weights
        if isinstance(weights, Mixed):
            raise ValueError("mixed precision is of weights alone; drop `activations`, or give `weights` one grid.")
        if (weights.format == "float8_e4m3") != (self.activations.format == "float8_e4m3"):
            raise ValueError(
                "weights and activations must both be integers or both FP8; set `format: float8_e4m3` in both or in "
                "neither."
            )
        if (weights.bits, weights.group_size, weights.symmetric) != (8, None, True):
            raise ValueError(
                "integer products with rounded inputs need weights of 8 bits, symmetric, with one scale per row; got "
                f"{weights.bits} bits, group_size {weights.group_size}, symmetric {weights.symmetric}. "
                "Set `weights: {bits: 8}`, or drop `activations`."
            )
        return self
