"""What generates tokens with a bundle, each as a `text.Runtime`.

Which one is used is decided by measurement (docs/engines.md): OpenVINO GenAI for OpenVINO; for ONNX Runtime our own
session, whose prompts are read in about four fifths of the time of ONNX Runtime GenAI's because its LM head computes
the last position only, and which stops proposing tokens where that does not pay.
"""

import importlib
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.engines.genai_files import OPENVINO_TOKENIZER
from tasks.engines.generation import Session, choose
from tasks.engines.proposals import (
    DRAFT_TOKENS,
    DraftProposer,
    Lookup,
    LookupProposer,
    Pace,
    ProposingRuntime,
    RewindableSession,
)
from tasks.engines.text import OnToken, Runtime, Sampling, Work

if TYPE_CHECKING:
    from tasks.engines import Engine
    from tasks.engines.openvino import OpenVino


logger = logging.getLogger(__name__)


def runtime_of(
    engine: "Engine", bundle: Path, *, threads: int, lookup: Lookup | None = None, draft: Path | None = None
) -> Runtime:
    """What generates with a bundle of `engine`.

    Raises:
        ValueError: both a lookup and a draft, or the engine cannot check proposals with this bundle.
    """
    if lookup or draft:
        return _proposing(engine, bundle, threads=threads, lookup=lookup, draft=draft)
    if engine.engine == "openvino":
        from tasks.engines.openvino_session import read_model

        if read_model(bundle)[1] is None:
            return OpenVinoGenAi(bundle, engine, threads=threads)
    return SessionRuntime(engine.load(bundle, threads=threads))


def _proposing(
    engine: "Engine", bundle: Path, *, threads: int, lookup: Lookup | None, draft: Path | None
) -> ProposingRuntime:
    if lookup and draft:
        raise ValueError("Tokens are proposed by a lookup or by a draft, not by both. Give one.")
    if engine.engine not in ("onnxruntime", "openvino"):
        raise ValueError(
            f"Tokens are proposed by a lookup or a draft with the engines 'onnxruntime' and 'openvino'; got "
            f"{engine.engine!r}. Leave both out, or compile for one of these."
        )
    rounding = {name: getattr(engine, name, "float32") for name in ("activations", "kv_cache")}
    if chosen := [f"`{name}: {value}`" for name, value in rounding.items() if value != "float32"]:
        logger.warning(
            "With %s several tokens read at once are rounded otherwise than one by one, so answers with proposed "
            "tokens can part from those without where two tokens are about as likely. With float32 they are the same.",
            " and ".join(chosen),
        )
    session = _rewindable(engine, bundle, threads)
    if draft:
        return ProposingRuntime(session, DraftProposer(_rewindable(engine, draft, threads)), Pace(DRAFT_TOKENS))
    assert lookup is not None
    return ProposingRuntime(session, LookupProposer(lookup), Pace(lookup.max_proposed))


def _rewindable(engine: "Engine", bundle: Path, threads: int) -> RewindableSession:
    session: Any = engine.load(bundle, threads=threads)
    attention = session.facts.get("attention", "")
    if attention.startswith("stateful"):
        session.close()
        raise ValueError(
            f"OpenVINO proposes tokens with paged attention only; that of {bundle} is {attention}. "
            "Leave the lookup or draft out."
        )
    rewindable: RewindableSession = session
    return rewindable


