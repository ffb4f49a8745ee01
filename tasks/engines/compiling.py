"""From a checkpoint to an engine bundle, and from a bundle to a session.

A bundle is a directory: the engine's own files, the tokenizer, and manifest.json, which names the engine and its
options, the precision the engine says it used, library versions, and the SHA-256 of every file.
"""

import argparse
import hashlib
import inspect
import json
import logging
import os
import platform
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter

from tasks.calibration.architectures import ARCHITECTURES
from tasks.calibration.checkpoints import copy_tokenizer, load_tokenizer, tokenizer_digest
from tasks.calibration.exported_families import kind_at
from tasks.calibration.memory import trim
from tasks.calibration.packages import installed_versions
from tasks.calibration.progress import Report, silent
from tasks.calibration.tokens import load_tokens
from tasks.engines import Engine
from tasks.engines.blame import first_difference
from tasks.engines.card import write_card
from tasks.engines.exported_bundle import (
    EncoderDecoderRuntime,
    ExportedParity,
    compare_bundle,
    compile_for,
    load_for,
)
from tasks.engines.genai_files import end_tokens
from tasks.engines.naming import describe
from tasks.engines.parity import Parity, ask, compare, tolerance
from tasks.engines.processor import cpuinfo
from tasks.engines.proposals import Lookup
from tasks.engines.reference import StreamedPyTorch
from tasks.engines.runtimes import runtime_of
from tasks.engines.text import Runtime, TextGenerator
from tasks.engines.tuning import Tuned, Tuning, tune

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.engines.generation import Ids, Session

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CONFIGS = ("config.json", "generation_config.json")
"""Of the checkpoint, copied into the bundle beside the tokenizer."""
PARITY_WINDOWS = 4
PARITY_LENGTH = 128
EXPORTED_LENGTH = 64
LIBRARIES = {
    "onnxruntime": ("onnx", "onnxruntime", "onnxruntime-genai"),
    "openvino": ("openvino", "openvino-genai", "openvino-tokenizers"),
    "tensorrt": ("onnx", "tensorrt", "tensorrt-rtx-cu13"),
}


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What a bundle is."""

    format: Literal[1] = 1
    engine: Engine
    status: Literal["run", "built, not run here"]
    why_not_run: str | None = None
    facts: dict[str, str] = Field(description="What the engine says it uses; empty when it was not run.")
    versions: dict[str, str]
    processor: str = Field(description="Where it was compiled and compared.")
    checkpoint_files: dict[str, str] = Field(description="SHA-256 of every file of the checkpoint it was made from.")
    files: dict[str, str] = Field(description="SHA-256 of every file of the bundle but this one.")
    tuned: Tuned | None = Field(None, description="The fastest settings found, and where; None: not searched.")

    @property
    def tuned_engine(self) -> Engine:
        """The engine's options with what tuning changed."""
        return self.engine.model_copy(update=self.tuned.options) if self.tuned else self.engine


class EngineSummary(BaseModel, frozen=True, extra="forbid"):
    """What was compiled, and how close its answers are to PyTorch's on the same checkpoint."""

    status: Literal["run", "built, not run here"]
    why_not_run: str | None
    size_bytes: int
    engine_size_bytes: int = Field(description="Without the tokenizer.")
    facts: dict[str, str]
    parity: Parity | ExportedParity | None = Field(description="None: not run here.")
    notes: tuple[str, ...] = ()


class TunedSummary(EngineSummary):
    """The same of a bundle whose settings were searched after it was compiled."""

    tuned: Tuned


