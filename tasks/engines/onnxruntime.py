"""ONNX Runtime on the CPU: its options, and sessions of the graph that onnxruntime_graph.py builds."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from tasks.engines.decoder import read_decoder
from tasks.engines.genai_files import write_genai_config
from tasks.engines.generation import Ids, Logits, check_prompt, check_step
from tasks.engines.onnxruntime_graph import BLOCK_SIZES, GRAPH_FILE, build_graph
from tasks.engines.processor import cpuinfo
from tasks.quantization import Activations, Grid
from tasks.quantization.activations import Format

SPIN_US = "20"  # how long an idle thread waits awake: long enough between operators, short where a core is shared
PAST = "past_key_values."
MOST_KEPT = 17  # tokens of a step that is bound once: one, or one and what was proposed to follow it
CACHE_STEP = 256  # tokens by which the KV cache's room is rounded up


class OnnxRuntime(BaseModel, frozen=True, extra="forbid"):
    """ONNX Runtime's CPU provider."""

    engine: Literal["onnxruntime"] = "onnxruntime"
    precision: Literal["float32"] = Field(description="Of everything that is not a quantized weight's product.")
    activations: Literal["int8", "float32"] = Field(
        "int8",
        description="What a quantized weight is multiplied with. int8: integers made from the inputs as they come, for "
        "weights in groups one of 8 bits per input with a scale per block, for 8-bit weights per channel two (16 bits; "
        "of encoders one) with a scale per position. float32: the inputs as they are, exact and slow. Float weights "
        "are not affected, nor are layers whose inputs the checkpoint itself rounds (W8A8), computed as it says.",
    )
    graph_optimization: Literal["all", "extended", "basic"] = Field(
        "all", description="How far ONNX Runtime rewrites the graph when it is loaded: its own levels."
    )
    max_length: int = Field(8192, ge=1, description="Longest sequence, prompt and new tokens; at most the model's own.")

    @property
    def executable(self) -> bool:
        """Whether this machine can run what `compile` builds."""
        return self.missing() is None

    def cannot_run(self) -> str | None:
        """Why this machine cannot run what `compile` builds; None if it can."""
        return self.missing()

    def cannot_load(self, bundle: Path) -> str | None:
        """Why this machine cannot run the bundle; None if it can."""
        return self.cannot_run()

    def missing(self) -> str | None:
        """Why this machine cannot compile for this engine, and what to do; None if it can."""
        absent = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if not absent:
            return None
        return f"The engine 'onnxruntime' needs {' and '.join(absent)}. Install: pip install 'slimline[onnxruntime]'"

    def cannot_hold(self, grid: Grid) -> str | None:
        """Why this engine cannot multiply with weights on `grid`; None if it can."""
        if grid.format == "float8_e4m3":
            return "ONNX Runtime's CPU provider has no FP8 products. Use integers, or the engine 'tensorrt'."
        if grid.group_size is None or grid.group_size % min(BLOCK_SIZES) == 0:
            return None
        return f"ONNX Runtime needs quantization groups divisible by 16; got {grid.group_size}. Change group_size."

    def cannot_round(self, activations: Activations | None, kv_cache: Format | None) -> str | None:
        """Why this engine cannot round inputs, or the KV cache, like this; None if it can."""
        if kv_cache == "float8_e4m3":
            return "ONNX Runtime's CPU provider keeps no FP8 KV cache. Use `kv_cache: int8`, or leave it out."
        return None  # FP8 inputs come with FP8 weights

    def compile(self, checkpoint: Path, out: Path) -> tuple[str, ...]:
        """Writes the graph, its weights (integers as the checkpoint's) and ONNX Runtime GenAI's file into `out`.

        Returns:
            What a user of the bundle should know: nothing.
        """
        decoder = read_decoder(checkpoint)
        max_length = min(self.max_length, decoder.max_position_embeddings)
        build_graph(decoder, out, activations=self.activations, max_length=max_length)
        write_genai_config(checkpoint, decoder, out, graph=GRAPH_FILE, max_length=max_length)
        return ()

    def load(self, bundle: Path, *, threads: int, profile: Path | None = None) -> "OnnxRuntimeSession":
        """A session on `threads` threads; with `profile`, it times every operator, see `end_profile`."""
        level = self.graph_optimization
        return OnnxRuntimeSession(bundle, threads=threads, graph_optimization=level, profile=profile)


