"""llama.cpp's quantizers, out of the library in xllamacpp's wheel; run by run.py in its own environment.

The wheel, which needs the system's libgomp, exports `ggml_quantize_chunk`, which rounds rows to one type, but not
`llama_model_quantize`, which decides which tensor gets which. So `type_of` decides it as llama.cpp's
`llama_tensor_get_type_impl` and `tensor_type_fallback` do for dense models of Llama's shape (src/llama-quant.cpp,
commit 007dbbf3). What is left out of them: mixtures of experts, Falcon, Llama 70B. Rows that 256 does not divide
cannot have a k-quant and get an older type; which types a contender has, its notes say. Rows are in Hugging Face
order: llama.cpp reorders those of queries and keys, but rounds each by itself.

With "importance", columns are weighed by their inputs' mean squares, as `llama-imatrix` would have collected them; like
there, none is collected for embedding and LM head.
"""

import ctypes
import importlib.metadata
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import numpy as np
from contender import Contender, Floats, main
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

BASES = {
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q4_1": "Q4_1",
    "Q4_0": "Q4_0",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "Q3_K_M": "Q3_K",
    "IQ3_M": "IQ3_S",
    "IQ3_S": "IQ3_S",
    "Q2_K": "Q2_K",
}
"""The type that most tensors have, by the name of llama-quantize's preset."""

FALLBACKS = {
    "Q6_K": "Q8_0",
    "Q5_K": "Q5_1",
    "Q4_K": "Q5_0",
    "Q3_K": "Q4_0",
    "Q2_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
}

CALIBRATED = ["Q5_K_M", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_S", "Q2_K"]
CONTENDERS: dict[str, dict[str, Any]] = {f"llama-cpp-{name}": {"preset": name} for name in BASES if name != "IQ3_S"}
CONTENDERS |= {f"llama-cpp-{name}-imatrix": {"preset": name, "importance": True} for name in CALIBRATED}


def quantize(contender: Contender) -> tuple[dict[str, Floats], float]:
    config = json.loads((contender.checkpoint / "config.json").read_text())
    importances = contender.input_mean_squares() if contender.options.get("importance") else {}
    weights = contender.weights()
    types = {
        name: type_of(
            contender.options["preset"],
            name,
            values.shape[1],
            num_layers=config["num_hidden_layers"],
            group=config["num_attention_heads"] // config["num_key_value_heads"],
            tied=config["tie_word_embeddings"],
            importance=bool(importances),
        )
        for name, values in weights.items()
        if values.ndim == 2
    }
    wheel = importlib.metadata.distribution("xllamacpp")
    library = ctypes.CDLL(str(wheel.locate_file("xllamacpp/xllamacpp.abi3.so")))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def quantized(name: str) -> NDArray[np.uint8]:
        return quantize_rows(library, weights[name], types[name], importances.get(name))

    with contender.measured(), ThreadPoolExecutor(contender.threads) as pool:
        stored = dict(zip(types, pool.map(quantized, types), strict=True))
    num_bits = 8 * sum(rows.nbytes for rows in stored.values())
    num_bits += sum(32 * values.size for name, values in weights.items() if name not in types)
    weights |= {name: gguf.dequantize(rows, GGMLQuantizationType[types[name]]) for name, rows in stored.items()}
    counts = Counter(types.values()).most_common()
    contender.notes.append("tensors: " + ", ".join(f"{count} {kind}" for kind, count in counts))
    return weights, num_bits


def type_of(
    preset: str, name: str, num_columns: int, *, num_layers: int, group: int, tied: bool, importance: bool
) -> str:
    """The type of one weight.

    Args:
        preset: of llama-quantize.
        name: the weight's, of Hugging Face.
        num_columns: how long its rows are.
        num_layers: blocks of the model.
        group: query heads for each key and value head.
        tied: whether the embedding is the LM head too.
        importance: whether there is an importance matrix.
    """
    base = BASES[preset]
    if name == ("model.embed_tokens.weight" if tied else "lm_head.weight"):
        fits = num_columns % gguf.GGML_QUANT_SIZES[GGMLQuantizationType[base]][0] == 0
        wanted = "Q6_K" if fits and base != "Q8_0" else "Q8_0"
    elif name.startswith("model.layers."):
        _, _, layer, _, kind, _ = name.split(".")
        wanted = _exceptions(kind, int(layer), num_layers, group, importance).get(preset) or base
    else:
        wanted = base
    return wanted if num_columns % gguf.GGML_QUANT_SIZES[GGMLQuantizationType[wanted]][0] == 0 else FALLBACKS[wanted]


def _exceptions(kind: str, layer: int, num_layers: int, group: int, importance: bool) -> dict[str, str | None]:
    """By preset, the type of a linear layer that isn't its preset's base; None where it is."""
    early = layer < num_layers // 8
    more = "Q6_K" if early or layer >= 7 * num_layers // 8 or (layer - num_layers // 8) % 3 == 2 else None
    if kind == "v_proj":
        shared = group >= 4
        return {
            "Q5_K_M": more,
            "Q4_K_M": more,
            "Q4_K_S": "Q5_K" if layer < 4 else None,
            "IQ4_NL": "Q5_K" if shared else None,
            "IQ4_XS": "Q5_K" if shared else None,
            "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "IQ3_M": "Q4_K",
            "IQ3_S": "Q4_K" if shared else None,
            "Q2_K": "Q4_K" if shared else "Q3_K",
        }
    if kind == "o_proj":
        return {"Q3_K_M": "Q4_K", "IQ3_M": "Q4_K", "Q2_K": "Q3_K"}
    if kind == "down_proj":
        return {
            "Q5_K_M": more,
            "Q5_0": "Q5_1" if early and importance else None,
            "Q4_K_M": more,
            "Q4_K_S": "Q5_K" if early else None,
            "Q4_0": "Q4_1" if early and importance else None,
            "IQ4_NL": "Q5_K" if early and not importance else None,
            "IQ4_XS": "Q5_K" if early and not importance else None,
            "Q3_K_M": "Q5_K" if layer < num_layers // 16 else "Q4_K",
            "IQ3_M": "Q4_K" if early else None,
            "Q2_K": "Q3_K",
        }
    return {}


def quantize_rows(library: ctypes.CDLL, values: Floats, kind: str, importance: Floats | None) -> NDArray[np.uint8]:
    """[rows, bytes of a row]; `importance` [columns] weighs columns."""
    quantization_type = GGMLQuantizationType[kind]
    rows, columns = values.shape
    block, size = gguf.GGML_QUANT_SIZES[quantization_type]
    out = np.empty((rows, columns // block * size), np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    num_bytes = library.ggml_quantize_chunk(
        ctypes.c_int(quantization_type),
        np.ascontiguousarray(values).ctypes.data_as(floats),
        out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data_as(floats),
    )
    if num_bytes != out.nbytes:
        raise RuntimeError(f"{rows} rows of {columns} as {kind} must be {out.nbytes} bytes; got {num_bytes}.")
    return out


if __name__ == "__main__":
    main("llama.cpp", ["xllamacpp", "gguf"], CONTENDERS, quantize)
