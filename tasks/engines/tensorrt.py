"""TensorRT: a serialized plan built from the portable ONNX graph, strongly typed, with a profile for each phase.

Precision is what the graph says: a strongly typed network has no builder flags for it. TensorRT takes symmetric
integers only; measured with TensorRT for RTX 1.7, it fuses 8-bit weights with one scale per channel and 4-bit weights
in blocks into the product, and unpacks 8-bit weights in groups before it.

TensorRT for RTX builds plans without a GPU. Its runtime, and all of enterprise TensorRT, need one, and end the process
(no exception) where there is none, so nothing of them is touched before the CUDA driver has answered.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html
"""

import ctypes
import importlib
import importlib.util
import logging
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from tasks.engines.decoder import Decoder, read_decoder
from tasks.engines.export import Precision, export_decoder
from tasks.engines.generation import Ids, Logits, check_prompt, check_step
from tasks.quantization import Activations, Grid
from tasks.quantization.activations import Format

logger = logging.getLogger(__name__)

PLAN_FILE = "model.plan"
PREFILL, DECODE = 0, 1  # the plan's optimization profiles
TYPICAL_PROMPT = 128  # what kernels are chosen for, within the profiles' bounds
Shape = tuple[int, ...]
EXTRAS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


class TensorRT(BaseModel, frozen=True, extra="forbid"):
    """TensorRT on an NVIDIA GPU; without one, a plan that is built and not run."""

    engine: Literal["tensorrt"] = "tensorrt"
    precision: Precision = Field(description="Of activations, KV cache, float weights and scales.")
    library: Literal["tensorrt_rtx", "tensorrt"] = Field(
        "tensorrt_rtx",
        description="TensorRT for RTX (GeForce and RTX GPUs; builds anywhere) or enterprise TensorRT (data centers).",
    )
    max_batch_size: int = Field(8, ge=1, description="Most sequences at once.")
    max_prompt: int = Field(1024, ge=1, description="Longest prompt; at most max_length.")
    max_length: int = Field(2048, ge=2, description="Longest sequence, prompt and new tokens; at most the model's own.")

    @model_validator(mode="after")
    def _prompt_fits(self) -> "TensorRT":
        if self.max_prompt > self.max_length:
            raise ValueError(f"max_prompt must be at most max_length, {self.max_length}; got {self.max_prompt}")
        return self

    @property
    def executable(self) -> bool:
        """Whether this machine can run the plan that `compile` builds."""
        return self.cannot_run() is None

    def cannot_run(self) -> str | None:
        """Why this machine cannot run the plan that `compile` builds; None if it can."""
        return self.missing() or _no_gpu(self.library)

    def missing(self) -> str | None:
        """Why this machine cannot compile for this engine, and what to do; None if it can."""
        absent = [name for name in ("onnx", self.library) if importlib.util.find_spec(name) is None]
        if absent:
            return (
                f"The engine 'tensorrt' needs {' and '.join(absent)}. "
                f"Install it: pip install 'slimline[{EXTRAS[self.library]}]'"
            )
        if self.library == "tensorrt" and compute_capability() is None:
            return (
                "Enterprise TensorRT needs an NVIDIA GPU even to build a plan; the CUDA driver reports none. "
                "Compile on a machine with one, or use library 'tensorrt_rtx'."
            )
        return None

    def cannot_hold(self, grid: Grid) -> str | None:
        """Why this engine cannot multiply with weights on `grid`; None if it can."""
        if not grid.symmetric:
            return "TensorRT takes no zero points; quantize with `symmetric: true` for it."
        if grid.full_range and grid.bits > 4:
            return (
                f"TensorRT takes 8-bit integers, which hold {grid.bits} bits too, with positive scales only; "
                "drop `full_range`."
            )
        return None

    def cannot_round(self, activations: Activations | None, kv_cache: Format | None) -> str | None:
        """Why this engine cannot round inputs, or the KV cache, like this; None if it can."""
        if kv_cache:
            return "The portable ONNX graph keeps a float KV cache. Leave `kv_cache` out for TensorRT."
        if activations and not activations.symmetric:
            return "TensorRT takes no zero points, those of inputs neither; set `symmetric: true` in `activations`."
        if activations and "*" not in activations.static:
            return (
                "TensorRT's Q/DQ has no scale per token. Set `static: [\"*\"]` in `activations`, so that every layer's "
                "inputs have one calibrated scale, and `ignore` those that should stay float."
            )
        return None

    def compile(self, checkpoint: Path, out: Path) -> tuple[str, ...]:
        """Writes the plan into `out`.

        Returns:
            What a user of the bundle should know: nothing.

        Raises:
            ValueError: the library is missing, the checkpoint has integers with zero points, or TensorRT refuses the
                graph; the message names the node.
        """
        if problem := self.missing():
            raise ValueError(problem)
        decoder = read_decoder(checkpoint)
        _refuse_strange_integers(decoder)
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            graph = Path(scratch) / "model.onnx"
            export_decoder(decoder, graph, precision=self.precision, max_length=self.max_length)
            plan = build_plan(graph, decoder, self)
        (out / PLAN_FILE).write_bytes(plan)
        return ()

    def load(self, bundle: Path, *, threads: int) -> "TensorRTSession":
        """A session on the first GPU; `threads` is for engines on the CPU and is not used.

        Raises:
            ValueError: there is no GPU here that the library's runtime supports.
        """
        if problem := self.cannot_run():
            raise ValueError(problem)
        return TensorRTSession(bundle, library=self.library)


