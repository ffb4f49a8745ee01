"""LLM Compressor's GPTQ and AWQ; run by run.py in its own environment.

The linear layers of every block are quantized as the options say, all else as LLM Compressor's defaults are. The
embedding, which is the LM head too, gets 8 bits per row, because the default would leave it in float. Scales count as
16 bits; zero points, where a contender has them, as the weights' bits.
"""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from contender import Contender, Floats, main
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor
from transformers import AutoModelForCausalLM

EMBEDDING = "model.embed_tokens.weight"
EIGHT_BITS = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
SYM_64: dict[str, Any] = {"num_bits": 4, "symmetric": True, "group_size": 64, "observer": "mse"}
ASYM_32: dict[str, Any] = {"num_bits": 4, "symmetric": False, "group_size": 32, "observer": "mse"}
CONTENDERS: dict[str, dict[str, Any]] = {
    "llmcompressor-int4-sym-g64-gptq": {"method": "gptq", "weights": SYM_64},
    "llmcompressor-int4-sym-g64-awq": {"method": "awq", "weights": SYM_64},
    "llmcompressor-int4-asym-g32-gptq": {"method": "gptq", "weights": ASYM_32},
    "llmcompressor-int4-asym-g32-awq": {"method": "awq", "weights": ASYM_32},
}


def quantize(contender: Contender) -> tuple[dict[str, Floats], float]:
    torch.set_num_threads(contender.threads)
    if not torch.accelerator.is_available():
        # AWQ pins its cache's memory for copies to an accelerator, which fails where there is none.
        IntermediatesCache.pin_memory = lambda *_: None
    options = QuantizationArgs(strategy="group", **contender.options["weights"])
    scheme = {"config_groups": {"blocks": QuantizationScheme(targets=["Linear"], weights=options)}}
    rounding = {"ignore": ["lm_head"], **scheme}
    tokens = contender.calibration_tokens()
    recipe = {
        "gptq": lambda: [GPTQModifier(**rounding)],
        "awq": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(**rounding)],
    }[contender.options["method"]]()
    model = AutoModelForCausalLM.from_pretrained(contender.checkpoint, dtype=torch.float32)
    dataset = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": [[1] * tokens.shape[1]] * len(tokens)})
    with contender.measured():
        oneshot(
            model=model,
            dataset=dataset,
            recipe=recipe,
            max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens),
        )
    return read_weights(model, contender.weights(), options)


def read_weights(
    model: torch.nn.Module, weights: dict[str, Floats], options: QuantizationArgs
) -> tuple[dict[str, Floats], float]:
    """The model's weights as its grids say them, and their bits."""
    found: dict[str, Floats] = {}
    num_bits = 0
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in weights:
            module = modules[name.rpartition(".")[0]]
            values = module.weight.float()
            if values.ndim != 2:
                num_bits += 32 * values.numel()
            elif name == EMBEDDING:
                values = eight_bits(values)
                num_bits += 8 * values.numel() + 16 * values.shape[0]
            else:
                values = fake_quantize(values, module.weight_scale.float(), module.weight_zero_point, options)
                per_scale = 16 if options.symmetric else 16 + options.num_bits
                num_bits += options.num_bits * values.numel() + per_scale * module.weight_scale.numel()
            found[name] = values.numpy().copy()
    return found, num_bits


def eight_bits(weight: Tensor) -> Tensor:
    scale, zero_point = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), EIGHT_BITS)
    return fake_quantize(weight, scale, zero_point, EIGHT_BITS)


if __name__ == "__main__":
    main("LLM Compressor", ["llmcompressor", "compressed-tensors", "torch"], CONTENDERS, quantize)
