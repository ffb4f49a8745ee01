"""Quantized encoders and encoder-decoders, as stock transformers and this project's own reader load them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tasks.calibration.tensor_files import Tensors
from tasks.quantization import FromSource, Gptq, Grid, QuantizationMethod, RoundToNearest
from tasks.quantization.activations import Activations
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight
from tasks.quantization.exported import quantize_exported
from tasks.quantization.exported_checkpoint import read_checkpoint
from tasks.quantization.mixed import Mixed
from tasks.quantization.rtn import round_to_nearest

MODELS = (
    "BertForMaskedLM",
    "RobertaForQuestionAnswering",
    "DistilBertModel",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "MarianMTModel",
)
METHODS = {
    "int8": RoundToNearest(weights=Grid(bits=8)),
    "int4": RoundToNearest(weights=Grid(bits=4, group_size=16)),
    "uint4": RoundToNearest(weights=Grid(bits=4, group_size=16, symmetric=False), embeddings=None),
}


@pytest.fixture(scope="module")
def quantized(
    transformer_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(model: str, method: str) -> Path:
        if (model, method) not in made:
            made[model, method] = tmp_path_factory.mktemp("quantized")
            quantize_exported(checkpoint=transformer_checkpoint(model), method=METHODS[method], out=made[model, method])
        return made[model, method]

    return make


def answer(model: torch.nn.Module, is_encoder: bool) -> torch.Tensor:
    input_ids = torch.arange(3, 75).reshape(3, 24)
    inputs = {"input_ids": input_ids} if is_encoder else {"input_ids": input_ids, "decoder_input_ids": input_ids[:, :5]}
    with torch.inference_mode():
        found: torch.Tensor = model(**inputs)[0]
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_stock_transformers_computes_what_our_reader_computes(
    model: str, method: str, quantized: Callable[[str, str], Path]
) -> None:
    ours = read_checkpoint(quantized(model, method))
    theirs, loading = getattr(transformers, model).from_pretrained(quantized(model, method), output_loading_info=True)
    assert not any(loading.values())
    expected = answer(ours.model, ours.is_encoder)
    tolerance = 1e-5 * float(expected.abs().max())  # float32: scales are multiplied in another order
    torch.testing.assert_close(answer(theirs.eval(), ours.is_encoder), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_integers_are_those_of_round_to_nearest(
    model: str, method: str, quantized: Callable[[str, str], Path], transformer_checkpoint: Callable[[str], Path]
) -> None:
    found = read_checkpoint(quantized(model, method)).quantized
    options = METHODS[method]
    modules = dict(read_checkpoint(transformer_checkpoint(model)).model.named_modules())
    inner = {name for name, module in modules.items() if type(module) is torch.nn.Linear and ".0." in name}
    assert inner < found.keys()
    for name, weight in found.items():
        grid = options.weights if type(modules[name]) is torch.nn.Linear else options.embeddings
        assert isinstance(grid, Grid)
        expected = round_to_nearest(modules[name].weight.detach(), grid, name)
        assert_same(weight, expected)


def assert_same(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    np.testing.assert_array_equal(found.integers, expected.integers)
    np.testing.assert_array_equal(found.scale, expected.scale)
    np.testing.assert_array_equal(found.zero_point, expected.zero_point)


def test_tied_weights_are_stored_once(quantized: Callable[[str, str], Path]) -> None:
    with Tensors(quantized("MarianMTModel", "int8")) as tensors:
        tables = [name for name in tensors.names if name.endswith(".weight") and tensors.shape(name) == [96, 32]]
    assert tables == ["model.shared.weight"]


def test_summary_counts_what_was_quantized(transformer_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    summary = quantize_exported(
        checkpoint=transformer_checkpoint("BertForMaskedLM"), method=METHODS["int8"], out=tmp_path
    )
    # two blocks of four 32 x 32 and two 32 x 64 matrices, and the embedding, 96 x 32
    assert summary.num_quantized == 2 * (4 * 32 * 32 + 2 * 32 * 64) + 96 * 32
    assert summary.left_float == {"cls.predictions.transform.dense": "it is not in a block"}
    assert summary.num_parameters == sum(
        parameter.numel() for parameter in read_checkpoint(tmp_path).model.parameters()
    )
    assert 0 < summary.relative_error < 0.01


def test_ignored_layers_stay_float(transformer_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    method = RoundToNearest(weights=Grid(bits=8), ignore=("*.query", "*word_embeddings"))
    summary = quantize_exported(checkpoint=transformer_checkpoint("BertForMaskedLM"), method=method, out=tmp_path)
    found = read_checkpoint(tmp_path)
    assert not [name for name in found.quantized if name.endswith(("query", "word_embeddings"))]
    assert len(found.quantized) == 10
    assert summary.left_float["bert.encoder.layer.1.attention.self.query"] == "`ignore` names it"
    stock = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(answer(stock.eval(), True), answer(found.model, True), rtol=0, atol=1e-5)


def test_same_checkpoint_gives_the_same_bytes(
    transformer_checkpoint: Callable[[str], Path], quantized: Callable[[str, str], Path], tmp_path: Path
) -> None:
    quantize_exported(checkpoint=transformer_checkpoint("MarianMTModel"), method=METHODS["int4"], out=tmp_path)
    first = quantized("MarianMTModel", "int4")
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in first.iterdir()}
    assert all((first / file.name).read_bytes() == file.read_bytes() for file in tmp_path.iterdir())


def test_the_stage_quantizes_these_families_too(
    transformer_checkpoint: Callable[[str], Path], quantized: Callable[[str, str], Path], tmp_path: Path
) -> None:
    quantize_checkpoint(
        checkpoint=transformer_checkpoint("BertForMaskedLM"), data=tmp_path, method=METHODS["int8"], out=tmp_path
    )
    expected = quantized("BertForMaskedLM", "int8") / "model.safetensors"
    assert (tmp_path / "model.safetensors").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Gptq(), "family bert are quantized by `method: rtn`.*got `method: gptq`"),
        (FromSource(), "got `method: source`"),
        (RoundToNearest(weights=Mixed(choices=(Grid(bits=4), Grid(bits=8)), bits_per_weight=6)), "got mixed precision"),
        (RoundToNearest(weights=Grid(bits=8), activations=Activations()), "got `activations`"),
        (RoundToNearest(kv_cache="int8"), "got `kv_cache`"),
        (RoundToNearest(weights=Grid(bits=8, format="float8_e4m3")), "got `format: float8_e4m3`"),
        (RoundToNearest(weights=Grid(bits=4, symmetric=False, zero_point="real")), "got `zero_point: real`"),
        (RoundToNearest(ignore=("*",)), r"At least one layer must be quantized; `ignore` \(\*\) leaves none"),
        (RoundToNearest(ignore=("nothing",)), "'nothing' matches none"),
        (RoundToNearest(weights=Grid(bits=4, group_size=24)), "24"),
    ],
)
def test_what_cannot_be_done_is_refused(
    method: QuantizationMethod, message: str, transformer_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_exported(checkpoint=transformer_checkpoint("BertForMaskedLM"), method=method, out=tmp_path)


def test_quantized_checkpoint_is_refused(quantized: Callable[[str, str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_exported(checkpoint=quantized("BertForMaskedLM", "int8"), method=METHODS["int8"], out=tmp_path)


def test_pooling_comes_along(transformer_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(transformer_checkpoint("DistilBertModel"), checkpoint)
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    modules = [{"path": "", "type": "m.Transformer"}, {"path": "1_Pooling", "type": "m.Pooling"}]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    out.mkdir()
    quantize_exported(checkpoint=checkpoint, method=METHODS["int8"], out=out)
    assert (out / "1_Pooling" / "config.json").read_text() == '{"pooling_mode_mean_tokens": true}'
    assert json.loads((out / "modules.json").read_text()) == modules
