"""llama.cpp through llama-cpp-python, built from source for this processor; run by run.py in its own environment.

There is no wheel: pip compiles it, for which a compiler is needed and many minutes. xllamacpp's wheels hold llama.cpp
too, but without AVX-512 and VNNI, and would lose by that alone. Models are made by llama.cpp's own quantizer out
of the GGUF file that the float checkpoint was de-quantized from, so out of the same floats.
"""

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from contender import Floats, Generated, Ids, Making, Options, generate_greedily, log_probs_of, main

CONTENDERS: dict[str, Options] = {
    f"llama-cpp-{name}": {"tool": "llama.cpp", "kind": kind, "type": name}
    for name, kind in (("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4"))
}
MODEL_FILE = "model.gguf"
MAX_SEQUENCES, MAX_LENGTH = 8, 512


def make(making: Making) -> None:
    if making.gguf is None:
        raise ValueError("llama.cpp needs the model as GGUF. Name the file: run.py --gguf FILE.")
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = making.threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{making.options['type']}")
    params.allow_requantize = True
    failed = llama_cpp.llama_model_quantize(
        str(making.gguf).encode(), str(making.out / MODEL_FILE).encode(), ctypes.byref(params)
    )
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed} for {making.gguf}.")


class LlamaCpp:
    """A model and a context of `MAX_SEQUENCES` sequences, all decoded in one batch."""

    def __init__(self, file: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = MAX_SEQUENCES
        params.n_ctx = MAX_SEQUENCES * MAX_LENGTH
        params.n_batch = 2048
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp could not load {file}.")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._length = 0
        self.facts = {"system_info": llama_cpp.llama_print_system_info().decode().strip()}

    def generate(self, input_ids: Ids, new_tokens: int) -> Generated:
        return generate_greedily(self._prefill, lambda ids: self._append(ids[:, None]), input_ids, new_tokens)

    def log_probs(self, input_ids: Ids) -> Floats | None:
        self._forget()
        return log_probs_of(self._append(input_ids[None, :-1], all_logits=True), input_ids)

    def _prefill(self, input_ids: Ids) -> Floats:
        self._forget()
        return self._append(input_ids)

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        self._length = 0

    def _append(self, input_ids: Ids, *, all_logits: bool = False) -> Floats:
        """Logits [batch, vocab_size] after [batch, length] more tokens, or [length, vocab_size] of every token."""
        batch_size, length = input_ids.shape
        batch: Any = llama_cpp.llama_batch_init(batch_size * length, 0, 1)
        try:
            for index, token in enumerate(input_ids.ravel().tolist()):
                row, position = divmod(index, length)
                batch.token[index] = token
                batch.pos[index] = self._length + position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = row
                batch.logits[index] = all_logits or position == length - 1
            batch.n_tokens = batch_size * length
            failed = llama_cpp.llama_decode(self._context, batch)
            if failed:
                raise RuntimeError(f"llama_decode returned {failed}.")
        finally:
            llama_cpp.llama_batch_free(batch)
        self._length += length
        num_rows = length if all_logits else batch_size
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (num_rows, self._vocab_size)).copy()


def load(options: Options, bundle: Path, threads: int) -> LlamaCpp:
    return LlamaCpp(bundle / MODEL_FILE, threads)


if __name__ == "__main__":
    main(["llama-cpp-python"], CONTENDERS, make, load)
