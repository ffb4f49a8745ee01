"""What an engine's options are called: short where it names things, whole where people read it."""

from typing import Literal, get_args, get_origin

from pydantic import BaseModel

TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT", "pytorch": "PyTorch"}


def label(engine: BaseModel) -> str:
    """A name for the engine's options among others: "openvino", "openvino-bfloat16".

    The engine's own name, then every choice that is not the first of its alternatives.
    """
    chosen = [str(value) for _, value, first in _choices(engine) if value != first]
    return "-".join([str(getattr(engine, "engine")), *chosen])  # noqa: B009


def describe(engine: BaseModel) -> str:
    """The engine with all its choices: "openvino float32, activations int8, kv cache uint8"."""
    chosen = [f"{name.replace('_', ' ')} {value}" for name, value, _ in _choices(engine)]
    return f"{getattr(engine, 'engine')} {', '.join(chosen).removeprefix('precision ')}"  # noqa: B009


def title(engine: BaseModel) -> str:
    """The engine as a table names it: "ONNX Runtime float32", then every choice that is not the first."""
    chosen = [
        f"{name.replace('_', ' ')} {value}"
        for name, value, first in _choices(engine)
        if value != first and name != "precision"
    ]
    name, precision = str(getattr(engine, "engine")), str(getattr(engine, "precision"))  # noqa: B009
    return ", ".join([f"{TITLES.get(name, name)} {precision}", *chosen])


def alternatives(engine: BaseModel, option: str) -> tuple[str, ...]:
    """The words that an option of the engine may be, in their order."""
    return get_args(type(engine).model_fields[option].annotation)


def _choices(engine: BaseModel) -> list[tuple[str, object, object]]:
    """(option, chosen value, first alternative) of every option that is a choice between words."""
    return [
        (name, getattr(engine, name), alternatives(engine, name)[0])
        for name, field in type(engine).model_fields.items()
        if name != "engine" and get_origin(field.annotation) is Literal
    ]
