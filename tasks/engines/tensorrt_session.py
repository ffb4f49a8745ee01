"""Running a TensorRT plan: a session with its KV cache on the first GPU."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tasks.engines.generation import Ids, Logits, check_step
from tasks.engines.tensorrt_library import (
    create_context,
    import_library,
    listener,
    open_plan,
    out_of_memory,
    refit_engine,
)
from tasks.engines.tensorrt_plan import DECODE, GRAPH_FILE, PLAN_FILE, PREFILL, Bounds, PlanRecord

MIB = 2**20


class TensorRTSession:
    """A decoder with its KV cache on the GPU, see `generation.Session`.

    A step reads the cache from one set of buffers and writes it, one position longer, into the other.
    """

    def __init__(self, bundle: Path, record: PlanRecord, *, runtime_cache: Path | None) -> None:
        torch: Any = importlib.import_module("torch")  # untyped where it is used here
        tensorrt = import_library(record.library)
        self._torch, self._log = torch, listener(tensorrt)
        self._runtime, self._engine = open_plan(
            tensorrt, (bundle / PLAN_FILE).read_bytes(), host_code=record.version_compatible
        )
        if record.strip_weights:
            refit_engine(tensorrt, self._engine, bundle / GRAPH_FILE)
        self._context, self._kernels = create_context(tensorrt, self._engine, runtime_cache)
        self._stream = torch.cuda.Stream()
        self._profile: int | None = None
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._caches = [name.removeprefix("present.") for name in names if name.startswith("present.")]
        past = "past_key_values." + self._caches[0]
        max_batch_size, self._num_kv_heads, longest_past, self._head_dim = (
            int(size) for size in self._engine.get_tensor_profile_shape(past, DECODE)[2]
        )
        half = self._engine.get_tensor_dtype(past) == tensorrt.DataType.HALF
        self._dtype = torch.float16 if half else torch.float32
        self.max_length = longest_past + 1
        self.vocab_size = int(self._engine.get_tensor_shape("logits")[2])
        self._bounds = Bounds(
            batch_size=max_batch_size,
            prompt=int(self._engine.get_tensor_profile_shape("input_ids", PREFILL)[2][1]),
            length=self.max_length,
            vocab_size=self.vocab_size,
        )
        self.facts = {
            "device": str(torch.cuda.get_device_name()),
            "kv_cache": str(self._engine.get_tensor_dtype(past)).rpartition(".")[2],
            "layers": str(self._engine.num_layers),
            "products": ", ".join(f"{count} {types}" for types, count in record.products.items()),
            record.library: str(tensorrt.__version__),
        }
        self._past: list[Any] = []  # flat tensors with room for [batch, num_kv_heads, max_length, head_dim]
        self._present: list[Any] = []
        self._batch_size = 0
        self._length = 0

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        """Logits [batch, num_logits, vocab_size] of the last positions of new sequences."""
        self._bounds.check_prefill(input_ids, num_logits)
        batch_size = len(input_ids)
        if batch_size != self._batch_size:
            self._allocate(batch_size)
        self._length = 0
        return self._run(PREFILL, input_ids, num_logits)

    def decode(self, input_ids: Ids) -> Logits:
        """Logits [batch, vocab_size] after one more token of each sequence."""
        batch_size = self._batch_size if self._length else 0
        check_step(input_ids, batch_size=batch_size, length=self._length, max_length=self.max_length)
        return self._run(DECODE, input_ids[:, None], 1)[:, 0]

    def close(self) -> None:
        """Frees plan and cache, and keeps the kernels that were compiled where a file for them is named."""
        if self._kernels:
            self._kernels.keep()
        self._past, self._present, self._batch_size, self._length = [], [], 0, 0
        self._context = self._kernels = self._engine = self._runtime = None

    def _allocate(self, batch_size: int) -> None:
        self._past, self._present, self._batch_size, self._length = [], [], 0, 0  # before the new: both need not fit
        size = batch_size * self._num_kv_heads * self.max_length * self._head_dim
        size_mib = 2 * len(self._caches) * size * self._dtype.itemsize / MIB
        with within_gpu_memory(
            f"The KV cache of {batch_size} sequences of {self.max_length} tokens, {size_mib:.0f} MiB,"
        ):
            past, present = (
                [self._torch.empty(size, dtype=self._dtype, device="cuda") for _ in self._caches] for _ in range(2)
            )
        self._past, self._present, self._batch_size = past, present, batch_size

    def _run(self, profile: int, input_ids: Ids, num_logits: int) -> Logits:
        torch, stream = self._torch, self._stream.cuda_stream
        batch_size, length = input_ids.shape
        total = self._length + length
        self._log.forget()
        if profile != self._profile:
            self._context.set_optimization_profile_async(profile, stream)
            self._profile = profile
        with within_gpu_memory(f"{num_logits} positions of logits of {batch_size} sequences"):
            logits = torch.empty((batch_size, num_logits, self.vocab_size), dtype=torch.float32, device="cuda")
            positions = torch.arange(self._length, total, device="cuda")
            feeds = {
                "input_ids": torch.from_numpy(np.ascontiguousarray(input_ids, dtype=np.int64)).cuda(),
                "attention_mask": torch.ones((batch_size, total), dtype=torch.int64, device="cuda"),
                "position_ids": positions.expand(batch_size, length).contiguous(),
                "logit_indices": torch.arange(length - num_logits, length, device="cuda"),
            }
        for name, value in feeds.items():
            self._context.set_input_shape(name, tuple(value.shape))
            self._context.set_tensor_address(name, value.data_ptr())
        for name, past, present in zip(self._caches, self._past, self._present, strict=True):
            shape = (batch_size, self._num_kv_heads, self._length, self._head_dim)
            self._context.set_input_shape("past_key_values." + name, shape)
            self._context.set_tensor_address("past_key_values." + name, past.data_ptr())
            self._context.set_tensor_address("present." + name, present.data_ptr())
        self._context.set_tensor_address("logits", logits.data_ptr())
        self._stream.wait_stream(torch.cuda.current_stream())  # the inputs are made on the default stream
        if not self._context.execute_async_v3(stream):
            raise failure(self._log.told(), batch_size, total)
        self._stream.synchronize()
        self._past, self._present = self._present, self._past
        self._length = total
        result: Logits = logits.cpu().numpy()
        return result


@contextmanager
def within_gpu_memory(what: str) -> Iterator[None]:
    """Says in words that `what` did not fit."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{what} must fit into the GPU's free memory; CUDA says: {str(error).partition('. ')[0]}. End what else "
            "uses the GPU, use smaller batches, or compile with a smaller max_length."
        ) from None


def failure(told: str, batch_size: int, total: int) -> Exception:
    """The error of a step that TensorRT did not run: a ValueError where the user can act."""
    if out_of_memory(told):
        return ValueError(
            f"{total} tokens of {batch_size} sequences need more memory than the GPU has free: {told}. End what else "
            "uses the GPU, or use smaller batches or shorter prompts."
        )
    return RuntimeError(f"TensorRT failed at {total} tokens of {batch_size} sequences: {told}.")
