"""The reference: transformers on PyTorch. What every engine is compared with, in numbers and in speed."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from tasks.calibration.checkpoints import load_model
from tasks.engines.generation import Ids, Logits, check_prompt, check_step
from tasks.quantization.checkpoint_format import CacheScales, read_cache_scales

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PyTorch(BaseModel, frozen=True, extra="forbid"):
    """transformers' own forward pass. Its bundle is the checkpoint itself; activations that it says to round are."""

    engine: Literal["pytorch"] = "pytorch"
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Of weights and everything computed.")

    @property
    def executable(self) -> bool:
        """Whether this machine can run it."""
        return self.missing() is None

    def cannot_run(self) -> str | None:
        """Why this machine cannot run it; None if it can."""
        return self.missing()

    def cannot_load(self, bundle: Path) -> str | None:
        """Why this machine cannot run the bundle; None if it can."""
        return self.cannot_run()

    def missing(self) -> str | None:
        """Why this machine cannot run it; None if it can."""
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            return None
        return "PyTorch and transformers are part of every installation; run: make install"

    def compile(self, checkpoint: Path, out: Path) -> tuple[str, ...]:
        """Nothing is compiled: the checkpoint is loaded as it is."""
        raise ValueError(f"PyTorch runs the checkpoint {checkpoint} itself; there is nothing to compile. Call load().")

    def load(self, bundle: Path, *, threads: int) -> "PyTorchSession":
        """A session on the checkpoint `bundle`, on `threads` threads of this process."""
        import torch

        from tasks.quantization.emulation import round_inputs_

        torch.set_num_threads(threads)
        model = load_model(bundle)
        round_inputs_(model, bundle)
        return PyTorchSession(model.to(getattr(torch, self.precision)), read_cache_scales(bundle))


class PyTorchSession:
    """A model with its KV cache."""

    def __init__(self, model: "PreTrainedModel", cache_scales: CacheScales | None = None) -> None:
        self._model: Any = model.eval()
        self._vocab_size = int(model.config.vocab_size)
        self._max_length = int(model.config.max_position_embeddings)
        self._cache_scales = cache_scales
        self._cache: Any = None
        self._batch_size = 0
        self._length = 0

    @property
    def vocab_size(self) -> int:
        """Size of the last dimension of logits."""
        return self._vocab_size

    @property
    def max_length(self) -> int:
        """The longest sequence, prompt and new tokens together."""
        return self._max_length

    @property
    def facts(self) -> dict[str, str]:
        """What it says it computes in."""
        return {"dtype": str(self._model.dtype), "attention": str(self._model.config._attn_implementation)}

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        """Starts new sequences; see `Session.prefill`."""
        check_prompt(input_ids, num_logits, vocab_size=self._vocab_size, max_length=self._max_length)
        from tasks.quantization.emulation import empty_cache

        self._cache = empty_cache(self._model, self._cache_scales)
        self._batch_size, self._length = input_ids.shape
        return self._forward(input_ids, num_logits)

    def decode(self, input_ids: Ids) -> Logits:
        """Appends one token to each sequence; see `Session.decode`."""
        check_step(input_ids, batch_size=self._batch_size, length=self._length, max_length=self._max_length)
        self._length += 1
        return self._forward(input_ids[:, None], 1)[:, 0]

    def _forward(self, input_ids: Ids, num_logits: int) -> Logits:
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=torch.from_numpy(np.ascontiguousarray(input_ids)),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=num_logits,
            )
        self._cache = out.past_key_values
        logits: Logits = out.logits.float().numpy()
        return logits

    def close(self) -> None:
        """Frees the weights."""
        self._model = self._cache = None
