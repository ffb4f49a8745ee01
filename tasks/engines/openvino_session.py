"""Sessions of the decoder that openvino_graph.py builds: with paged attention, as OpenVINO GenAI serves it.

GenAI rewrites the stateful graph of a bundle before it compiles it (openvinotoolkit/openvino.genai,
src/cpp/src/continuous_batching/): the KV cache becomes tensors of blocks that the caller owns, the tokens of all
sequences lie one after the other, and the LM head sees those whose logits are wanted. Sessions do the same, with the
same library's rewriting, so that what is measured is what is served. What cannot be rewritten runs as it lies in the
bundle, and `facts` say so.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.calibration.memory import dropping_pages
from tasks.engines.generation import Ids, Logits, check_prompt, check_step

MODEL_FILE = "openvino_model.xml"  # the name OpenVINO GenAI looks for; the weights lie beside it in the .bin
WEIGHTS_FILE = "openvino_model.bin"
_FACTS = (
    "INFERENCE_PRECISION_HINT",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "KEY_CACHE_PRECISION",
    "VALUE_CACHE_PRECISION",
    "INFERENCE_NUM_THREADS",
)
_KEY_CACHE, _SLIDING_WINDOW = 3, 10  # inputs of the operation PagedAttentionExtension


def open_session(bundle: Path, properties: dict[str, Any]) -> "OpenVinoSession":
    """A session of the graph in the directory `bundle`; the weights file is mapped, not read."""
    import openvino

    model, why_stateful = read_model(bundle)
    max_length = int(model.get_rt_info(["slimline", "max_length"]).astype(int))
    _see_wanted_only(model, paged=why_stateful is None)
    with dropping_pages(bundle / WEIGHTS_FILE):  # the plugin keeps copies of them in the order of its kernels
        compiled = openvino.Core().compile_model(model, "CPU", properties)
    facts = {name.lower(): describe_property(compiled.get_property(name)) for name in _FACTS}
    attention: _Attention = _Paged(compiled) if why_stateful is None else _Stateful(compiled)
    return OpenVinoSession(
        attention,
        facts=facts | {"attention": "paged" if why_stateful is None else f"stateful: {why_stateful}"},
        vocab_size=int(compiled.output("logits").partial_shape[2].get_length()),
        max_length=max_length,
    )


def read_model(bundle: Path) -> tuple[Any, str | None]:
    """The `openvino.Model` of a bundle with paged attention; or as it lies there, and why it was not rewritten."""
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": True})
    model = core.read_model(bundle / MODEL_FILE)
    why_stateful = _page(model)
    return (model, None) if why_stateful is None else (core.read_model(bundle / MODEL_FILE), why_stateful)


def _page(model: Any) -> str | None:
    """Rewrites a model in place; or says why it cannot be, and leaves it half rewritten."""
    from openvino._offline_transformations import paged_attention_transformation

    if not model.has_rt_info(["slimline", "windows"]):
        return "the bundle does not say how far its layers see; compile it again"
    windows = [int(window) for window in model.get_rt_info(["slimline", "windows"]).astype(str).split()]
    if not any(node.get_type_name() == "ScaledDotProductAttention" for node in model.get_ops()):
        return "its attention scores are capped, which paged attention cannot do"
    paged_attention_transformation(model)
    nodes = [node for node in model.get_ops() if node.get_type_name() == "PagedAttentionExtension"]
    nodes.sort(key=lambda node: int(node.input_value(_KEY_CACHE).get_any_name().rpartition(".")[2]))
    found = [_constant_or_none(node.input_value(_SLIDING_WINDOW).get_node()) != 0 for node in nodes]
    if found != [window > 0 for window in windows]:
        return f"this version of openvino finds {len(nodes)} of {len(windows)} layers, or not how far they see"
    return None


def _constant_or_none(node: Any) -> int | None:
    return int(node.data) if node.get_type_name() == "Constant" else None


def _see_wanted_only(model: Any, *, paged: bool) -> None:
    """Lets the LM head see only the positions whose logits are wanted, named by one more input, in place.

    The input is wanted_tokens [num_wanted] int64 of a paged model, num_logits [1] int64, of the last ones, of others.
    """
    from openvino import opset13 as ops

    name = "wanted_tokens" if paged else "num_logits"
    wanted = ops.parameter([-1] if paged else [1], np.int64, name=name)
    wanted.output(0).set_names({name})
    lm_head = next(node for node in model.get_ops() if node.get_friendly_name() == "lm_head")
    hidden = lm_head.input_value(0)
    if paged:
        seen = ops.gather(hidden, wanted, np.array(0))
    else:
        end = np.array([np.iinfo(np.int64).max])
        seen = ops.slice(hidden, ops.negative(wanted), end, np.array([1]), np.array([1]))
    lm_head.input(0).replace_source_output(seen.output(0))
    model.add_parameters([wanted])
    model.validate_nodes_and_infer_types()


class OpenVinoSession:
    """A compiled decoder and the KV cache of one batch of sequences."""

    def __init__(self, attention: "_Attention", *, facts: dict[str, str], vocab_size: int, max_length: int) -> None:
        self._attention: _Attention | None = attention
        self._facts = facts
        self._vocab_size = vocab_size
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
        """What the compiled graph says it uses, by the library's own names in lower case, and its attention."""
        return dict(self._facts)

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        """Starts new sequences: [batch, length] int64 -> [batch, num_logits, vocab_size] float32."""
        check_prompt(input_ids, num_logits, vocab_size=self._vocab_size, max_length=self._max_length)
        assert self._attention is not None, "The session is closed."
        self._attention.start(len(input_ids))
        self._batch_size, self._length = len(input_ids), 0
        return self._append(input_ids, num_logits)

    def decode(self, input_ids: Ids) -> Logits:
        """Appends one token to each sequence: [batch] int64 -> [batch, vocab_size] float32."""
        return self.append(input_ids[:, None])[:, 0]

    def append(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        """Logits [batch, num_logits, vocab_size] of the last of some more tokens, [batch, length], of each sequence."""
        last = self._length + input_ids.shape[1] - 1
        check_step(input_ids[:, -1], batch_size=self._batch_size, length=last, max_length=self._max_length)
        return self._append(input_ids, num_logits)

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens of each sequence, with paged attention.

        What is forgotten leaves a trace in a rounded KV cache: keys of a block share scales.
        """
        assert isinstance(self._attention, _Paged)
        assert 0 < length <= self._length
        self._length = length

    def profile(self) -> list[tuple[str, str, float]]:
        """(kind, implementation, microseconds) of every operator of the last call that ran."""
        assert self._attention is not None, "The session is closed."
        return [
            (info.node_type, info.exec_type, info.real_time.total_seconds() * 1e6)
            for info in self._attention.request.get_profiling_info()
            if info.status == info.Status.EXECUTED
        ]

    def close(self) -> None:
        """Frees the graph, its weights and the KV cache."""
        self._attention = None
        self._batch_size = 0

    def _append(self, input_ids: Ids, num_logits: int) -> Logits:
        assert self._attention is not None, "The session is closed."
        ids = np.ascontiguousarray(input_ids, dtype=np.int64)
        logits = self._attention.append(ids, self._length, num_logits)
        self._length += input_ids.shape[1]
        return logits


class _Attention(Protocol):
    """How a compiled decoder is asked, and where it keeps keys and values."""

    request: Any

    def start(self, batch_size: int) -> None:
        """Forgets all sequences."""

    def append(self, input_ids: Ids, start: int, num_logits: int) -> Logits:
        """Logits [batch, num_logits, vocab_size] of the last of `input_ids` [batch, length], from position `start`."""


class _Stateful:
    """The graph as it lies in the bundle: variables hold keys and values."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._batch_size = 0
        self.request = compiled.create_infer_request()

    def start(self, batch_size: int) -> None:
        if self._batch_size in (0, batch_size):
            self.request.reset_state()
        else:  # OpenVINO 2026.4 gives the scales of an 8-bit cache no more room for more sequences that are shorter
            self.request = self._compiled.create_infer_request()
        self._batch_size = batch_size

    def append(self, input_ids: Ids, start: int, num_logits: int) -> Logits:
        batch_size, end = len(input_ids), start + input_ids.shape[1]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": np.ones((batch_size, end), dtype=np.int64),
            "position_ids": np.tile(np.arange(start, end, dtype=np.int64), (batch_size, 1)),
            "beam_idx": np.arange(batch_size, dtype=np.int32),
            "num_logits": np.array([num_logits], dtype=np.int64),
        }
        outputs = self.request.infer(inputs, share_inputs=True, share_outputs=True)
        logits: Logits = np.array(outputs["logits"], dtype=np.float32)
        return logits


