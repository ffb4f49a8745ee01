"""What makes a bundle a model directory of its engine's own generation library, beside the graph and the tokenizer.

ONNX Runtime GenAI reads genai_config.json, OpenVINO GenAI the tokenizer as a pair of graphs; and the latter config.json
and generation_config.json, which every bundle holds.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.engines.decoder import Decoder

GENAI_CONFIG = "genai_config.json"
OPENVINO_TOKENIZER = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")


def write_genai_config(checkpoint: Path, decoder: "Decoder", out: Path, *, graph: str, max_length: int) -> None:
    """Writes genai_config.json for a graph with the names of `onnxruntime_graph.build_graph`.

    The library takes a trailing padding token for padding, also in a prompt of its own. Many models pad with the token
    that ends a text, which a prompt may hold; these pad with the last token of the vocabulary here.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    eos_ids = end_tokens(checkpoint) or [0]  # the library must be told one
    pad = config.get("pad_token_id")
    beginning = config.get("bos_token_id")
    names = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    model = {
        "type": "decoder",  # whatever the family: all that is particular to it is in the graph
        "bos_token_id": eos_ids[0] if beginning is None else beginning,
        "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0],
        "pad_token_id": decoder.vocab_size - 1 if pad is None or pad in eos_ids else pad,
        "vocab_size": decoder.vocab_size,
        "context_length": max_length,
        "decoder": {
            "filename": graph,
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "head_size": decoder.head_dim,
            "hidden_size": decoder.hidden_size,
            "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_kv_heads,
            "num_hidden_layers": len(decoder.layers),
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": names["key"],
                "past_value_names": names["value"],
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": names["key"].replace("past_key_values", "present"),
                "present_value_names": names["value"].replace("past_key_values", "present"),
            },
        },
    }
    search = {"max_length": max_length, "past_present_share_buffer": True, "do_sample": False, "num_beams": 1}
    (out / GENAI_CONFIG).write_text(json.dumps({"model": model, "search": search}, indent=1) + "\n")


def end_tokens(checkpoint: Path) -> list[int]:
    """The tokens that end a text, of a checkpoint's or a bundle's generation_config.json, else of its config.json."""
    for name in ("generation_config.json", "config.json"):
        if (checkpoint / name).exists():
            found = json.loads((checkpoint / name).read_text()).get("eos_token_id")
            if found is not None:
                return [int(each) for each in found] if isinstance(found, list) else [int(found)]
    return []


def write_openvino_tokenizer(checkpoint: Path, out: Path) -> str | None:
    """Writes the tokenizer as OpenVINO graphs.

    Returns:
        Why that cannot be done (the library is missing, or does not know this kind of tokenizer), and nothing is
        written then; None if it was.
    """
    try:
        import openvino
        from openvino_tokenizers import convert_tokenizer
    except ImportError as error:
        return f"no tokenizer for OpenVINO GenAI: {error}. Install it: pip install 'slimline[openvino]'"
    from tasks.calibration.checkpoints import load_tokenizer
    from tasks.engines.openvino_graph import name_by_place

    try:
        tokenizer = load_tokenizer(checkpoint)
        tokenizer.padding_side = "left"  # what the library expects of prompts of different length
        converted: tuple[Any, Any] = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # noqa: BLE001 - of many kinds: of what the library does not know
        return f"no tokenizer for OpenVINO GenAI: {type(error).__name__}: {error}"
    for model, name in zip(converted, OPENVINO_TOKENIZER, strict=True):
        name_by_place(model)
        _name_tensors(model)
        openvino.save_model(model, out / name)
    return None


def _name_tensors(model: Any) -> None:
    """Names inputs by place and drops the converter's own names of outputs, which count all that a process made."""
    for index, parameter in enumerate(model.inputs):
        parameter.set_names({f"input.{index}"})
    for output in model.outputs:
        output.set_names({name for name in output.get_names() if not name.startswith("Result_")})
