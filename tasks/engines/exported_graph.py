"""Float ONNX graphs of transformers' encoders and encoder-decoders, by torch's exporter (docs/decisions/0008).

Linear layers are exported as products with a weight that is [in, out] already and keeps its name, so that
`exported_weights.py` can put the checkpoint's integers in its place without searching for patterns of operators.

An encoder is one graph, `encoder`:

    input_ids, attention_mask   [batch, length] int64; attention_mask is 1 where there is a token
    token_type_ids              [batch, length] int64, where the model has more than one type
    its answers                 see `Pooling` and `ANSWERS`

An encoder-decoder is two. `encoder` ends in what its decoder attends to, and `decoder` reads one token more:

    input_ids, attention_mask                 [batch, source] int64
    cross_key.i, cross_value.i                [batch, num_heads, source, head_dim], i a block of the decoder

    input_ids                                 [batch, 1] int64
    encoder_attention_mask                    [batch, source] int64
    cross_key.i, cross_value.i                as above
    past_key.i, past_value.i                  [batch, num_heads, past, head_dim]; past may be 0
    logits                                    [batch, vocab_size]
    present_key.i, present_value.i            [batch, num_heads, past + 1, head_dim]
"""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.quantization.exported_checkpoint import ExportedCheckpoint

if TYPE_CHECKING:
    import torch
    from onnx import ModelProto

OPSET = 21  # the first with 4-bit integers and blocked DequantizeLinear
PREFIX = "model."  # of weights' names: the attribute of `_export`'s wrapper

ANSWERS = {
    "Model": ("last_hidden_state",),
    "ForMaskedLM": ("logits",),
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
}
"""What an encoder gives, by how its class's name ends: plain ones also `pooler_output` and `sentence_embedding`."""


@dataclass(frozen=True)
class Pooling:
    """How a sentence-transformers model makes one vector of a sequence."""

    mode: str  # mean or cls
    normalize: bool  # to length 1


@dataclass(frozen=True)
class ExportedGraph:
    """A float graph, and what is known of its weights."""

    model: "ModelProto"
    weights: dict[str, str]  # module -> initializer: [in, out] of linear layers, [rows, features] of embeddings
    linears: tuple[str, ...]  # those of these modules that are linear layers
    tied: dict[str, str]  # linear module -> embedding module that holds its weight, [out, in]
    answers: tuple[str, ...]


def missing() -> str | None:
    """Why graphs cannot be exported here, and what to do; None if they can."""
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"Exporting this model needs {' and '.join(absent)}. Install: pip install 'slimline[export]'"


def read_pooling(checkpoint: Path) -> Pooling | None:
    """How a checkpoint of sentence-transformers pools; None where it is none.

    Raises:
        ValueError: in another way than by the mean or the first token.
    """
    modules = checkpoint / "modules.json"
    if not modules.exists():
        return None
    listed = json.loads(modules.read_text(encoding="utf-8"))
    kinds = [module["type"].rpartition(".")[2] for module in listed]
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(
            f"Sentence embeddings are pooled and normalized only; {modules} has {', '.join(sorted(unknown))} too. "
            "Delete the file to get the hidden states."
        )
    if "Pooling" not in kinds:
        return None
    path = checkpoint / listed[kinds.index("Pooling")]["path"] / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    modes = [key for key, chosen in settings.items() if key.startswith("pooling_mode_") and chosen is True]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise ValueError(
            f"Sentence embeddings must be pooled by the mean or the first token; {path} says {', '.join(modes)}. "
            f"Delete {modules} to get the hidden states."
        )
    return Pooling(names[modes[0]], "Normalize" in kinds)


def encoder_answers(model: Any, pooling: Pooling | None) -> tuple[str, ...]:
    """What an encoder gives, in order; the last says most about a sequence as a whole."""
    head = next(head for head in ANSWERS if type(model).__name__.endswith(head))
    if head != "Model":
        return ANSWERS[head]
    pooler = ("pooler_output",) if getattr(model, "pooler", None) is not None else ()
    return ANSWERS[head] + pooler + (("sentence_embedding",) if pooling else ())


