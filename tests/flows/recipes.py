"""What recipes of the tests share: data that comes with Python, few short stages, and how forms must be."""

from pathlib import Path
from typing import Any

STDLIB = {"corpus": "stdlib", "content": "documentation"}
ONNXRUNTIME = {"engine": "onnxruntime", "precision": "float32"}
RTN_8 = {"method": "rtn", "weights": {"bits": 8}}


def data(*, training_tokens: int = 0, calibration: int = 4, windows: int = 8) -> dict[str, Any]:
    """The standard library's text, in windows of 64 tokens."""
    return {
        **dict.fromkeys(("training", "calibration", "evaluation"), STDLIB),
        "sequence_length": 64,
        "evaluation_window": 64,
        "num_training_tokens": training_tokens,
        "num_calibration_sequences": calibration,
        "num_evaluation_windows": windows,
    }


def short(name: str, source: Path, **changes: Any) -> dict[str, Any]:
    """Eight short stages and a registration: one candidate in ONNX Runtime, which anything accepts."""
    return {
        "name": name,
        "source": str(source),
        "data": data(),
        "candidates": {"int8": {"quantization": RTN_8}},
        "engines": [ONNXRUNTIME],
        "validation": {
            "quality": {"num_greedy_prompts": 2, "greedy_tokens": 4},
            "speed": None,
            "limits": {"perplexity": {"max_degradation_percent": 1000}},
            "if_inconclusive": {"max_rounds": 0},
        },
        "register_as": name,
        **changes,
    }


def assert_flat(form: dict[str, Any]) -> None:
    """Every field of a flow's form is a plain value with its default and a description."""
    for name, field in form["properties"].items():
        assert not {"anyOf", "allOf", "$ref"} & field.keys(), name
        assert "default" in field, name
        assert field.get("description"), name
