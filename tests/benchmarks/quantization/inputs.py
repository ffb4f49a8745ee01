"""Mean squares of every linear layer's inputs on the calibration tokens: what llama.cpp calls an importance matrix."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.calibration.checkpoints import load_model
from tasks.calibration.tokens import load_tokens


def mean_squares(checkpoint: Path, tokens: Tensor) -> dict[str, Tensor]:
    """[in_features] float32 by the weight's name, over all positions of `tokens` [sequences, length]."""
    model = load_model(checkpoint)
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].detach().double().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    with torch.inference_mode():
        for batch in torch.split(tokens, 4):
            model.base_model(batch, use_cache=False)
    return {name: (values / tokens.numel()).float() for name, values in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequences", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = torch.from_numpy(load_tokens(arguments.data, "calibration")[: arguments.sequences]).long()
    np.savez(
        arguments.out, **{name: values.numpy() for name, values in mean_squares(arguments.checkpoint, tokens).items()}
    )


if __name__ == "__main__":
    main()