@cache
def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of the first GPU, from the CUDA driver alone; None without a driver or a GPU."""
    major_attribute, minor_attribute = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    found = (  # every call returns 0 for success
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, device) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, device) == 0
    )
    return (major.value, minor.value) if found else None


def _no_gpu(library: str) -> str | None:
    """Why a plan of this library has no GPU to run on here; None if it has."""
    capability = compute_capability()
    if capability is None:
        return (
            "Running a TensorRT plan needs an NVIDIA GPU; the CUDA driver reports none. Run it on a machine with one."
        )
    if library == "tensorrt_rtx" and not (capability in ((7, 5), (8, 0), (8, 6), (8, 9)) or capability[0] == 12):
        return (
            "TensorRT for RTX runs on compute capabilities 7.5, 8.0, 8.6, 8.9 and 12.x; "
            f"this GPU has {capability[0]}.{capability[1]}. Use library 'tensorrt'."
        )
    import torch

    if not torch.cuda.is_available():
        return "TensorRT's buffers are torch tensors on the GPU; this torch has no CUDA. Install a CUDA build of torch."
    return None


def _refuse_strange_integers(decoder: Decoder) -> None:
    for name, weight in decoder.quantized():
        if weight.zero_point is not None:
            raise ValueError(
                f"TensorRT takes float checkpoints and symmetric integers (int8 or int4, zero point 0); {name} is "
                "asymmetric. Quantize with `symmetric: true` for this engine."
            )
        if weight.bits > 4 and weight.scale.min() < 0:
            raise ValueError(
                f"TensorRT takes 8-bit integers with positive scales only; {name} has scales down to "
                f"{weight.scale.min():.4g}, as `full_range` and GGUF's Q5_0 have. Quantize without either."
            )
        if weight.inputs and (weight.inputs.scale is None or weight.inputs.zero_point):
            raise ValueError(
                f"TensorRT takes static scales of inputs without zero points; those of {name} are "
                f"{'per token' if weight.inputs.scale is None else 'asymmetric'}. Quantize with symmetric static ones."
            )
    if decoder.cache:
        raise ValueError(
            f"The portable ONNX graph keeps a float KV cache; this one is {decoder.cache.format}. Quantize without "
            "`kv_cache` for this engine."
        )


def build_plan(graph: Path, decoder: Decoder, options: TensorRT) -> bytes:
    """A serialized plan of the portable graph for `decoder`, with a prefill and a decode profile.

    Raises:
        ValueError: the parser or the builder refuses the graph.
    """
    tensorrt: Any = importlib.import_module(options.library)
    log = _listener(tensorrt)
    builder = tensorrt.Builder(log)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise ValueError(_refusal([parser.get_error(index) for index in range(parser.num_errors)]))
    config = builder.create_builder_config()
    for profile in _profiles(decoder, options):
        shapes = builder.create_optimization_profile()
        for name, (smallest, typical, largest) in profile.items():
            shapes.set_shape(name, smallest, typical, largest)
        if config.add_optimization_profile(shapes) < 0:
            raise ValueError(f"TensorRT refuses the profile {profile}: {log.told()}. Choose other maxima.")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"TensorRT parses the graph but cannot build a plan from it: {log.told()}.")
    return bytes(plan)


def _profiles(decoder: Decoder, options: TensorRT) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
    """Smallest, typical and largest shape of every input, for prefill (no past) and decode (one token)."""
    max_length = min(options.max_length, decoder.max_position_embeddings)
    max_prompt = min(options.max_prompt, max_length)
    typical = min(TYPICAL_PROMPT, max_prompt)
    batches = (1, 1, options.max_batch_size)
    bounds = {  # (length, past, num_logits)
        PREFILL: ((1, 0, 1), (typical, 0, 1), (max_prompt, 0, max_prompt)),
        DECODE: ((1, 1, 1), (1, min(2 * typical, max_length - 1), 1), (1, max_length - 1, 1)),
    }
    profiles = []
    for phase in (PREFILL, DECODE):
        sizes = [_input_shapes(decoder, batch, *bound) for batch, bound in zip(batches, bounds[phase], strict=True)]
        profiles.append({name: (sizes[0][name], sizes[1][name], sizes[2][name]) for name in sizes[0]})
    return profiles


def _input_shapes(decoder: Decoder, batch: int, length: int, past: int, num_logits: int) -> dict[str, Shape]:
    cache = (batch, decoder.num_kv_heads, past, decoder.head_dim)
    return {
        "input_ids": (batch, length),
        "attention_mask": (batch, past + length),
        "position_ids": (batch, length),
        "logit_indices": (num_logits,),
        **{
            f"past_key_values.{index}.{half}": cache
            for index in range(len(decoder.layers))
            for half in ("key", "value")
        },
    }


def _refusal(errors: list[Any]) -> str:
    """The parser's errors, node by node."""
    shown = [f"{e.node_operator()} {e.node_name()!r}: {e.desc().strip()}" for e in errors[:5]]
    more = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
    return f"TensorRT cannot read {len(errors)} node(s) of the graph{more}: {'; '.join(shown)}"