class OnnxRuntimeSession:
    """A decoder with its KV cache, see `generation.Session`.

    The cache is one buffer per layer and kind, bound as past and as present, so that a step writes one
    position and copies nothing. Its room starts a little above the prompt and doubles when it is full: the operators'
    scratch memory grows with the room, not with what is used of it.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        threads: int,
        graph_optimization: Literal["all", "extended", "basic"] = "all",
        profile: Path | None = None,
    ) -> None:
        import onnxruntime

        settings = session_options(threads)
        if profile:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(profile)
        settings.graph_optimization_level = getattr(
            onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{graph_optimization.upper()}"
        )
        self._onnxruntime = onnxruntime
        self._session = onnxruntime.InferenceSession(
            str(bundle / GRAPH_FILE), settings, providers=["CPUExecutionProvider"]
        )
        caches = [value for value in self._session.get_inputs() if value.name.startswith(PAST)]
        self._caches = [value.name.removeprefix(PAST) for value in caches]
        _, self._num_kv_heads, _, self._head_dim = caches[0].shape
        self.vocab_size = int(self._session.get_outputs()[0].shape[2])
        self.max_length = int(self._session.get_modelmeta().custom_metadata_map["max_length"])
        self.facts = {
            "provider": ", ".join(self._session.get_providers()),
            "threads": str(threads),
            **self._session.get_modelmeta().custom_metadata_map,
        }
        self._cache_dtype = np.dtype(self.facts["kv_cache"])
        self._buffers: list[NDArray[Any]] = []  # [batch, num_kv_heads, room, head_dim], in the order of _caches
        self._length = 0
        self._steps: dict[tuple[int, int], _Step] = {}  # by length and number of logits

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        """Logits [batch, num_logits, vocab_size] of the last positions of new sequences."""
        check_prompt(input_ids, num_logits, vocab_size=self.vocab_size, max_length=self.max_length)
        batch_size, length = input_ids.shape
        room = self._buffers[0].shape[2] if self._buffers else 0
        if not self._buffers or len(self._buffers[0]) != batch_size or not length < room <= 4 * _room(length + 1):
            self._allocate(batch_size, _room(length + 1))
        step = self._bind(batch_size, length, num_logits)
        self._length = 0
        return self._run(step, input_ids)

    def decode(self, input_ids: Ids) -> Logits:
        """Logits [batch, vocab_size] after one more token of each sequence."""
        return self.append(input_ids[:, None])[:, 0]

    def append(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        """Logits [batch, num_logits, vocab_size] of the last of some more tokens, [batch, length].

        More than one token at a time is for one sequence alone: GroupQueryAttention of ONNX Runtime 1.31 asks for it.
        """
        batch_size = len(self._buffers[0]) if self._buffers and self._length else 0
        end = self._length + input_ids.shape[1]
        check_step(input_ids[:, -1], batch_size=batch_size, length=end - 1, max_length=self.max_length)
        if end > self._buffers[0].shape[2]:
            full = self._buffers
            self._allocate(batch_size, min(max(2 * self._length, _room(end)), self.max_length))
            for buffer, old in zip(self._buffers, full, strict=True):
                buffer[:, :, : self._length] = old[:, :, : self._length]
        shape = input_ids.shape[1], num_logits
        step = self._steps.get(shape) or self._bind(batch_size, *shape)
        if input_ids.shape[1] <= MOST_KEPT:
            self._steps[shape] = step
        return self._run(step, input_ids)

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens of each sequence."""
        assert 0 < length <= self._length
        self._length = length

    def end_profile(self) -> Path:
        """The file of operators and their times, Chrome's trace format; of a session that was loaded with `profile`."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Frees weights and cache."""
        self._buffers, self._steps = [], {}
        self._session = None

    def _allocate(self, batch_size: int, room: int) -> None:
        shape = (batch_size, self._num_kv_heads, min(room, self.max_length), self._head_dim)
        self._buffers = [np.zeros(shape, dtype=self._cache_dtype) for _ in self._caches]
        self._steps = {}

    def _bind(self, batch_size: int, length: int, num_logits: int) -> "_Step":
        """A call of the graph with every input and output in memory that stays where it is."""
        value = self._onnxruntime.OrtValue.ortvalue_from_numpy  # shares the array's memory on the CPU
        step = _Step(
            binding=self._session.io_binding(),
            input_ids=np.zeros((batch_size, length), dtype=np.int64),
            mask=np.ones(batch_size * self._buffers[0].shape[2], dtype=np.int64),
            num_logits=np.array([num_logits]),
            logits=np.zeros((batch_size, num_logits, self.vocab_size), dtype=np.float32),
        )
        step.binding.bind_ortvalue_input("input_ids", value(step.input_ids))
        step.binding.bind_ortvalue_input("num_logits", value(step.num_logits))
        step.binding.bind_ortvalue_output("logits", value(step.logits))
        for name, buffer in zip(self._caches, self._buffers, strict=True):
            shared = value(buffer)
            step.binding.bind_ortvalue_input(PAST + name, shared)
            step.binding.bind_ortvalue_output("present." + name, shared)
        return step

    def _run(self, step: "_Step", input_ids: Ids) -> Logits:
        batch_size, length = input_ids.shape
        total = self._length + length
        step.input_ids[...] = input_ids
        mask = step.mask[: batch_size * total].reshape(batch_size, total)
        step.binding.bind_ortvalue_input("attention_mask", self._onnxruntime.OrtValue.ortvalue_from_numpy(mask))
        self._session.run_with_iobinding(step.binding)
        self._length = total
        return step.logits.copy()


@dataclass
class _Step:
    """One binding and the arrays it reads and writes."""

    binding: Any
    input_ids: Ids  # [batch, length]
    mask: Ids  # ones, as many as batch * total can be: no sequence is padded
    num_logits: Ids  # [1]
    logits: Logits  # [batch, num_logits, vocab_size]


def session_options(threads: int) -> Any:
    """What every session of ONNX Runtime is made with, `onnxruntime.SessionOptions`."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    if not _has_vnni():  # there, fast products of unsigned and signed bytes overflow; with it this only slows down
        settings.add_session_config_entry("session.x64quantprecision", "1")
    return settings


def _has_vnni() -> bool:
    """Whether the processor sums byte products in 32 bits; an unknown one (not x86 Linux) is taken to."""
    flags = cpuinfo().get("flags", "")
    return "vnni" in flags or "avx" not in flags


def _room(length: int) -> int:
    return -(-length // CACHE_STEP) * CACHE_STEP
