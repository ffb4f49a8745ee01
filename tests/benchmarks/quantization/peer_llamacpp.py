"""llama.cpp's quantization, through llama-cpp-python; run by run.py in its own environment.

The checkpoint is written as a float32 GGUF file in the rows' Hugging Face order: llama.cpp reorders the rows of queries
and keys, but its formats round each row by itself, so the weights that come out are the same. Rows that no k-quant
divides (it wants multiples of 256) get an older format; which, the contender's notes say.

With "importance", columns are weighed by their inputs' mean squares, as `llama-imatrix` would have collected them.
"""

import ctypes
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import llama_cpp
import numpy as np
from contender import Contender, Floats, main

FORMATS = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q3_K_M", "Q2_K"]
CALIBRATED = ["Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q2_K"]
CONTENDERS: dict[str, dict[str, Any]] = {f"llama-cpp-{name}": {"format": name} for name in FORMATS}
CONTENDERS |= {f"llama-cpp-{name}-imatrix": {"format": name, "importance": True} for name in CALIBRATED}


def quantize(contender: Contender) -> tuple[dict[str, Floats], float]:
    config = json.loads((contender.checkpoint / "config.json").read_text())
    weights = contender.weights()
    num_layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, num_layers)
    name_of = {names.get_name(name, try_suffixes=(".weight",)): name for name in weights}
    with TemporaryDirectory() as folder:
        before, after = Path(folder) / "float.gguf", Path(folder) / "quantized.gguf"
        write_gguf(before, config, {new: weights[name] for new, name in name_of.items()})
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.nthread = contender.threads
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{contender.options['format']}")
        if contender.options.get("importance"):
            importances = contender.input_mean_squares()
            entries = importance_entries(
                {new: importances[name] for new, name in name_of.items() if name in importances}
            )
            parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
        with contender.measured():
            failed = llama_cpp.llama_model_quantize(bytes(before), bytes(after), ctypes.byref(parameters))
        if failed:
            raise RuntimeError(f"llama_model_quantize returned {failed}; its output above says why.")
        del weights
        found: dict[str, Floats] = {}
        num_bits = 0
        kinds: Counter[str] = Counter()
        for tensor in gguf.GGUFReader(after).tensors:
            found[name_of[tensor.name]] = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            num_bits += 8 * int(tensor.n_bytes)
            kinds[tensor.tensor_type.name] += 1
    contender.notes.append("tensors: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    return found, num_bits


def write_gguf(file: Path, config: dict[str, Any], weights: dict[str, Floats]) -> None:
    """A GGUF file of architecture llama, without a vocabulary, which quantizing reads none of."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    for name, values in weights.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance_entries(importances: dict[str, Floats]) -> Any:
    """The array of `llama_model_imatrix_data` that ends with a null name; it points into the arrays given."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(importances) + 1))()
    for entry, (name, values) in zip(entries, importances.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return entries


if __name__ == "__main__":
    main("llama.cpp", ["llama-cpp-python", "gguf"], CONTENDERS, quantize)
