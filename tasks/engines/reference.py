"""The reference in the memory of one block: transformers' own modules, run block after block on weights from the files.

`pytorch.py` holds a whole model in float32 and can write; this one only reads, which is all that a comparison needs
(`parity.py`): greedy text is checked by reading it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from tasks.calibration.architectures import ARCHITECTURES, Architecture
from tasks.calibration.checkpoints import empty_model
from tasks.engines.generation import Ids, Logits, check_prompt
from tasks.quantization.checkpoint_format import read_cache_scales
from tasks.quantization.float_weights import FloatWeights

if TYPE_CHECKING:
    from torch import Tensor

GPT2 = Architecture(
    family="gpt2",
    embedding="transformer.wte",
    positions="transformer.wpe",
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    lm_head="lm_head",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    attention=("attn.c_attn", "attn.c_proj"),
    mlp=("mlp.c_fc", "mlp.c_proj"),
    gated=False,
)
"""A family that can be read like the others; why nothing changes it: `architectures.WITHOUT_ROW`."""

HEAD_ROWS = 8192
"""Of the LM head at a time: 64 MiB where hidden states have 2048 values."""


class StreamedPyTorch:
    """A checkpoint as PyTorch computes it in float32, with inputs and KV cache rounded where it says so."""

    def __init__(self, checkpoint: Path, *, threads: int) -> None:
        """Read its headers.

        Raises:
            ValueError: the checkpoint lacks weights or holds them in other shapes; or it is stored in a way that
                `read_quantized` does not know.
        """
        import torch

        from tasks.quantization.emulation import RoundedOnce, round_inputs_

        torch.set_num_threads(threads)
        family = json.loads((checkpoint / "config.json").read_text())["model_type"]
        self._family = GPT2 if family == "gpt2" else ARCHITECTURES[family]
        self._weights = FloatWeights(checkpoint, self._family.base)
        self._model = empty_model(checkpoint, self._weights.shapes)
        round_inputs_(self._model, checkpoint)
        scales = read_cache_scales(checkpoint)
        self._cache = RoundedOnce(self._model.config, scales) if scales else None
        self.vocab_size = int(self._model.config.vocab_size)

    def read(self, texts: Sequence[tuple[Ids, int]]) -> Iterator[Logits]:
        """Logits of the last positions of some texts, all from one walk through the blocks.

        Args:
            texts: of each the token ids, [batch, length] int64, and of how many of its last positions.

        Returns:
            For each text, [batch, positions, vocab_size] float32.

        Raises:
            ValueError: a text is none that the model reads.
        """
        longest = int(self._model.config.max_position_embeddings)
        for input_ids, num_logits in texts:
            check_prompt(input_ids, num_logits, vocab_size=self.vocab_size, max_length=longest)
        hidden = self._run([input_ids for input_ids, _ in texts])
        return (self._logits(each[:, -num_logits:]) for each, (_, num_logits) in zip(hidden, texts, strict=True))

    def _run(self, texts: Sequence[Ids]) -> "list[Tensor]":
        """What the last block gives, [batch, length, hidden_size] each."""
        import torch

        from tasks.calibration.layerwise import run_blocks
        from tasks.calibration.streaming import Streamed

        batches = [torch.from_numpy(np.ascontiguousarray(input_ids)) for input_ids in texts]
        with TemporaryDirectory() as folder:
            residence = Streamed(self._model, self._family, self._weights, Path(folder))
            run_blocks(self._model, self._family, batches, residence, self._cache)
            return list(residence.hidden())

    def _logits(self, hidden: "Tensor") -> Logits:
        """[batch, length, vocab_size] float32, the LM head read piece by piece."""
        import torch

        from tasks.calibration.layerwise import soft_capped

        norm = self._model.get_submodule(self._family.final_norm)
        head = self._model.get_submodule(self._family.lm_head)
        table = f"{self._family.lm_head}.weight"
        if table not in self._weights:
            table = f"{self._family.embedding}.weight"  # tied
        name = self._family.final_norm
        norm.load_state_dict({key: self._weights.copy(f"{name}.{key}") for key in norm.state_dict()}, assign=True)
        with torch.no_grad():
            normed, logits = norm(hidden), np.empty((*hidden.shape[:2], self.vocab_size), np.float32)
            start = 0
            for piece in self._weights.pieces(table, HEAD_ROWS):
                head.weight = torch.nn.Parameter(piece, requires_grad=False)  # the module's hooks apply
                logits[:, :, start : start + len(piece)] = soft_capped(head(normed), self._model).numpy()
                start += len(piece)
        return logits
