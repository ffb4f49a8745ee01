"""Why a candidate is slower, or worse, than it should be: facts asked of its engine and its weights, and words.

`examine` collects facts, in a process of its own: what the engine runs for a token, how far each block's outputs are
from the original's. `explain` says what they mean, without running anything.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, Field

from tasks.calibration.architectures import ARCHITECTURES
from tasks.calibration.exported_families import kind_at, kind_of
from tasks.calibration.progress import Report, silent
from tasks.engines.operators import Operators, read_operators
from tasks.engines.processor import cpuinfo
from tasks.validation.machine import Machine

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.engines.generation import Ids

Kind = Literal[
    "restored weights",
    "float products",
    "missing instructions",
    "memory-bound",
    "compute-bound",
    "too small",
    "operators",
    "layers",
    "structure",
]
Complaint = Literal["slower", "worse", "slower and worse"]

NUM_WINDOWS = 2
MAX_LENGTH = 128
PROMPT_TOKENS = 32
BOUND = 0.6
"""Part of the time that the machine needs at best, above which the machine is what limits."""
SMALL = 0.35
"""Part below which reading fewer bytes cannot gain much."""
STANDS_OUT = 1.5
"""A block's error this many times the median is named; below it, the error is spread evenly."""
WEIGHT_FILES = ("*.weights", "openvino_*model.bin", "*.onnx", "*.onnx.data", "*.engine", "*.plan")
VECTOR_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")


class LayerError(BaseModel, frozen=True, extra="forbid"):
    """How far a block's outputs are from the original's, as parts of the norm of what the block adds."""

    name: str
    whole: float
    attention: float = Field(description="With the candidate's weights in the attention and the norm before it only.")
    feed_forward: float = Field(description="With those of the rest only.")
    accumulated: float = Field(description="Of hidden states after it, all blocks before being the candidate's.")


class Facts(BaseModel, frozen=True, extra="forbid"):
    """What was found out about one candidate in one engine."""

    engine: str
    rounds_inputs: bool = Field(description="Whether the engine was asked to multiply in integers.")
    operators: Operators | None = Field(description="None: the engine does not tell, or it was not asked.")
    weight_bytes: int = Field(description="Of the graph and its weights, read once per token.")
    num_weights: int | None = Field(description="That a token is multiplied with; None: not known.")
    layers: tuple[LayerError, ...] = ()
    why_no_layers: str = ""
    num_layers: int | None = None
    original_num_layers: int | None = None
    instructions: tuple[str, ...] = Field(description="Those of the processor that decide how fast integers multiply.")
    processor: str


class Speeds(BaseModel, frozen=True, extra="forbid"):
    """What was measured, as far as an explanation needs it."""

    tpot_ms: float
    ttft_ms: float
    prompt_tokens: int
    machine: Machine | None = Field(description="What it can do at best; None: not known.")


class Finding(BaseModel, frozen=True, extra="forbid"):
    """One reason, in words."""

    kind: Kind
    sentence: str


class Diagnosis(BaseModel, frozen=True, extra="forbid"):
    """Why a candidate is slower or worse: the most telling reason first."""

    of: Complaint
    findings: tuple[Finding, ...]
    facts: Facts