def encoder_inputs(model: Any) -> list[str]:
    """What an encoder's graph takes."""
    types = ["token_type_ids"] if getattr(model.config, "type_vocab_size", 1) > 1 else []
    return ["input_ids", "attention_mask", *types]


def encoder_function(model: Any, pooling: Pooling | None) -> "Callable[..., tuple[torch.Tensor, ...]]":
    """What an encoder's graph computes: a function of `encoder_inputs` that gives `encoder_answers`."""
    inputs, answers = encoder_inputs(model), encoder_answers(model, pooling)

    def answer(*values: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        output = dict(model(**dict(zip(inputs, values, strict=True))))
        if pooling:
            output["sentence_embedding"] = _pool(output["last_hidden_state"], values[1], pooling)
        return tuple(output[name] for name in answers)

    return answer


def export_encoder(checkpoint: ExportedCheckpoint, pooling: Pooling | None) -> ExportedGraph:
    """The graph of an encoder with its head."""
    import torch

    model: Any = checkpoint.model
    names, ids = encoder_inputs(model), _sample_ids(2, 7)
    values = dict(zip(names, (ids, torch.ones_like(ids), torch.zeros_like(ids)), strict=False))
    shapes = [{0: "batch", 1: "length"}] * len(names)
    return _export(model, encoder_function(model, pooling), values, encoder_answers(model, pooling), shapes)


def _pool(hidden: "torch.Tensor", attention_mask: "torch.Tensor", pooling: Pooling) -> "torch.Tensor":
    """[batch, features] of [batch, length, features]."""
    import torch

    pooled = hidden[:, 0]
    if pooling.mode == "mean":
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, dim=1) if pooling.normalize else pooled


def export_encoder_decoder(checkpoint: ExportedCheckpoint) -> tuple[ExportedGraph, ExportedGraph]:
    """The graphs of the encoder, and of one step of the decoder."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    model: Any = checkpoint.model
    num_layers, num_heads, head_dim = len(_cross_projections(model)), *decoder_heads(model)
    of_source = [f"cross_{kind}.{index}" for index in range(num_layers) for kind in ("key", "value")]
    of_past = [f"past_{kind}.{index}" for index in range(num_layers) for kind in ("key", "value")]

    def encode(input_ids: "torch.Tensor", attention_mask: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        hidden = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        shape = (hidden.shape[0], hidden.shape[1], num_heads, head_dim)
        both = [projection for pair in _cross_projections(model) for projection in pair]
        return tuple(projection(hidden).view(shape).transpose(1, 2) for projection in both)

    def decode(
        input_ids: "torch.Tensor", encoder_attention_mask: "torch.Tensor", *caches: "torch.Tensor"
    ) -> "tuple[torch.Tensor, ...]":
        cache = EncoderDecoderCache(DynamicCache(_pairs(caches[2 * num_layers :])), DynamicCache())
        for index, (key, value) in enumerate(_pairs(caches[: 2 * num_layers])):
            cache.cross_attention_cache.update(key, value, index)
            cache.is_updated[index] = True
        output = model(
            # Only its shape is read, since the keys and values that are made of it are in the cache.
            encoder_outputs=(caches[0][:, 0, :, :1],),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            # One token sees all before it; where no mask says so, the graph would compute one. It has a number for each
            # position, because OpenVINO 2026.4 reads one that is broadcast wrongly from 16 positions on.
            decoder_attention_mask=torch.zeros(1, 1, 1, caches[-1].shape[2] + 1),
            past_key_values=cache,
            use_cache=True,
        )
        layers = output.past_key_values.self_attention_cache.layers
        return (output.logits[:, -1], *(values for layer in layers for values in (layer.keys, layer.values)))

    ids = _sample_ids(2, 7)
    source = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    encoder = _export(model, encode, source, of_source, [{0: "batch", 1: "source"}] * 2)
    step = {"input_ids": ids[:, :1], "encoder_attention_mask": torch.ones_like(ids)}
    step |= {name: torch.rand(2, num_heads, 7, head_dim) for name in of_source}
    step |= {name: torch.rand(2, num_heads, 3, head_dim) for name in of_past}
    shapes = [{0: "batch"}, {0: "batch", 1: "source"}]
    shapes += [{0: "batch", 2: "source"}] * len(of_source) + [{0: "batch", 2: "past"}] * len(of_past)
    answers = ["logits", *(name.replace("past", "present") for name in of_past)]
    return encoder, _export(model, decode, step, answers, shapes)


def _pairs(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(values[0::2], values[1::2], strict=True))


def _cross_projections(model: Any) -> list[tuple[Any, Any]]:
    """Of every block of the decoder, the layers that make keys and values of the encoder's output."""
    if model.config.model_type == "t5":
        attentions = [block.layer[1].EncDecAttention for block in model.decoder.block]
        return [(attention.k, attention.v) for attention in attentions]
    attentions = [layer.encoder_attn for layer in model.get_decoder().layers]
    return [(attention.k_proj, attention.v_proj) for attention in attentions]


