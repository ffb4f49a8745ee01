"""Fixtures shared by the suite: a tiny but real decoder, so that every stage runs for real in seconds."""

import atexit
import functools
import inspect
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Groups of tests run beside each other: their timed stages do not wait for those of the others.
os.environ["SLIMLINE_MACHINE_LOCK"] = str(Path(tempfile.gettempdir()) / f"slimline-tests-{os.getpid()}" / "lock")
atexit.register(shutil.rmtree, Path(os.environ["SLIMLINE_MACHINE_LOCK"]).parent, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _environment_is_each_files_own() -> Iterator[None]:
    """What a command of ours that ran in this process told Prefect and MLflow is not inherited by later tests' runs."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint directory: a random Llama of 4 layers, with a byte-level BPE tokenizer of 512 tokens."""
    out = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(out)
    return out


def write_tiny_checkpoint(out: Path) -> None:
    """Writes `tiny_checkpoint` into a directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([inspect.getsource(m) for m in (inspect, textwrap)], trainer)
    eos = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=eos, pad_token=eos)
    fast.save_pretrained(out)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # the default 0.02 is so small that every model would agree with every other
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    model.save_pretrained(out)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(out)


@pytest.fixture(scope="session")
def wide_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with fewer and wider layers (19 MB), so that weights take most of a token's time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "head_dim": 128}
    out = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_checkpoint, **sizes)).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_checkpoint / name, out / name)
    return out


@pytest.fixture(scope="session")
def family_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a plain checkpoint of a family: random, of 3 layers, not tied, with the tokenizer of `tiny_checkpoint`."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    gemma = {"sliding_window": 5, "layer_types": layer_types, "query_pre_attn_scalar": 24}
    special = {
        "mistral": {"sliding_window": 5},
        "qwen2": {"use_sliding_window": True, "sliding_window": 5, "layer_types": layer_types},
        "phi3": {"sliding_window": 5},
        "gemma2": {**gemma, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "gemma3_text": gemma,
        "opt": {"ffn_dim": 128},
    }
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

    @functools.cache
    def make(family: str, dtype: str = "float32") -> Path:
        torch.manual_seed(0)
        grouped = {} if family in ("opt", "gpt_neox") else {"num_key_value_heads": 2, "head_dim": 16}
        config = AutoConfig.for_model(
            family,
            vocab_size=512,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            **{"intermediate_size": 128} | grouped | ids | special.get(family, {}),
        )
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        with torch.no_grad():
            for parameter in model.parameters():  # biases are zeros and norms are ones, of which nothing can be learnt
                parameter.copy_(6 * parameter if parameter.dim() == 2 else parameter + torch.rand_like(parameter))
        out = tmp_path_factory.mktemp(f"{family}-{dtype}")
        model.to(getattr(torch, dtype)).save_pretrained(out)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tiny_checkpoint / name, out / name)
        return out

    return make


@pytest.fixture(scope="session")
def small_disk() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command that finds a new file system of a size ("8m") in a directory; nobody else does.

    It is a tmpfs in a mount namespace of its own, which users may make where the system lets them.
    """

    def run(where: Path, size: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        mounted = f"mount -t tmpfs -o size={size} none {shlex.quote(str(where))} && {shlex.join(command)}"
        return subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", mounted],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )

    probe = Path(__file__).parent
    try:
        allowed = run(probe, "1m", "true").returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this system lets no user mount a tmpfs in a namespace (unshare --map-root-user --mount)")
    return run


@pytest.fixture(scope="session")
def tiny_data(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare_data` writes for the tiny model, as far as training reads it: sequences of 32 tokens."""
    from tasks.calibration.checkpoints import load_tokenizer, tokenizer_digest

    out = tmp_path_factory.mktemp("data")
    ids = load_tokenizer(tiny_checkpoint)(inspect.getsource(textwrap))["input_ids"]
    sequences = np.array(ids[: len(ids) // 32 * 32], dtype=np.int32).reshape(-1, 32)
    np.save(out / "calibration.npy", sequences[:12])
    np.save(out / "training.npy", sequences[12:])
    record = {"tokenizer_sha256": tokenizer_digest(tiny_checkpoint), "vocab_size": 512}
    (out / "data.json").write_text(json.dumps(record))
    return out


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., None]:
    """Writes a checkpoint of Llama's or Qwen 2's family as llama.cpp's converter and quantizer do."""
    return _write_gguf


def _write_gguf(checkpoint: Path, file: Path, *, kinds: Mapping[str, str] | None = None, pre: str = "smollm") -> None:
    """`kinds` are GGUF's types of matrices by patterns of their names, the first that matches; others are F32."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    family = config["model_type"]
    writer = gguf.GGUFWriter(file, family)
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(512)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    family_names = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
    names = gguf.get_tensor_name_map(family_names[family], config["num_hidden_layers"])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        values = tensor.numpy()
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = 4 if "q_proj" in name else 2  # llama.cpp interleaves the halves of rotary dimensions
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        kind = next((kind for pattern, kind in (kinds or {}).items() if fnmatchcase(name, pattern)), "F32")
        raw = None
        if values.ndim == 2 and kind != "F32":
            raw = gguf.GGMLQuantizationType[kind]
            values = gguf.quants.quantize(values, raw)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def transformer_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a plain checkpoint of a class of transformers' encoders or encoder-decoders: random, of 2 layers."""
    import torch
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    both = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in
            {"layers": 2, "attention_heads": 2, "ffn_dim": 64}.items()}  # fmt: skip
    sizes = {
        "bert": small | {"max_position_embeddings": 40},
        "roberta": small | {"max_position_embeddings": 42, "type_vocab_size": 1},
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 40},
        "t5": {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 2, "decoder_start_token_id": 0},
        "bart": both | {"d_model": 32, "max_position_embeddings": 40},
        "marian": both
        | {"d_model": 32, "max_position_embeddings": 40, "pad_token_id": 95, "decoder_start_token_id": 95},
    }
    writing = {  # what makes greedy text differ from the likeliest tokens
        "t5": {"no_repeat_ngram_size": 2},
        "bart": {"forced_bos_token_id": 7, "forced_eos_token_id": 2, "min_length": 6},
        "marian": {"bad_words_ids": [[95]], "forced_eos_token_id": 0},
    }

    @functools.cache
    def make(class_name: str) -> Path:
        torch.manual_seed(0)
        model_class = getattr(transformers, class_name)
        family = model_class.config_class.model_type
        model = model_class(transformers.AutoConfig.for_model(family, vocab_size=96, **sizes[family]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:  # biases are zeros and norms are ones, of which nothing can be learnt
                    parameter.add_(0.3 * torch.rand_like(parameter))
                elif "shared" not in name:
                    parameter.mul_(3 if family == "t5" else 6)
        for name, value in writing.get(family, {}).items():
            setattr(model.generation_config, name, value)
        out = tmp_path_factory.mktemp(class_name)
        model.save_pretrained(out)
        return out

    return make


@pytest.fixture(scope="session")
def save_words() -> Callable[..., None]:
    """Saves a tokenizer for a model of `transformer_checkpoint`: words w0 to w95, special ones by their role."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(96)}, unk_token="w9"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def save(directory: Path, **special: str) -> None:
        PreTrainedTokenizerFast(
            tokenizer_object=words, **{"unk_token": "w9", "pad_token": "w0"} | special
        ).save_pretrained(directory)

    return save