def examine(
    *,
    bundle: Path,
    checkpoint: Path | None,
    original: Path | None,
    data: Path,
    threads: int,
    out: Path,
    report: Report = silent,
) -> Facts:
    """The facts about an engine bundle.

    Writes facts.json.

    Args:
        bundle: of any model; what an encoder or encoder-decoder runs is not looked at.
        checkpoint: what it was compiled from; None: not known, so its layers are not compared.
        original: the checkpoint to compare layers with; None where the original is a bundle too.
        data: prepared tokens; the first evaluation windows are read.
        threads: of the engine, unless it was tuned here: then it has those that were found, as when it was timed.

    Raises:
        ValueError: the bundle cannot be loaded.
    """
    from tasks.calibration.tokens import load_tokens
    from tasks.engines.compiling import read_manifest, settings_here

    engine, tuned_threads = settings_here(bundle, read_manifest(bundle))
    windows = load_tokens(data, "evaluation")[:NUM_WINDOWS, :MAX_LENGTH].astype(np.int64)
    operators = None
    if kind_at(bundle) == "decoder":
        operators = read_operators(bundle, engine, windows[:1, :PROMPT_TOKENS], threads=tuned_threads or threads)
    report(1, 3, {})
    why = "the checkpoint that it was compiled from is not known"
    layers: tuple[LayerError, ...] = ()
    depths: tuple[int | None, int | None] = (None, None)
    if checkpoint and original:
        depths = _num_layers(checkpoint), _num_layers(original)
        why, layers = compare_layers(checkpoint, original, windows)
    report(2, 3, {})
    cpu = cpuinfo()
    flags = cpu.get("flags", "").split()
    facts = Facts(
        engine=engine.engine,
        rounds_inputs=getattr(engine, "activations", None) == "int8",
        operators=operators,
        weight_bytes=weight_bytes(bundle),
        num_weights=num_weights(bundle),
        layers=layers,
        why_no_layers=why,
        num_layers=depths[0],
        original_num_layers=depths[1],
        instructions=tuple(name for name in VECTOR_INSTRUCTIONS if name in flags),
        processor=cpu.get("model name", "not named"),
    )
    (out / "facts.json").write_text(facts.model_dump_json(indent=1) + "\n")
    report(3, 3, {})
    return facts


def compare_layers(checkpoint: Path, original: Path, windows: "Ids") -> tuple[str, tuple[LayerError, ...]]:
    """Why layers cannot be compared ("" if they were), and the error of every block of a candidate.

    Only weights are compared: what an engine, or a checkpoint of W8A8, rounds besides is not part of it.

    Args:
        checkpoint: the candidate's, quantized or not.
        original: float.
        windows: [num_windows, length] int64 token ids.
    """
    import torch

    from tasks.calibration.checkpoints import load_model
    from tasks.calibration.layerwise import compare_blocks
    from tasks.quantization.float_weights import FloatWeights

    config = json.loads((original / "config.json").read_text())
    family = ARCHITECTURES.get(config["model_type"])
    if family is None:
        return f"the blocks of {config['model_type']} are not known", ()
    if _num_layers(checkpoint) != _num_layers(original):
        return f"it has {_num_layers(checkpoint)} blocks and the original {_num_layers(original)}", ()
    weights = FloatWeights(checkpoint, family.base)

    def below(module: str) -> "dict[str, Tensor]":
        names = [name for name in weights.shapes if name.startswith(f"{module}.")]
        return {name.removeprefix(f"{module}."): weights.copy(name) for name in names}

    errors = compare_blocks(load_model(original), family, torch.from_numpy(windows), below)
    return "", tuple(LayerError(**vars(error)) for error in errors)


def weight_bytes(bundle: Path) -> int:
    """Bytes of a bundle's graph and weights."""
    files = {file for pattern in WEIGHT_FILES for file in bundle.glob(pattern)}
    return sum(file.stat().st_size for file in files)