def compile_engine(
    *, checkpoint: Path, data: Path | None, engine: Engine, threads: int, out: Path, report: Report = silent
) -> EngineSummary:
    """Compile `checkpoint` for `engine`, write the bundle, load it as a user would, and compare it with PyTorch.

    Args:
        checkpoint: plain or quantized checkpoint directory.
        data: prepared tokens; the first evaluation windows are what both read. None: a Python module's text.
        engine: options of one engine.
        threads: of both engines.
        out: receives the bundle.

    Raises:
        ValueError: the engine's library is missing, it cannot compile this checkpoint, or its answers are beyond the
            tolerance; the message names the first layer that differs.
    """
    if problem := engine.missing():
        raise ValueError(problem)
    exported = kind_at(checkpoint) != "decoder"
    notes: tuple[str, ...] = ()
    if exported:
        compile_for(checkpoint, engine, out)
    else:
        notes = engine.compile(checkpoint, out)
    engine_size_bytes = _size(out)
    copy_tokenizer(checkpoint, out)
    for name in CONFIGS:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, out / name)
    report(1, 3, {})
    facts: dict[str, str] = {}
    parity: Parity | ExportedParity | None = None
    why_not_run = engine.cannot_load(out)
    if why_not_run is None:
        report(2, 3, {})
        if exported:
            ids = _windows(checkpoint, data, EXPORTED_LENGTH)
            facts, parity = compare_bundle(out, checkpoint, engine, ids, threads=threads)
        else:
            facts, parity = _compare(out, checkpoint, data, engine, threads)
    versions = installed_versions(LIBRARIES[engine.engine])
    write_card(out, engine, parity=parity, versions=versions, why_not_run=why_not_run)
    manifest = Manifest(
        engine=engine,
        status="run" if parity else "built, not run here",
        why_not_run=why_not_run,
        facts=facts,
        versions=versions,
        processor=_processor(),
        checkpoint_files=_digests(checkpoint),
        files=_digests(out),
    )
    _write_manifest(out, manifest)
    report(3, 3, {})
    return EngineSummary(
        status=manifest.status,
        why_not_run=manifest.why_not_run,
        size_bytes=_size(out),
        engine_size_bytes=engine_size_bytes,
        facts=facts,
        parity=parity,
        notes=notes,
    )


def _compare(
    bundle: Path, checkpoint: Path, data: Path | None, engine: Engine, threads: int
) -> tuple[dict[str, str], Parity]:
    """What a decoder's bundle says it computes in, and how far it is from PyTorch; refused beyond the tolerance."""
    session = engine.load(bundle, threads=threads)
    try:
        windows = _windows(checkpoint, data, session.max_length)
        said, facts = ask(session, windows), dict(session.facts)
    finally:
        session.close()
    trim()
    parity = compare(said, StreamedPyTorch(checkpoint, threads=threads), windows)
    _refuse_difference(checkpoint, engine, windows, parity, threads)
    return facts, parity


def _write_manifest(bundle: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True)
    partial = bundle / f"{MANIFEST}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(bundle / MANIFEST)


def tune_bundle(*, bundle: Path, max_threads: int, options: Tuning | None = None, report: Report = silent) -> Tuned:
    """Searches the fastest settings of a bundle on this machine, and writes them into its manifest.

    Args:
        bundle: its manifest is changed.
        max_threads: the most to try.
        options: how settings are searched; None: as `Tuning` has it.

    Raises:
        ValueError: see `load_bundle` and `tuning.tune`.
    """
    manifest = runnable(bundle, verify=True)
    if kind_at(bundle) != "decoder":
        raise ValueError(f"Settings are searched for decoders; {bundle} holds an encoder or encoder-decoder.")
    windows = _windows(bundle, None, PARITY_LENGTH)
    tuned = tune(
        bundle,
        manifest.engine,
        options or Tuning(),
        windows=windows,
        max_threads=max_threads,
        num_cores=num_cores(),
        processor=_processor(),
        report=report,
    )
    _write_manifest(bundle, manifest.model_copy(update={"tuned": tuned}))
    return tuned


def tune_copy(
    *, bundle: Path, compiled: EngineSummary, options: Tuning, max_threads: int, out: Path, report: Report = silent
) -> TunedSummary:
    """A copy of a bundle in the directory `out`, with the fastest settings on this machine in its manifest.

    Args:
        bundle: not changed.
        compiled: what compiling it said.
        options: how settings are searched.
        max_threads: the most to try.

    Raises:
        ValueError: see `tune_bundle`.
    """
    shutil.copytree(bundle, out, dirs_exist_ok=True)
    tuned = tune_bundle(bundle=out, max_threads=max_threads, options=options, report=report)
    return TunedSummary(**{**dict(compiled), "size_bytes": _size(out)}, tuned=tuned)


