"""Tiny random models of every family that an engine's graph can be built for, as transformers saves them.

What makes a family different is on in each: windows shorter than the tests' sequences, soft caps that bend, learned
positions, biases and gains that are neither zero nor one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 512
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {
    "head_dim": 16,
    "layer_types": LAYER_TYPES,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 3.0,
}
GEMMA2 = {**GEMMA, "attn_logit_softcapping": 2.0}
GEMMA3 = {
    **GEMMA,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 3.8],
    "long_factor": [4.0] * 8,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "layer_types": LAYER_TYPES},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "phi3": {"sliding_window": 5},
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt2": {},
    "opt": {},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
}
"""Options of each family's one model in the support table, by `model_type`."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, options) for family, options in FAMILIES.items()},
    "llama with gelu": ("llama", {"hidden_act": "gelu"}),
    "phi3 turning half of a head": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3 with longrope": (
        "phi3",
        {"original_max_position_embeddings": 32, "max_position_embeddings": 128, "rope_parameters": LONGROPE},
    ),
    "gemma2 not tied": ("gemma2", {**GEMMA2, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma2 without caps": ("gemma2", {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gpt2 with odd scales": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80}),
    "gpt2 without scales": ("gpt2", {"scale_attn_weights": False, "activation_function": "gelu"}),
    "opt with gelu, not tied": ("opt", {"activation_function": "gelu", "tie_word_embeddings": False}),
    "opt without biases": ("opt", {"enable_bias": False}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt_neox turning whole heads": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    ),
    "gpt_neox turning half of 32": (
        "gpt_neox",
        {
            "num_attention_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "attention_bias": False,
        },
    ),
}
"""Every option that changes a graph, at least once."""


def tokens(batch_size: int, length: int, seed: int = 0) -> np.ndarray:
    """Ids of random tokens."""
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, (batch_size, length))


def reference(checkpoint: Path, input_ids: np.ndarray) -> np.ndarray:
    """transformers' logits [batch, length, vocab_size]."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(input_ids)).logits.numpy()
    return logits


def save(family: str, options: dict[str, Any], out: Path) -> Path:
    """Writes a model of `family` into `out`."""
    config = AutoConfig.for_model(family, **_sizes(family) | SPECIAL_TOKENS | options)
    torch.manual_seed(0)
    model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 2:  # so that neither attention nor feed-forward is lost in the residual stream
                parameter.copy_(0.15 * noise)
            else:  # gains of norms are ones at first (of Gemma zeros), biases zeros, which would hide a forgotten one
                parameter.add_((0.5 if name.endswith("bias") else 0.3) * noise)
    model.save_pretrained(out)
    return out


def _sizes(family: str) -> dict[str, Any]:
    """The same sizes by the names that a family has for them."""
    sizes: dict[str, Any] = dict(SIZES)
    if family == "gpt2":
        del sizes["num_key_value_heads"], sizes["intermediate_size"]
    if family == "opt":
        del sizes["num_key_value_heads"]
        sizes["ffn_dim"] = sizes.pop("intermediate_size")
    if family == "gpt_neox":
        del sizes["num_key_value_heads"]
    return sizes
