"""What exported graphs take and give, and what is left in them of the machine that exported them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.engines import exported_graph
from tasks.engines.exported_graph import Pooling, export_encoder, missing, read_pooling
from tasks.engines.exported_weights import with_integers
from tasks.quantization.exported_checkpoint import read_checkpoint


def shapes(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in values
    }


def test_encoder_takes_any_batch_and_length(exported: Callable[..., Any]) -> None:
    graph = exported("BertForMaskedLM").graphs["encoder"].model.graph
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    assert shapes(graph.input) == {name: ["batch", "length"] for name in inputs}
    assert shapes(graph.output) == {"logits": ["batch", "length", 96]}


def test_decoder_takes_any_batch_source_and_past(exported: Callable[..., Any]) -> None:
    encoder, decoder = (graph.model.graph for graph in exported("MarianMTModel").graphs.values())
    cross = {f"cross_{kind}.{index}": ["batch", 2, "source", 16] for index in (0, 1) for kind in ("key", "value")}
    past = {f"past_{kind}.{index}": ["batch", 2, "past", 16] for index in (0, 1) for kind in ("key", "value")}
    assert shapes(encoder.output) == cross
    mask = {"encoder_attention_mask": ["batch", "source"]}
    assert shapes(decoder.input) == {"input_ids": ["batch", 1]} | mask | cross | past
    present = {name.replace("past", "present"): ["batch", 2, "past + 1", 16] for name in past}
    assert shapes(decoder.output) == {"logits": ["batch", 96]} | present


@pytest.mark.parametrize("model", ["BertForMaskedLM", "T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_every_linear_layer_has_its_weight_by_name(model: str, exported: Callable[..., Any]) -> None:
    found = exported(model)
    linears = {name for name, module in found.source.model.named_modules() if type(module) is torch.nn.Linear}
    assert {name for graph in found.graphs.values() for name in graph.linears} == linears
    names = {tensor.name for graph in found.graphs.values() for tensor in graph.model.graph.initializer}
    assert {f"model.{name}.weight" for name in linears} <= names


def test_exporting_leaves_the_model_as_it_was(exported: Callable[..., Any]) -> None:
    model = exported("MarianMTModel").source.model
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_graph_tells_nothing_of_the_machine(exported: Callable[..., Any]) -> None:
    text = with_integers(exported("BertForMaskedLM").graphs["encoder"], {}, "float32").SerializeToString()
    assert b"site-packages" not in text
    assert b"forward(" not in text
    assert str(Path(__file__).parents[3]).encode() not in text


def pooling_files(checkpoint: Path, kinds: list[str], **settings: bool) -> None:
    modules = [{"path": f"{at}_{kind}" if at else "", "type": f"sentence_transformers.models.{kind}"}
               for at, kind in enumerate(kinds)]  # fmt: skip
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    (checkpoint / "1_Pooling").mkdir(exist_ok=True)
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | settings))


def test_pooling_of_sentence_transformers_is_read(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    pooling_files(tmp_path, ["Transformer"])
    assert read_pooling(tmp_path) is None
    mean = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    pooling_files(tmp_path, ["Transformer", "Pooling", "Normalize"], **mean)
    assert read_pooling(tmp_path) == Pooling("mean", normalize=True)
    pooling_files(tmp_path, ["Transformer", "Pooling"], pooling_mode_cls_token=True)
    assert read_pooling(tmp_path) == Pooling("cls", normalize=False)


def test_other_pooling_is_refused(tmp_path: Path) -> None:
    pooling_files(tmp_path, ["Transformer", "Pooling"], pooling_mode_max_tokens=True)
    with pytest.raises(ValueError, match=r"by the mean or the first token; .* says pooling_mode_max_tokens"):
        read_pooling(tmp_path)
    pooling_files(tmp_path, ["Transformer", "Pooling", "Dense"], pooling_mode_mean_tokens=True)
    with pytest.raises(ValueError, match="has Dense too"):
        read_pooling(tmp_path)


def test_missing_exporter_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported_graph.importlib.util, "find_spec", lambda _: None)
    assert missing() == "Exporting this model needs onnx and onnxscript. Install: pip install 'slimline[export]'"


def test_operator_without_an_export_is_named(transformer_checkpoint: Callable[[str], Path]) -> None:
    if problem := missing():
        pytest.skip(problem)

    class Bessel(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(hidden)

    source = read_checkpoint(transformer_checkpoint("DistilBertModel"))
    block: Any = source.model.get_submodule("transformer.layer.0.ffn")
    block.activation = Bessel()
    with pytest.raises(ValueError, match=r"of this DistilBertModel it says: No ONNX function found for .*bessel_j0"):
        export_encoder(source, None)
    assert type(block.lin1) is torch.nn.Linear, "the model is as it was"
