"""AutoRound's tuning of rounding by signed gradients; run by run.py in its own environment.

The linear layers of every block are quantized as the options say, all else as AutoRound's defaults are, which compile
the steps with torch: that needs a C++ compiler. The embedding, which is the LM head too, gets 8 bits per row by
AutoRound's plain rounding, because its default would leave it in float. Scales count as 16 bits; zero points, where a
contender has them, as the weights' bits.
"""

from typing import Any

import torch
from auto_round import AutoRound
from auto_round.data_type.int import quant_tensor_rtn_sym
from contender import Contender, Floats, main
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDING = "model.embed_tokens.weight"
CONTENDERS: dict[str, dict[str, Any]] = {
    # 0 steps: rounding to scales that are searched for, weighed by the inputs' mean squares.
    "autoround-int4-sym-g32-0-steps": {"bits": 4, "group_size": 32, "sym": True, "iters": 0},
    "autoround-int4-sym-g64-50-steps": {"bits": 4, "group_size": 64, "sym": True, "iters": 50},
    "autoround-int4-sym-g64": {"bits": 4, "group_size": 64, "sym": True, "iters": 200},
    "autoround-int4-asym-g32": {"bits": 4, "group_size": 32, "sym": False, "iters": 200},
}


def quantize(contender: Contender) -> tuple[dict[str, Floats], float]:
    torch.set_num_threads(contender.threads)
    options = contender.options
    tokens = torch.from_numpy(contender.calibration_tokens())
    model = AutoModelForCausalLM.from_pretrained(contender.checkpoint, dtype=torch.float32)
    with contender.measured():
        tuner = AutoRound(
            model,
            AutoTokenizer.from_pretrained(contender.checkpoint),
            scheme="W4A16",
            **options,
            dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens],
            nsamples=tokens.shape[0],
            seqlen=tokens.shape[1],
            device_map="cpu",
        )
        quantized, _ = tuner.quantize()
    found = {name: values.float() for name, values in quantized.state_dict().items()}
    weights = {}
    num_bits = 0
    for name, before in contender.weights().items():
        if before.ndim != 2:
            num_bits += 32 * before.size
        elif name == EMBEDDING:
            found[name], _, _ = quant_tensor_rtn_sym(torch.from_numpy(before), bits=8, group_size=-1)
            num_bits += 8 * before.size + 16 * before.shape[0]
        else:
            per_group = 16 if options["sym"] else 16 + options["bits"]
            num_bits += options["bits"] * before.size + per_group * before.size // options["group_size"]
        weights[name] = found[name].detach().numpy()
    return weights, num_bits


if __name__ == "__main__":
    main("AutoRound", ["auto-round", "torch"], CONTENDERS, quantize)