def _listener(tensorrt: Any) -> Any:
    """A TensorRT logger that hands messages to `logging` and keeps the errors."""

    class Listener(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= tensorrt.ILogger.Severity.ERROR:
                self.errors.append(message.strip())
                logger.error("%s", message.strip())
            elif severity == tensorrt.ILogger.Severity.WARNING:
                logger.debug("%s", message.strip())

        def told(self) -> str:
            return "; ".join(self.errors[-3:]) or "it gives no reason"

    return Listener()


class TensorRTSession:
    """A decoder with its KV cache on the GPU, see `generation.Session`.

    A step reads the cache from one set of buffers and writes it, one position longer, into the other.
    """

    def __init__(self, bundle: Path, *, library: str) -> None:
        torch: Any = importlib.import_module("torch")  # untyped where it is used here
        tensorrt: Any = importlib.import_module(library)
        log = _listener(tensorrt)
        self._torch = torch
        self._runtime = tensorrt.Runtime(log)  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine((bundle / PLAN_FILE).read_bytes())
        if self._engine is None:
            raise ValueError(
                f"This TensorRT cannot read {bundle / PLAN_FILE}: {log.told()}. "
                "Compile it again with the version of TensorRT, and for the GPU, that are to run it."
            )
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        self._profile: int | None = None
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._caches = [name.removeprefix("present.") for name in names if name.startswith("present.")]
        past = "past_key_values." + self._caches[0]
        self._max_batch, self._num_kv_heads, longest_past, self._head_dim = self._engine.get_tensor_profile_shape(
            past, DECODE
        )[2]
        half = self._engine.get_tensor_dtype(past) == tensorrt.DataType.HALF
        self._dtype = torch.float16 if half else torch.float32
        self._max_prompt = self._engine.get_tensor_profile_shape("input_ids", PREFILL)[2][1]
        self.max_length = int(longest_past) + 1
        self.vocab_size = int(self._engine.get_tensor_shape("logits")[2])
        self.facts = {
            "device": str(torch.cuda.get_device_name()),
            "kv_cache": str(self._engine.get_tensor_dtype(past)).rpartition(".")[2],
            "layers": str(self._engine.num_layers),
            "tensorrt": str(tensorrt.__version__),
        }
        self._past: list[Any] = []  # flat tensors with room for [batch, num_kv_heads, max_length, head_dim]
        self._present: list[Any] = []
        self._batch_size = 0
        self._length = 0

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        """Logits [batch, num_logits, vocab_size] of the last positions of new sequences."""
        check_prompt(input_ids, num_logits, vocab_size=self.vocab_size, max_length=self.max_length)
        batch_size, length = input_ids.shape
        if batch_size > self._max_batch or length > self._max_prompt:
            raise ValueError(
                f"This plan reads at most {self._max_batch} prompts of at most {self._max_prompt} tokens; got "
                f"{batch_size} of {length}. Compile it with a larger max_batch_size or max_prompt."
            )
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
        """Frees plan and cache."""
        self._past, self._present, self._batch_size, self._length = [], [], 0, 0
        self._context = self._engine = self._runtime = None

    def _allocate(self, batch_size: int) -> None:
        size = batch_size * self._num_kv_heads * self.max_length * self._head_dim
        self._past, self._present = (
            [self._torch.empty(size, dtype=self._dtype, device="cuda") for _ in self._caches] for _ in range(2)
        )
        self._batch_size = batch_size

    def _run(self, profile: int, input_ids: Ids, num_logits: int) -> Logits:
        torch, stream = self._torch, self._stream.cuda_stream
        batch_size, length = input_ids.shape
        total = self._length + length
        if profile != self._profile:
            self._context.set_optimization_profile_async(profile, stream)
            self._profile = profile
        logits = torch.empty((batch_size, num_logits, self.vocab_size), dtype=torch.float32, device="cuda")
        positions = torch.arange(self._length, total, device="cuda")
        feeds = {
            "input_ids": torch.from_numpy(np.ascontiguousarray(input_ids)).cuda(),
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
            raise RuntimeError(f"TensorRT failed at {total} tokens of {batch_size} sequences.")
        self._stream.synchronize()
        self._past, self._present = self._present, self._past
        self._length = total
        result: Logits = logits.cpu().numpy()
        return result
