"""transformers on PyTorch, without compilation; run by run.py in Slimline's environment.

Its own forward pass with its KV cache, but not its `generate`, whose Python takes longer for each token: the faster of
its ways.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contender import Floats, Generated, Ids, Making, Options, generate_greedily, log_probs_of, main
from transformers import AutoModelForCausalLM, DynamicCache

CONTENDERS: dict[str, Options] = {
    f"transformers-{dtype}": {"tool": "transformers", "kind": dtype, "dtype": dtype}
    for dtype in ("float32", "bfloat16")
}


def make(making: Making) -> None:
    """The checkpoint in the type it is computed in."""
    model = AutoModelForCausalLM.from_pretrained(making.checkpoint, dtype=getattr(torch, making.options["dtype"]))
    model.save_pretrained(making.out)


class Transformers:
    """A model with its KV cache."""

    def __init__(self, bundle: Path, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(bundle, dtype=getattr(torch, dtype)).eval()
        self._cache: Any = None
        self.facts = {"dtype": str(self._model.dtype), "attention": self._model.config._attn_implementation}

    def generate(self, input_ids: Ids, new_tokens: int) -> Generated:
        return generate_greedily(self._prefill, self._decode, input_ids, new_tokens)

    def log_probs(self, input_ids: Ids) -> Floats | None:
        self._cache = None
        return log_probs_of(self._forward(input_ids[None, :-1], len(input_ids) - 1)[0], input_ids)

    def _prefill(self, input_ids: Ids) -> Floats:
        self._cache = DynamicCache(config=self._model.config)
        return self._forward(input_ids, 1)[:, -1]

    def _decode(self, input_ids: Ids) -> Floats:
        return self._forward(input_ids[:, None], 1)[:, -1]

    def _forward(self, input_ids: Ids, num_logits: int) -> Floats:
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.from_numpy(np.ascontiguousarray(input_ids)),
                past_key_values=self._cache,
                use_cache=self._cache is not None,
                logits_to_keep=num_logits,
            ).logits
        found: Floats = logits.float().numpy()
        return found


def load(options: Options, bundle: Path, threads: int) -> Transformers:
    assert json.loads((bundle / "config.json").read_text())["dtype"] == options["dtype"]
    return Transformers(bundle, options["dtype"], threads)


if __name__ == "__main__":
    main(["torch", "transformers"], CONTENDERS, make, load)