def _library(name: str, extra: str) -> Any:
    """The module of a generation library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"Generating needs {name.replace('_', '-')} here: {error}. Install it: pip install 'slimline[{extra}]'"
        ) from None


class SessionRuntime:
    """Any engine's own session: one batch of prompts of equal length after the other."""

    def __init__(self, session: Session, *, batch_size: int = 8) -> None:
        self._session = session
        self._batch_size = batch_size
        self._lock = threading.Lock()  # a session holds one batch at a time
        self.max_length, self.facts = session.max_length, session.facts

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> Work:
        """See `text.Runtime`; prompt i's tokens depend on (seed, i) only, not on its batch."""
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(index)
        num_steps = 0
        for indices in by_length.values():
            for start in range(0, len(indices), self._batch_size):
                batch = indices[start : start + self._batch_size]
                with self._lock:
                    num_steps += self._generate_batch(batch, prompts, sampling, eos_ids, on_token)
        return Work(num_steps=num_steps)

    def _generate_batch(
        self,
        batch: list[int],
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: frozenset[int],
        on_token: OnToken,
    ) -> int:
        generators = [np.random.default_rng([sampling.seed, index]) for index in batch]
        logits = self._session.prefill(np.array([prompts[index] for index in batch], dtype=np.int64))[:, -1]
        open_rows = set(range(len(batch)))
        for step in range(sampling.max_new_tokens):
            chosen = choose(
                logits, generators, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
            )
            for row in tuple(open_rows):
                token = int(chosen[row])
                if on_token(batch[row], token) or token in eos_ids:
                    open_rows.remove(row)
            if not open_rows or step + 1 == sampling.max_new_tokens:
                return step
            logits = self._session.decode(chosen)
        return sampling.max_new_tokens - 1

    def close(self) -> None:
        """Frees the model."""
        self._session.close()


class OpenVinoGenAi:
    """OpenVINO GenAI's pipeline with continuous batching.

    Prompts of any length, also those of several callers, are decoded together, and a prompt that begins as an earlier
    one did is not read again.
    """

    def __init__(
        self,
        bundle: Path,
        engine: "OpenVino",
        *,
        threads: int,
    ) -> None:
        openvino_genai = _library("openvino_genai", "openvino")
        missing = [name for name in OPENVINO_TOKENIZER if not (bundle / name).exists()]
        if missing:
            raise ValueError(
                f"OpenVINO GenAI needs {' and '.join(missing)} in {bundle}, which compiling could not write. Read the "
                "bundle's notes, or compile it again."
            )
        self._genai = openvino_genai
        self.max_length = int(json.loads((bundle / "config.json").read_text())["max_position_embeddings"])
        properties = engine.properties(threads)
        self.facts = {name.lower(): str(value) for name, value in properties.items()}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(bundle, scheduler, "CPU", properties)
        self._next_request = 0
        self._lock = threading.Lock()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> Work:
        """See `text.Runtime`. Callers in several threads take turns to step, and each step serves all of them."""
        import openvino

        config = self._config(sampling, eos_ids)
        with self._lock:
            requests = {}
            for index, prompt in enumerate(prompts):
                ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
                requests[index] = self._pipeline.add_request(self._next_request, ids, config)
                self._next_request += 1
        num_steps = 0
        while requests:
            with self._lock:
                if any(self._is_running(handle) for handle in requests.values()):
                    self._pipeline.step()
                    num_steps += 1
                for index, handle in list(requests.items()):
                    for token in self._read(handle):
                        if on_token(index, token) and token not in eos_ids:
                            handle.stop()
                            break
                    if not self._is_running(handle) and not handle.can_read():
                        requests.pop(index)
        return Work(num_steps=num_steps - 1)

    def _is_running(self, handle: Any) -> bool:
        return bool(handle.get_status() == self._genai.py_openvino_genai.GenerationStatus.RUNNING)

    def _read(self, handle: Any) -> list[int]:
        tokens: list[int] = []
        while handle.can_read():
            for output in handle.read().values():
                tokens.extend(int(token) for token in output.generated_ids)
        return tokens

    def _config(self, sampling: Sampling, eos_ids: frozenset[int]) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = sampling.max_new_tokens
        config.eos_token_id = -1
        config.stop_token_ids = set(eos_ids)
        config.apply_chat_template = False
        if sampling.temperature > 0:
            config.do_sample = True
            config.temperature, config.top_p, config.rng_seed = sampling.temperature, sampling.top_p, sampling.seed
            if sampling.top_k:
                config.top_k = sampling.top_k
        return config

    def close(self) -> None:
        """Frees the model."""
        self._pipeline = None