def decoder_heads(model: Any) -> tuple[int, int]:
    """Number of attention heads in the decoder, and the features of each."""
    config = model.config
    if config.model_type == "t5":
        return int(config.num_heads), int(config.d_kv)
    return int(config.decoder_attention_heads), int(config.d_model) // int(config.decoder_attention_heads)


def _sample_ids(batch_size: int, length: int) -> "torch.Tensor":
    """Ids to trace with: no size is 0 or 1, which the exporter would take for a constant."""
    import torch

    return torch.arange(3, 3 + batch_size * length).reshape(batch_size, length)


def _export(
    model: Any,
    compute: "Callable[..., tuple[torch.Tensor, ...]]",
    inputs: "dict[str, torch.Tensor]",
    answers: Sequence[str],
    shapes: list[dict[int, str]],
) -> ExportedGraph:
    """The graph of `compute`, a function of `inputs` and of the weights of `model`.

    Args:
        shapes: of each input, which sizes may be any, by what they are called.

    Raises:
        ValueError: the model has an operator that cannot be exported.
    """
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
            return compute(*values)

    sizes = {name: torch.export.Dim(name) for shape in shapes for name in shape.values()}
    dynamic = tuple({axis: sizes[name] for axis, name in shape.items()} for shape in shapes)
    with _products_(model) as (linears, tied), _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                Wrapper().eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(answers),
                dynamic_shapes=(dynamic,),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(
                f"torch's exporter must know every operator of a model; of this {type(model).__name__} it says: "
                f"{_cause(error)} Use the model in PyTorch."
            ) from error
        names = _initializer_names(model, linears)
    assert program is not None
    proto = program.model_proto
    present = {initializer.name for initializer in proto.graph.initializer}
    weights = {module: next((name for name in found if name in present), None) for module, found in names.items()}
    held = {module: name for module, name in weights.items() if name}
    return ExportedGraph(proto, held, tuple(name for name in linears if name in held), tied, tuple(answers))


def _cause(error: BaseException) -> str:
    """The first line of what an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0].split(" Failure message")[0].rstrip(".") + "."


def _initializer_names(model: Any, linears: Sequence[str]) -> dict[str, list[str]]:
    """What the weight of each linear layer and embedding may be called: tied ones have the name of one of them."""
    import torch

    tables = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    found = {}
    for module in [*linears, *tables]:
        weight = model.get_submodule(module).weight
        same = [name for name, other in model.named_parameters(remove_duplicate=False) if other is weight]
        found[module] = [f"{PREFIX}{name}" for name in same]
    return found


@contextlib.contextmanager
def _products_(model: Any) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Within, linear layers are products with a weight [in, out] of their own, also where it is tied to an embedding.

    Gives the names of the linear layers, and the embedding of each that is tied.
    """
    import torch

    class Product(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
            self.bias = linear.bias

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            product = hidden @ self.weight
            return product if self.bias is None else product + self.bias

    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if type(module) is torch.nn.Linear}
    tables = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Embedding)}
    tied = {
        name: next(table for table, other in tables.items() if other.weight is module.weight)
        for name, module in linears.items()
        if any(other.weight is module.weight for other in tables.values())
    }
    for name, module in linears.items():
        model.set_submodule(name, Product(module))
    try:
        yield list(linears), tied
    finally:
        for name, module in linears.items():
            model.set_submodule(name, module)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, the exporter does not write about what is none of the user's business (torchvision, tree specs)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