def num_weights(bundle: Path) -> int | None:
    """Weights of a decoder's linear layers and LM head, by its config.json; None for others, or without such sizes."""
    config = json.loads((bundle / "config.json").read_text())
    if kind_of(config["model_type"]) != "decoder":
        return None
    try:
        hidden, inner, depth = (int(config[name]) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
    except KeyError:
        return None
    gated = ARCHITECTURES[config["model_type"]].gated if config["model_type"] in ARCHITECTURES else True
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return depth * (attention + (3 if gated else 2) * hidden * inner) + hidden * int(config["vocab_size"])


def explain(facts: Facts, speeds: Speeds | None, *, slower: bool, worse: bool) -> Diagnosis:
    """What the facts mean for a candidate that is slower than it may be, or worse.

    Args:
        facts: of its bundle.
        speeds: as measured beside others; None: not measured.
    """
    findings: list[Finding] = []
    if slower:
        findings += _of_products(facts)
        if speeds and speeds.machine:
            findings += _of_bounds(facts, speeds, speeds.machine)
    if worse:
        findings += _of_layers(facts)
    if not findings and facts.operators is None:
        sentence = "Nothing that was looked at explains it; what the engine runs was not."
        findings.append(Finding(kind="operators", sentence=sentence))
    of: Complaint = "slower and worse" if slower and worse else "worse" if worse else "slower"
    return Diagnosis(of=of, findings=tuple(findings), facts=facts)


def _of_products(facts: Facts) -> list[Finding]:
    """Integers that became floats, and why."""
    operators = facts.operators
    if operators is None:
        return []
    findings = []
    restored, floats = operators.count("weights to floats"), operators.count("float product")
    integers = operators.count("integer product")
    compressed = any("Compressed" in group.kind for group in operators.groups)
    stored = [
        group
        for group in operators.groups
        if group.role == "float product" and (group.kind == "MatMulNBits" or "Compressed" in group.kind)
    ]
    if restored:
        share = operators.share("weights to floats")
        findings.append(
            Finding(
                kind="restored weights",
                sentence=f"Quantized weights are turned back into floats for every token: {restored} operators "
                f"(DequantizeLinear) take {share:.0%} of its time, and {floats} products then run in floats. The "
                "weights are fake-quantized: rounded, but neither smaller in memory nor multiplied as integers. "
                "Compile the quantized checkpoint with Slimline, or another exporter of integer products.",
            )
        )
    elif stored:
        num, names = sum(group.num for group in stored), ", ".join(group.kind for group in stored)
        asked = "" if facts.rounds_inputs else " The engine's option `activations: float32` asks for it; try int8."
        findings.append(
            Finding(
                kind="float products",
                sentence=f"{num} of {num + integers} matrix products of weights that are stored as integers run in "
                f"floats ({names}).{asked}",
            )
        )
    if not any("vnni" in name or "amx" in name for name in facts.instructions) and (integers or compressed or restored):
        findings.append(Finding(kind="missing instructions", sentence=_without_vnni(facts)))
    return findings


def _without_vnni(facts: Facts) -> str:
    has = ", ".join(facts.instructions) or "none of the vector instructions asked about"
    then = {
        "onnxruntime": "ONNX Runtime multiplies bytes without it too, in more instructions, and with kernels that "
        "guard 16-bit sums against overflow (session.x64quantprecision)",
        "openvino": "OpenVINO's products then take weights as 8 or 4 bits from memory and multiply in floats, so that "
        "prompts are read no faster than unquantized",
    }.get(facts.engine, "integers are multiplied in more instructions")
    return f"The processor ({facts.processor}: {has}) has no VNNI or AMX, which multiply and sum bytes at once. {then}."


def _of_bounds(facts: Facts, speeds: Speeds, machine: Machine) -> list[Finding]:
    """Whether the machine is at its limits: roofline, see `machine`."""
    bandwidth = machine.bandwidth(facts.weight_bytes)
    reading_ms = 1000 * facts.weight_bytes / bandwidth
    share = reading_ms / speeds.tpot_ms
    read = (
        f"reading {facts.weight_bytes / 1e6:.3g} MB of weights at the {bandwidth / 1e9:.3g} GB/s that this machine "
        f"reads takes {reading_ms:.3g} of the {speeds.tpot_ms:.3g} ms per token"
    )
    findings = []
    if share >= BOUND:
        findings.append(
            Finding(
                kind="memory-bound",
                sentence=f"Memory-bound: {read}. Only fewer bytes make a token faster: fewer bits, or a smaller model.",
            )
        )
    elif share < SMALL:
        sentence = f"Too small to gain from fewer bytes: {read}, so that storing less saves at most {share:.0%}."
        findings.append(Finding(kind="too small", sentence=sentence))
    else:
        sentence = f"Neither memory nor overhead alone limits: {read}."
        findings.append(Finding(kind="memory-bound", sentence=sentence))
    findings += _of_prompts(facts, speeds, machine)
    operators = facts.operators
    if operators and share < BOUND:
        each_us = 1000 * speeds.tpot_ms / operators.num
        products = operators.share("integer product", "float product")
        slowest = ", ".join(f"{g.num} {g.kind} {g.elapsed_ms / operators.elapsed_ms:.0%}" for g in operators.groups[:3])
        findings.append(
            Finding(
                kind="operators",
                sentence=f"The engine runs {operators.num} operators per token, {each_us:.3g} µs each; matrix products "
                f"take {products:.0%} of their time. The slowest: {slowest}.",
            )
        )
    return findings


def _of_prompts(facts: Facts, speeds: Speeds, machine: Machine) -> list[Finding]:
    """Whether reading the prompt is bound by products: two operations per weight and token."""
    operators = facts.operators
    if operators is None or facts.num_weights is None:
        return []
    integers = operators.count("integer product") > operators.count("float product")
    per_second = machine.operations_per_s["int8" if integers else "float32"]
    computing_ms = 1000 * 2 * facts.num_weights * speeds.prompt_tokens / per_second
    if computing_ms < BOUND * speeds.ttft_ms:
        return []
    sentence = (
        f"Prompts are compute-bound: {speeds.prompt_tokens} tokens take {computing_ms:.3g} of {speeds.ttft_ms:.3g} ms "
        f"at the {per_second / 1e9:.3g} billion operations per second of this machine's "
        f"{'integer' if integers else 'float'} products."
    )
    return [Finding(kind="compute-bound", sentence=sentence)]


def _of_layers(facts: Facts) -> list[Finding]:
    """Where the error is."""
    if not facts.layers:
        depth, before = facts.num_layers, facts.original_num_layers
        if depth and before and depth != before:
            sentence = (
                f"It has {depth} of the original's {before} blocks, so that layers cannot be compared one to one; "
                "training longer, or removing fewer, is what gains."
            )
            return [Finding(kind="structure", sentence=sentence)]
        return [Finding(kind="layers", sentence=f"Layers were not compared: {facts.why_no_layers}.")]
    worst = sorted(facts.layers, key=lambda layer: -layer.whole)
    middle = float(np.median([layer.whole for layer in facts.layers]))
    last = facts.layers[-1].accumulated
    if worst[0].whole == 0:
        sentence = "Every block's weights give the original's outputs exactly: what is lost, the engine loses."
    elif worst[0].whole > STANDS_OUT * middle:
        named = "; ".join(
            f"{layer.name} {layer.whole:.1%} ({_half(layer)})" for layer in worst[:3] if layer.whole > middle
        )
        sentence = (
            f"The largest errors of blocks' outputs: {named}; the median is {middle:.1%}. Leave these in more bits "
            "(`ignore`, or mixed precision)."
        )
    else:
        sentence = (
            f"The error is spread evenly: {worst[-1].whole:.1%} to {worst[0].whole:.1%} of what a block adds, the most "
            f"in {worst[0].name} ({_half(worst[0])}). Finer groups, more bits or another method help, not "
            "single layers."
        )
    return [Finding(kind="layers", sentence=f"{sentence} After all blocks hidden states are {last:.1%} off.")]


def _half(layer: LayerError) -> str:
    return "attention" if layer.attention > layer.feed_forward else "feed-forward"


def _num_layers(checkpoint: Path) -> int | None:
    config = json.loads((checkpoint / "config.json").read_text())
    family = ARCHITECTURES.get(config["model_type"])
    return int(config[family.num_layers_option]) if family else None
