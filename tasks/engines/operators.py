"""What an engine really runs for one token: its operators after all fusion, what they compute in, and their time.

Asked of the engine itself, on the bundle as it is served: ONNX Runtime's profiler and OpenVINO's performance counters.
Timing single operators costs time too, so the times here tell shares, not the speed; that is measured without.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from tasks.engines import Engine, OnnxRuntime, OpenVino
    from tasks.engines.generation import Ids, Session

Role = Literal["integer product", "float product", "weights to floats", "rounding", "attention", "other"]
NUM_STEPS = 8
"""Tokens whose operators are timed."""

# By ONNX Runtime's names of operators.
FLOAT_PRODUCTS = ("FusedMatMul", "MatMul", "Gemm", "FusedGemm")
INTEGER_PRODUCTS = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "QLinearMatMul", "QGemm")
SMALLEST_LAYER = 16
"""Inputs that a layer has at least; products with fewer combine scales."""
ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear", "DequantizeLinear", "FakeQuantize")


class OperatorGroup(BaseModel, frozen=True, extra="forbid"):
    """Operators of one kind that do the same sort of work."""

    kind: str = Field(description="By the engine's own name, with what it computes in where the engine says so.")
    role: Role
    num: int = Field(description="Per token.")
    elapsed_ms: float = Field(description="Of all of them per token, median over tokens; timing included.")


class Operators(BaseModel, frozen=True, extra="forbid"):
    """What is run for one token at batch size 1, the slowest kind first."""

    groups: tuple[OperatorGroup, ...]

    @property
    def num(self) -> int:
        """Operators per token."""
        return sum(group.num for group in self.groups)

    @property
    def elapsed_ms(self) -> float:
        """Of all operators per token."""
        return sum(group.elapsed_ms for group in self.groups)

    def count(self, *roles: Role) -> int:
        """Operators of these roles per token."""
        return sum(group.num for group in self.groups if group.role in roles)

    def share(self, *roles: Role) -> float:
        """Part of the operators' time that these roles take."""
        elapsed_ms = sum(group.elapsed_ms for group in self.groups if group.role in roles)
        return elapsed_ms / self.elapsed_ms if self.elapsed_ms else 0.0


def read_operators(bundle: Path, engine: "Engine", prompt: "Ids", *, threads: int) -> Operators | None:
    """What the engine of a decoder's bundle runs; None for engines that do not tell.

    Args:
        bundle: of `engine`.
        engine: its options as served.
        prompt: [1, length] int64 token ids that are read first.
        threads: of the engine.
    """
    if engine.engine == "onnxruntime":
        return _of_onnxruntime(bundle, engine, prompt, threads)
    if engine.engine == "openvino":
        return _of_openvino(bundle, engine, prompt, threads)
    return None


Event = tuple[str, Role, float]
"""(kind, role, microseconds) of one operator of one token."""


def _of_onnxruntime(bundle: Path, engine: "OnnxRuntime", prompt: "Ids", threads: int) -> Operators:
    with TemporaryDirectory() as folder:
        session = engine.load(bundle, threads=threads, profile=Path(folder) / "profile")
        _generate(session, prompt)
        events = json.loads(session.end_profile().read_text())
        session.close()
    rounds_inputs = engine.activations == "int8"
    nodes = [event for event in events if event.get("cat") == "Node" and "op_name" in event["args"]]
    runs = _split_runs(nodes)[-NUM_STEPS:]
    return _summarize([[_onnxruntime_event(event, rounds_inputs) for event in run] for run in runs])


def _split_runs(nodes: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Events of each call of the graph: a new one starts where the first node comes again."""
    runs: list[list[dict[str, Any]]] = []
    for node in nodes:
        if not runs or node["name"] == nodes[0]["name"]:
            runs.append([])
        runs[-1].append(node)
    return runs


def _onnxruntime_event(event: dict[str, Any], rounds_inputs: bool) -> Event:
    about = event["args"]
    kind = about["op_name"]
    role: Role = "other"
    if kind == "MatMulNBits":
        role = "integer product" if rounds_inputs else "float product"
    elif kind in INTEGER_PRODUCTS:
        role = "integer product"
    elif kind in FLOAT_PRODUCTS and _inner(about) >= SMALLEST_LAYER:
        role = "float product"
    elif kind == "DequantizeLinear" and int(about["activation_size"]) == 0:
        role = "weights to floats"  # all that it reads is constant
    elif kind in ROUNDING:
        role = "rounding"
    elif "Attention" in kind:
        role = "attention"
    return kind, role, float(event["dur"])


def _inner(about: dict[str, Any]) -> int:
    """Over how many values a product sums: the last dimension of what it reads first."""
    (shape,) = about["input_type_shape"][0].values()
    return int(shape[-1]) if shape else 1


def _of_openvino(bundle: Path, engine: "OpenVino", prompt: "Ids", threads: int) -> Operators:
    session = engine.load(bundle, threads=threads, profile=True)
    steps = _generate(session, prompt, session.profile)
    session.close()
    return _summarize([[_openvino_event(*each) for each in step] for step in steps])


def _openvino_event(kind: str, implementation: str, elapsed_us: float) -> Event:
    precision = implementation.rpartition("_")[2].lower()
    role: Role = "other"
    if kind.startswith("FullyConnected") or kind == "MatMul":
        role = "integer product" if precision in ("i8", "u8", "i4", "u4") else "float product"
    elif kind in ROUNDING:
        role = "rounding"
    elif "Attention" in kind:
        role = "attention"
    return f"{kind} ({implementation})", role, elapsed_us


def _generate(session: "Session", prompt: "Ids", after: Any = None) -> list[Any]:
    """Reads the prompt and NUM_STEPS tokens after it; what `after` gives after each of them."""
    found = []
    next_ids = session.prefill(prompt)[:, -1].argmax(axis=-1).astype(np.int64)
    for _ in range(NUM_STEPS):
        next_ids = session.decode(next_ids).argmax(axis=-1).astype(np.int64)
        found.append(after() if after else None)
    return found


def _summarize(steps: Iterable[Iterable[Event]]) -> Operators:
    """Medians over tokens of the time of each kind."""
    times: dict[tuple[str, Role], list[float]] = defaultdict(list)
    counts: dict[tuple[str, Role], int] = {}
    for step in steps:
        of_step: dict[tuple[str, Role], list[float]] = defaultdict(list)
        for kind, role, elapsed_us in step:
            of_step[kind, role].append(elapsed_us)
        for key, elapsed in of_step.items():
            times[key].append(sum(elapsed))
            counts[key] = len(elapsed)
    groups = [
        OperatorGroup(kind=kind, role=role, num=counts[kind, role], elapsed_ms=median(elapsed) / 1000)
        for (kind, role), elapsed in times.items()
    ]
    return Operators(groups=tuple(sorted(groups, key=lambda group: -group.elapsed_ms)))
