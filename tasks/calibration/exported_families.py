"""Families that no row of `architectures.py` describes: encoders (BERT's) and encoder-decoders (T5, BART, Marian).

They are quantized as a whole and compiled through an exporter's graph. Encoders are asked for vectors, encoder-decoders
for texts; no perplexity is measured of either.
"""

import json
from pathlib import Path
from typing import Any, Literal

Kind = Literal["decoder", "encoder", "encoder-decoder"]

ENCODERS = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
"""`model_type` of config.json, and how the classes of the family begin."""

ENCODER_HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

ENCODER_DECODERS = {
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "marian": "MarianMTModel",
}
"""`model_type` of config.json, and the class that generates text."""


def kind_of(model_type: str) -> Kind:
    """What models of a family do: those that are not known here write on from a prompt."""
    if model_type in ENCODERS:
        return "encoder"
    return "encoder-decoder" if model_type in ENCODER_DECODERS else "decoder"


def kind_at(directory: Path) -> Kind:
    """What the model of a checkpoint, or of an engine bundle, does; of one without config.json, as a decoder."""
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return kind_of(str(config.get("model_type")))


def a_kind(kind: Kind) -> str:
    """The kind with its article."""
    return f"{'a' if kind == 'decoder' else 'an'} {kind}"


def is_exported(model_type: str) -> bool:
    """Whether a family is compiled through an exporter's graph, by `tasks/engines/exported.py`."""
    return kind_of(model_type) != "decoder"


def architecture_name(config: dict[str, Any]) -> str:
    """The class of transformers that a configuration names; the plain encoder where an encoder's names none.

    Args:
        config: contents of config.json, of a family that `is_exported`.

    Raises:
        ValueError: it is none that can be exported.
    """
    family = config["model_type"]
    if family in ENCODERS:
        allowed = [ENCODERS[family] + head for head in ENCODER_HEADS]
    else:
        allowed = [ENCODER_DECODERS[family]]
    name = str((config.get("architectures") or allowed)[0])
    if name not in allowed:
        raise ValueError(
            f"A {family} model must be one of {', '.join(allowed)}; `architectures` of config.json says {name}. "
            "Save the model with one of these classes."
        )
    return name