class _Paged:
    """The rewritten graph: keys and values lie in blocks, of which each sequence has a list.

    Block b holds consecutive tokens of one sequence in all layers. There are as many blocks as the longest batch so far
    needed, or twice as many as before where those did not suffice, as in GenAI.
    """

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self._inputs: dict[str, Any] = {}
        self._caches: dict[str, tuple[Any, list[int]]] = {}  # element type and shape of a block, by the input's name
        for port in compiled.inputs:
            name = port.get_any_name()
            if name.startswith(("key_cache.", "value_cache.")):
                shape = [dimension.get_length() for dimension in list(port.get_partial_shape())[1:]]
                self._caches[name] = port.get_element_type(), shape
            else:
                self._inputs[name] = self.request.get_tensor(name)
        # [num_kv_heads, tokens, head_dim]; a scale and a zero point lie beside a key's channel, in the row of a value.
        self._block_size = self._caches["value_cache.0"][1][1]
        self._num_blocks = 0
        self._blocks: NDArray[np.int32] = np.empty((0, 0), np.int32)  # [batch, blocks of each sequence]

    def start(self, batch_size: int) -> None:
        self._blocks = np.empty((batch_size, 0), np.int32)

    def append(self, input_ids: Ids, start: int, num_logits: int) -> Logits:
        batch_size, length = input_ids.shape
        end = start + length
        self._hold(end)
        firsts = np.arange(batch_size + 1)
        self._write("input_ids", input_ids.reshape(-1))
        self._write("position_ids", np.tile(np.arange(start, end), batch_size))
        self._write("past_lens", np.full(batch_size, start))
        self._write("subsequence_begins", firsts * length)
        self._write("block_indices", self._blocks.reshape(-1))
        self._write("block_indices_begins", firsts * self._blocks.shape[1])
        self._write("max_context_len", np.array(end))
        self._write("wanted_tokens", (firsts[1:, None] * length + np.arange(-num_logits, 0)).reshape(-1))
        self.request.infer()
        logits = np.array(self.request.get_tensor("logits").data, dtype=np.float32)
        return logits.reshape(batch_size, num_logits, -1)

    def _write(self, name: str, values: NDArray[np.int64] | NDArray[np.int32]) -> None:
        """Into the request's own tensor, as GenAI does; the plugin binds a new one anew with every step."""
        tensor = self._inputs[name]
        if tuple(tensor.shape) != values.shape:
            tensor.shape = values.shape
        tensor.data[...] = values

    def _hold(self, length: int) -> None:
        """Gives every sequence the blocks for `length` tokens."""
        batch_size, held = self._blocks.shape
        missing = -(-length // self._block_size) - held
        if missing <= 0:
            return
        first = self._blocks.size
        new = np.arange(first, first + batch_size * missing, dtype=np.int32).reshape(batch_size, missing)
        self._blocks = np.concatenate([self._blocks, new], axis=1)
        if self._blocks.size > self._num_blocks:
            self._allocate(max(self._blocks.size, 2 * self._num_blocks), kept=first)

    def _allocate(self, num_blocks: int, kept: int) -> None:
        """Replaces the caches by larger ones, with the first `kept` blocks copied."""
        import openvino

        for name, (element_type, shape) in self._caches.items():
            larger = openvino.Tensor(element_type, openvino.Shape([num_blocks, *shape]))
            if kept:
                start, end = openvino.Coordinate([0] * 4), openvino.Coordinate([kept, *shape])
                held = openvino.Tensor(self.request.get_tensor(name), start, end)
                held.copy_to(openvino.Tensor(larger, start, end))
            self.request.set_tensor(name, larger)
        self._num_blocks = num_blocks


def describe_property(value: Any) -> str:
    """A property's value as text, an element type by its short name."""
    return str(value.get_type_name()) if hasattr(value, "get_type_name") else str(value)