def settings_here(bundle: Path, manifest: Manifest) -> tuple[Engine, int | None]:
    """The options to load a bundle with, and how many threads; None: as many as asked for, where it was not tuned.

    What was found on another processor, or another number of cores, is not used, and a warning says so.
    """
    tuned, here = manifest.tuned, (_processor(), num_cores())
    if tuned is None:
        return manifest.engine, None
    if (tuned.processor, tuned.num_cores) == here:
        return manifest.tuned_engine, tuned.threads
    logger.warning(
        "%s was tuned on %s with %d cores; here are %s with %d, so the settings it was compiled with are used. "
        "For the fastest ones here: slimline tune",
        bundle,
        tuned.processor,
        tuned.num_cores,
        *here,
    )
    return manifest.engine, None


def _windows(checkpoint: Path, data: Path | None, max_length: int) -> "Ids":
    """[num_windows, length] token ids that an engine and PyTorch both read."""
    length = min(PARITY_LENGTH, max_length)
    if data is not None:
        return load_tokens(data, "evaluation")[:PARITY_WINDOWS, :length].astype(np.int64)
    tokens = load_tokenizer(checkpoint).encode(inspect.getsource(argparse), add_special_tokens=False)
    tokens = tokens[: len(tokens) // length * length][: PARITY_WINDOWS * length]
    return np.array(tokens, dtype=np.int64).reshape(-1, length)


def _refuse_difference(checkpoint: Path, engine: Engine, windows: "Ids", parity: Parity, threads: int) -> None:
    allowed = tolerance(engine, checkpoint)
    broken = allowed.broken_by(parity)
    if broken is None:
        return
    where = "Where it begins cannot be told for this family"
    if json.loads((checkpoint / "config.json").read_text())["model_type"] in ARCHITECTURES:
        layer, first = first_difference(checkpoint, engine, windows, allowed, threads=threads)
        where = f"The first layer that differs is {layer} ({first})"
    raise ValueError(
        f"{describe(engine)} must answer as PyTorch does on the same checkpoint; {broken}. {where}. Do not serve this "
        "bundle; compile with other options of the engine, or report it with the checkpoint."
    )


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle.

    Raises:
        ValueError: there is none, or it is not one of ours.
    """
    try:
        content: Any = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
        return TypeAdapter(Manifest).validate_python(content)
    except FileNotFoundError:
        raise ValueError(
            f"{bundle} holds no {MANIFEST}; an engine bundle is a directory that compiling wrote."
        ) from None
    except ValueError as error:
        raise ValueError(f"{bundle / MANIFEST} is not the manifest of an engine bundle: {error}") from None


def load_bundle(bundle: Path, *, threads: int, verify: bool = True) -> "tuple[Session, PreTrainedTokenizerBase]":
    """The engine of a bundle, ready to generate, and its tokenizer.

    Args:
        verify: compare every file with the manifest before anything is parsed; about 1 s per GB.

    Raises:
        ValueError: a file was changed or lost, or this machine cannot run the engine.
    """
    if kind_at(bundle) != "decoder":
        raise ValueError(
            f"{bundle} holds an encoder or encoder-decoder, which has no session of a decoder. Load it with "
            "tasks.engines.exported.load_exported; in recipes write `validation.quality: null`."
        )
    engine, _ = settings_here(bundle, runnable(bundle, verify))
    return engine.load(bundle, threads=threads), load_tokenizer(bundle)


def load_original(path: Path, *, threads: int) -> "Session":
    """What candidates are compared with: a checkpoint in PyTorch and float32, or another engine bundle."""
    if (path / MANIFEST).exists():
        return load_bundle(path, threads=threads)[0]
    if kind_at(path) != "decoder":
        raise ValueError(
            "Perplexity and agreement of next tokens are measured of decoders; this is an encoder or encoder-decoder. "
            "Write `validation.quality: null`, and a benchmark in validation.tasks."
        )
    from tasks.engines.pytorch import PyTorch

    return PyTorch(precision="float32").load(path, threads=threads)


def load_generator(
    bundle: Path, *, threads: int | None, lookup: Lookup | None = None, draft: Path | None = None, verify: bool = True
) -> TextGenerator:
    """A bundle ready to answer prompts.

    Args:
        threads: of the engine. None: as tuning found, else one per core this process may use.
        lookup: propose tokens by prompt lookup; the answers stay what they are without.
        draft: a bundle of the same engine with the same tokenizer, which proposes tokens.
        verify: see `load_bundle`.

    Raises:
        ValueError: a file was changed or lost, this machine cannot run the engine, or it has no such proposals.
    """
    manifest = runnable(bundle, verify)
    if draft:
        _check_draft(bundle, manifest, draft, runnable(draft, verify))
    engine, tuned_threads = settings_here(bundle, manifest)
    if threads is None:
        threads = tuned_threads or num_cores()
    runtime: Runtime
    if kind_at(bundle) != "decoder":
        if lookup or draft:
            raise ValueError("Tokens are proposed to decoders; this is an encoder-decoder. Leave lookup and draft out.")
        runtime = EncoderDecoderRuntime(load_for(bundle, manifest.engine, threads=threads))
    else:
        runtime = runtime_of(engine, bundle, threads=threads, lookup=lookup, draft=draft)
    return text_generator(runtime, bundle)


def text_generator(runtime: Runtime, directory: Path) -> TextGenerator:
    """Writes with the tokenizer of a bundle or checkpoint, until a token that ends its texts."""
    tokenizer = load_tokenizer(directory)
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return TextGenerator(runtime, tokenizer, end_tokens(directory) or own)


def _check_draft(bundle: Path, manifest: Manifest, draft: Path, of_draft: Manifest) -> None:
    if of_draft.engine.engine != manifest.engine.engine:
        raise ValueError(
            f"A draft must be compiled for the engine of the model, {manifest.engine.engine}; {draft} is for "
            f"{of_draft.engine.engine}. Compile the draft's checkpoint for {manifest.engine.engine}."
        )
    if tokenizer_digest(draft) != tokenizer_digest(bundle):
        raise ValueError(
            f"A draft must have the tokenizer of the model it proposes tokens to; that of {draft} differs from that of "
            f"{bundle}. Distil a draft from the model."
        )


def runnable(bundle: Path, verify: bool) -> Manifest:
    """The manifest of a bundle that is whole and runs on this machine."""
    manifest = read_manifest(bundle)
    if verify:
        _verify(bundle, manifest)
    if problem := manifest.engine.missing() or _too_old(bundle, manifest) or manifest.engine.cannot_load(bundle):
        raise ValueError(problem)
    here = {"versions": installed_versions(LIBRARIES[manifest.engine.engine]), "processor": _processor()}
    for what, found in here.items():
        if found != (there := getattr(manifest, what)):
            logger.warning(
                "%s was compiled and compared on %s %s; here it is %s. Speed and last digits may differ.",
                bundle,
                what,
                there,
                found,
            )
    return manifest


def _too_old(bundle: Path, manifest: Manifest) -> str | None:
    """Why a library here cannot read what a newer one wrote; None if none is older, by major and minor version."""
    here = installed_versions(LIBRARIES[manifest.engine.engine])
    for name, there in manifest.versions.items():
        if name in here and _release(here[name]) < _release(there):
            return (
                f"{bundle} was compiled with {name} {there}; here is {here[name]}, which is older and may read it "
                f"wrongly. Install {name} {there}, or compile the checkpoint again here."
            )
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _verify(bundle: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        file = bundle / name
        if not file.is_file():
            raise ValueError(f"The engine bundle {bundle} lost its file {name}. Compile it again.")
        if _digest(file) != expected:
            raise ValueError(f"The file {name} of the engine bundle {bundle} was changed. Compile it again.")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digests(directory: Path) -> dict[str, str]:
    return {p.relative_to(directory).as_posix(): _digest(p) for p in sorted(directory.rglob("*")) if p.is_file()}


def _size(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def _processor() -> str:
    """The processor's own name, as Linux tells it, else the architecture's."""
    return cpuinfo().get("model name") or platform.machine()


def num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
