"""Encoders and encoder-decoders compiled for ONNX Runtime and OpenVINO: from a checkpoint to graphs, and to a session.

`compile_exported` writes the engine's graphs and exported.json, which says what they are; `load_exported` reads them
without PyTorch. See docs/decisions/0008-exported-graphs.md.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, ValidationError

from tasks.engines.encoder import EncoderSession
from tasks.engines.encoder_decoder import EncoderDecoderSession, Greedy, read_greedy
from tasks.engines.export import save_graph
from tasks.engines.exported_graph import (
    ExportedGraph,
    Pooling,
    decoder_heads,
    export_encoder,
    export_encoder_decoder,
    missing,
    read_pooling,
)
from tasks.engines.exported_weights import Inputs, with_integers
from tasks.engines.graph_runner import GraphRunner, OnnxRuntimeRunner, OpenVinoRunner
from tasks.engines.openvino_graph import name_by_place
from tasks.quantization.exported_checkpoint import ExportedCheckpoint, read_checkpoint, read_config

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["ExportedModel", "compile_exported", "load_exported", "read_exported"]

EngineName = Literal["onnxruntime", "openvino"]
Activations = Literal["int8", "float32"]
DESCRIPTION = "exported.json"


class ExportedModel(BaseModel, frozen=True, extra="forbid"):
    """What the graphs of a bundle are; exported.json."""

    format: Literal[1] = 1
    engine: EngineName
    family: str
    architecture: str
    answers: tuple[str, ...] = Field(description="What an encoder gives; of an encoder-decoder, nothing but tokens.")
    vocab_size: int
    num_token_types: int
    max_length: int | None = Field(description="Longest sequence; None: positions are relative.")
    activations: Activations = Field(description="What quantized weights are multiplied with.")
    greedy: Greedy | None = Field(description="How an encoder-decoder writes.")
    cache_shape: tuple[int, int] | None = Field(description="Heads of an encoder-decoder's cache, features of each.")


def compile_exported(
    checkpoint: Path, engine_name: EngineName, out: Path, *, activations: Activations = "int8"
) -> ExportedModel:
    """Writes the graphs of a checkpoint, float or quantized, with its own integers, into the directory `out`.

    Args:
        activations: what quantized weights are multiplied with; float weights are not affected. int8: integers made of
            the inputs as they come. float32: the inputs as they are.

    Raises:
        ValueError: a library is missing; the family, the class or the way of quantization is unknown.
    """
    if problem := missing():
        raise ValueError(problem)
    source = read_checkpoint(checkpoint)
    greedy = None if source.is_encoder else read_greedy(checkpoint, read_config(checkpoint))
    graphs = export_graphs(source, read_pooling(checkpoint))
    return write_graphs(graphs, source, engine_name, out, activations=activations, greedy=greedy)


def export_graphs(source: ExportedCheckpoint, pooling: Pooling | None = None) -> dict[str, ExportedGraph]:
    """The float graphs of a checkpoint: `encoder`, and `decoder` where it has one; the slow part of compiling."""
    if source.is_encoder:
        return {"encoder": export_encoder(source, pooling)}
    encoder, decoder = export_encoder_decoder(source)
    return {"encoder": encoder, "decoder": decoder}


def write_graphs(
    graphs: dict[str, ExportedGraph],
    source: ExportedCheckpoint,
    engine_name: EngineName,
    out: Path,
    *,
    activations: Activations = "int8",
    greedy: Greedy | None = None,
) -> ExportedModel:
    """Writes an engine's files of exported graphs, with the integers of `source`; see `compile_exported`.

    Args:
        greedy: how an encoder-decoder writes; None for an encoder.
    """
    assert source.is_encoder == (greedy is None), source.model.config.model_type
    inputs: Inputs = "float32"
    if engine_name == "onnxruntime" and activations == "int8":
        inputs = "int8" if source.is_encoder else "int16"  # a token that is off changes all that follow
    for name, graph in graphs.items():
        _write(with_integers(graph, source.quantized, inputs), engine_name, out / _file_name(name, engine_name))
    config = source.model.config
    described = ExportedModel(
        engine=engine_name,
        family=config.model_type,
        architecture=type(source.model).__name__,
        answers=graphs["encoder"].answers if source.is_encoder else (),
        vocab_size=config.vocab_size,
        num_token_types=getattr(config, "type_vocab_size", 1),
        max_length=source.max_length,
        activations=activations,
        greedy=greedy,
        cache_shape=None if source.is_encoder else decoder_heads(source.model),
    )
    (out / DESCRIPTION).write_text(described.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return described


def read_exported(bundle: Path) -> ExportedModel:
    """What a bundle that `compile_exported` wrote holds.

    Raises:
        ValueError: it did not write it.
    """
    file = bundle / DESCRIPTION
    try:
        return ExportedModel.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{bundle} holds no {DESCRIPTION}; compile the checkpoint into it first.") from None
    except ValidationError as error:
        raise ValueError(f"{file} is not what compiling wrote: {error}. Compile the checkpoint again.") from None


def load_exported(
    bundle: Path, engine_name: EngineName, threads: int, *, precision: Literal["float32", "bfloat16"] = "float32"
) -> EncoderSession | EncoderDecoderSession:
    """A session of the graphs in a directory.

    Args:
        precision: of all that is not a quantized weight's product; ONNX Runtime has float32 only.

    Raises:
        ValueError: the directory holds no graphs of this engine, or the engine cannot compute so.
    """
    described = read_exported(bundle)
    if described.engine != engine_name:
        raise ValueError(
            f"{bundle} was compiled for {described.engine}; got {engine_name}. Compile it for that engine."
        )
    if engine_name == "onnxruntime" and precision != "float32":
        raise ValueError(f"ONNX Runtime's CPU provider computes these graphs in float32; got {precision}.")

    def runner(name: str) -> GraphRunner:
        file = bundle / _file_name(name, engine_name)
        if engine_name == "onnxruntime":
            return OnnxRuntimeRunner(file, threads=threads, activations=described.activations)
        return OpenVinoRunner(file, threads=threads, precision=precision, activations=described.activations)

    if described.greedy is None:
        return EncoderSession(
            runner("encoder"),
            described.answers,
            described.vocab_size,
            described.num_token_types,
            described.max_length,
        )
    assert described.cache_shape is not None
    return EncoderDecoderSession(
        runner("encoder"),
        runner("decoder"),
        described.greedy,
        described.vocab_size,
        described.max_length,
        described.cache_shape,
    )


def _file_name(graph: str, engine_name: EngineName) -> str:
    return f"{graph}.onnx" if engine_name == "onnxruntime" else f"openvino_{graph}_model.xml"


def _write(model: "ModelProto", engine_name: EngineName, file: Path) -> None:
    if engine_name == "onnxruntime":
        save_graph(model, file)
        return
    import openvino

    with TemporaryDirectory(dir=file.parent) as scratch:
        portable = Path(scratch) / "graph.onnx"
        save_graph(model, portable)
        read = openvino.Core().read_model(portable)
        name_by_place(read)
        openvino.save_model(read, file, compress_to_fp16=False)
