"""A bundle's model card: README.md, as the Hugging Face hub shows it, with what is known when it is compiled.

What is measured later, and the verdict, are not in it: the bundle's files are hashed by its manifest and never changed.
They stand in the card that tasks/validation/card.py writes beside it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from tasks.engines.naming import TITLES, describe, title

if TYPE_CHECKING:
    from tasks.engines import Engine

CARD = "README.md"
NOT_HERE = (
    "`manifest.json` names the SHA-256 of every file and of the checkpoint it was made from. What was measured of it, "
    "against which original, and the verdict, are recorded where it was validated, not here: these files never change."
)
LIBRARY_TAGS = {"onnxruntime": "onnx", "openvino": "openvino", "tensorrt": "tensorrt"}


def write_card(
    bundle: Path, engine: "Engine", *, parity: BaseModel | None, versions: Mapping[str, str], why_not_run: str | None
) -> None:
    """Writes README.md into a bundle that holds config.json.

    Args:
        parity: how far its answers are from PyTorch's; None: not run here.
        versions: of the engine's libraries.
        why_not_run: where parity is None.
    """
    from huggingface_hub import ModelCardData

    config = json.loads((bundle / "config.json").read_text())
    tag, stored = weights_words(config)
    writes = _writes(config)
    about = ModelCardData(
        library_name="slimline",
        pipeline_tag="text-generation" if writes else "feature-extraction",
        tags=sorted(filter(None, (LIBRARY_TAGS[engine.engine], tag))),
    )
    said = f"Not run where it was compiled: {why_not_run}"
    if parity:
        figures = {name: value for name, value in parity.model_dump().items() if isinstance(value, float)}
        words = ", ".join(f"{name.replace('_', ' ')} {value:.2g}" for name, value in figures.items())
        said = f"Compared with PyTorch on the same checkpoint when it was compiled: {words}."
    lines = [
        f"# {config.get('model_type', 'model')} for {TITLES[engine.engine]}",
        "",
        f"An engine bundle of [Slimline](https://pypi.org/project/slimline): {title(engine)}.",
        "",
        f"* weights: {stored}",
        f"* engine: {describe(engine)}; {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"* {said}",
        "",
        NOT_HERE,
        "",
        "```",
        *(['slimline generate DIRECTORY "The capital of France is"'] if writes else []),
        "slimline validate DIRECTORY --against ORIGINAL",
        "```",
        "",
    ]
    (bundle / CARD).write_text(f"---\n{about.to_yaml()}\n---\n\n" + "\n".join(lines), encoding="utf-8")


def weights_words(config: Mapping[str, Any]) -> tuple[str, str]:
    """How a checkpoint stores its weights: a tag ("" for floats), and words."""
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    targets: dict[str, list[str]] = {}
    fewest_bits: int | None = None
    for group in groups.values():
        weights = group.get("weights") or {}
        bits, kind, size = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
        if bits is None:
            continue
        fewest_bits = min(bits, fewest_bits or bits)
        where = f"groups of {size}" if size and size > 0 else "per channel"
        words = f"{bits} bits{' float' if kind == 'float' else ''}, {where}"
        targets.setdefault(words, []).extend(group.get("targets") or ())
    if fewest_bits is None:
        return "", "float"
    return f"{fewest_bits}-bit", "; ".join(f"{words}{_num_layers(names)}" for words, names in targets.items())


def _num_layers(targets: Sequence[str]) -> str:
    """How many layers, in words; nothing where a target is a pattern or a class, which other producers write."""
    if any(target.startswith("re:") or target in ("Linear", "Embedding") for target in targets):
        return ""
    return f" ({len(targets)} layers)"


def _writes(config: Mapping[str, Any]) -> bool:
    return any("Causal" in name or "Conditional" in name for name in config.get("architectures") or ["Causal"])
