"""OpenVINO on the CPU: its options, and sessions of the graph that openvino_graph.py builds."""

import importlib.util
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from tasks.engines.decoder import read_decoder
from tasks.engines.genai_files import write_openvino_tokenizer
from tasks.engines.generation import Ids, Logits, check_prompt, check_step
from tasks.engines.openvino_graph import build_model
from tasks.quantization import Activations, Grid
from tasks.quantization.activations import Format

MODEL_FILE = "openvino_model.xml"  # the name OpenVINO GenAI looks for; the weights lie beside it in the .bin


class OpenVino(BaseModel, frozen=True, extra="forbid"):
    """OpenVINO's CPU plugin."""

    engine: Literal["openvino"] = "openvino"
    precision: Literal["float32", "bfloat16"] = Field(
        description="Of everything that is not a quantized weight's product."
    )
    activations: Literal["int8", "float32"] = Field(
        "int8",
        description="What a quantized weight is multiplied with: the inputs rounded to 8 bits in groups of 32 as they "
        "come (fast), or as they are (exact, slow). Float weights are not affected.",
    )
    kv_cache: Literal["uint8", "float16", "float32"] = Field("uint8", description="How keys and values are kept.")

    @property
    def executable(self) -> bool:
        """Whether what `compile` writes runs on this machine."""
        return self.missing() is None

    def cannot_run(self) -> str | None:
        """Why this machine cannot run what `compile` builds; None if it can."""
        return self.missing()

    def cannot_load(self, bundle: Path) -> str | None:
        """Why this machine cannot run the bundle; None if it can."""
        return self.cannot_run()

    def missing(self) -> str | None:
        """What this machine lacks to compile and run it; None if nothing."""
        if importlib.util.find_spec("openvino") is None:
            return "The engine 'openvino' needs openvino. Install it: pip install 'slimline[openvino]'"
        return None

    def cannot_hold(self, grid: Grid) -> str | None:
        """Why this engine cannot multiply with weights on `grid`; None: it takes all integers."""
        if grid.format == "float8_e4m3":
            return "OpenVINO's CPU plugin has no FP8 products. Use integers, or the engine 'tensorrt'."
        return None

    def cannot_round(self, activations: Activations | None, kv_cache: Format | None) -> str | None:
        """Why this engine cannot round inputs, or the KV cache, like this; None if it can."""
        if activations:
            return (
                "OpenVINO rounds the inputs of weight-only layers itself, by groups of 32 as they come (its option "
                "`activations`), and does not take a checkpoint's scales. Leave `activations` of the quantization out, "
                "or use the engine 'onnxruntime'."
            )
        if kv_cache:
            return (
                "OpenVINO quantizes its KV cache itself (its option `kv_cache: uint8`) and takes no calibrated scales. "
                "Leave `kv_cache` of the quantization out."
            )
        return None

    def compile(self, checkpoint: Path, out: Path) -> tuple[str, ...]:
        """Writes the graph of a checkpoint, its weights and OpenVINO GenAI's files into the directory `out`.

        The same checkpoint and options give the same bytes. The graph names the precision of the KV cache and how
        inputs are rounded, so that they hold in OpenVINO GenAI too; the rest of the options apply when it is loaded.

        Returns:
            What a user of the bundle should know: why it cannot be loaded by OpenVINO GenAI, if so.

        Raises:
            ValueError: the checkpoint's family is not one that `read_decoder` knows.
        """
        import openvino

        model = build_model(read_decoder(checkpoint))
        for name, value in self._runtime_options().items():
            model.set_rt_info(value, ["runtime_options", name])
        openvino.save_model(model, out / MODEL_FILE, compress_to_fp16=False)
        problem = write_openvino_tokenizer(checkpoint, out)
        return (problem,) if problem else ()

    def load(self, bundle: Path, *, threads: int, profile: bool = False) -> "OpenVinoSession":
        """A session of the graph in the directory `bundle`; the weights file is mapped, not read.

        With `profile`, it times every operator, see `OpenVinoSession.profile`.
        """
        import openvino

        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": True})
        model = core.read_model(bundle / MODEL_FILE)
        max_length = int(model.get_rt_info(["slimline", "max_length"]).astype(int))
        _slice_before_lm_head(model)
        properties = self.properties(threads) | {"NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        properties |= {"PERF_COUNT": True} if profile else {}
        return OpenVinoSession(core.compile_model(model, "CPU", properties), max_length=max_length)

    def properties(self, threads: int) -> dict[str, Any]:
        """The CPU plugin's properties for these options."""
        return cpu_properties(self.precision, self.activations, threads) | self._runtime_options()

    def _runtime_options(self) -> dict[str, Any]:
        return {
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": _group_size(self.activations),
            "KV_CACHE_PRECISION": _ELEMENT_TYPES[self.kv_cache],
        }


_ELEMENT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8"}


class OpenVinoSession:
    """A compiled decoder and the KV cache of one batch of sequences."""

    def __init__(self, compiled: Any, *, max_length: int) -> None:
        self._request = compiled.create_infer_request()
        self._facts = {
            name.lower(): describe_property(compiled.get_property(name))
            for name in (
                "INFERENCE_PRECISION_HINT",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE",
                "KEY_CACHE_PRECISION",
                "VALUE_CACHE_PRECISION",
                "INFERENCE_NUM_THREADS",
            )
        }
        self._vocab_size = int(compiled.output("logits").partial_shape[2].get_length())
        self._max_length = max_length
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
        """What the compiled graph says it uses, by the library's own names in lower case."""
        return dict(self._facts)

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        """Starts new sequences: [batch, length] int64 -> [batch, num_logits, vocab_size] float32."""
        check_prompt(input_ids, num_logits, vocab_size=self._vocab_size, max_length=self._max_length)
        self._request.reset_state()
        self._batch_size, self._length = len(input_ids), 0
        return self._append(input_ids, num_logits)

    def decode(self, input_ids: Ids) -> Logits:
        """Appends one token to each sequence: [batch] int64 -> [batch, vocab_size] float32."""
        check_step(input_ids, batch_size=self._batch_size, length=self._length, max_length=self._max_length)
        return self._append(input_ids[:, None], 1)[:, 0]

    def profile(self) -> list[tuple[str, str, float]]:
        """(kind, implementation, microseconds) of every operator of the last call that ran."""
        return [
            (info.node_type, info.exec_type, info.real_time.total_seconds() * 1e6)
            for info in self._request.get_profiling_info()
            if info.status == info.Status.EXECUTED
        ]

    def close(self) -> None:
        """Frees the graph, its weights and the KV cache."""
        self._request = None
        self._batch_size = 0

    def _append(self, input_ids: Ids, num_logits: int) -> Logits:
        batch_size, length = input_ids.shape
        start, end = self._length, self._length + length
        outputs = self._request.infer(
            {
                "input_ids": np.ascontiguousarray(input_ids, dtype=np.int64),
                "attention_mask": np.ones((batch_size, end), dtype=np.int64),
                "position_ids": np.tile(np.arange(start, end, dtype=np.int64), (batch_size, 1)),
                "beam_idx": np.arange(batch_size, dtype=np.int32),
                "num_logits": np.array([num_logits], dtype=np.int64),
            },
            share_inputs=True,
            share_outputs=True,
        )
        self._length = end
        logits: Logits = np.array(outputs["logits"], dtype=np.float32)
        return logits


def _slice_before_lm_head(model: Any) -> None:
    """Adds the input num_logits [1] int64 and lets the LM head see the last `num_logits` positions only, in place."""
    from openvino import opset13 as ops

    num_logits = ops.parameter([1], np.int64, name="num_logits")
    num_logits.output(0).set_names({"num_logits"})
    lm_head = model.output("logits").get_node().input_value(0).get_node()
    start, stop = ops.negative(num_logits), np.array([np.iinfo(np.int64).max])
    last = ops.slice(lm_head.input_value(0), start, stop, np.array([1]), np.array([1]))
    lm_head.input(0).replace_source_output(last.output(0))
    model.add_parameters([num_logits])
    model.validate_nodes_and_infer_types()


def cpu_properties(
    precision: Literal["float32", "bfloat16"], activations: Literal["int8", "float32"], threads: int
) -> dict[str, Any]:
    """The CPU plugin's properties for any graph."""
    return {
        "INFERENCE_PRECISION_HINT": _ELEMENT_TYPES[precision],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _group_size(activations),
        "INFERENCE_NUM_THREADS": threads,
        # Two processes that both pin would share a core and leave another idle.
        "ENABLE_CPU_PINNING": False,
    }


def _group_size(activations: Literal["int8", "float32"]) -> int:
    """Inputs that share a scale when they are rounded; 0: they are not."""
    return 32 if activations == "int8" else 0


def describe_property(value: Any) -> str:
    """A property's value as text, an element type by its short name."""
    return str(value.get_type_name()) if hasattr(value, "get_type_name") else str(value)
