"""The libraries that generate tokens with a bundle, each as a `text.Runtime`.

Which one is used is decided by measurement (docs/engines.md): OpenVINO GenAI for OpenVINO; for ONNX Runtime our own
session, whose prompts are read in about four fifths of the time because its LM head computes the last position only,
and ONNX Runtime GenAI where a draft or a lookup proposes tokens.
"""

import importlib
import json
import logging
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, Field

from tasks.engines.genai_files import GENAI_CONFIG, OPENVINO_TOKENIZER
from tasks.engines.generation import Session, choose
from tasks.engines.text import OnToken, Runtime, Sampling, Work

if TYPE_CHECKING:
    from tasks.engines import Engine
    from tasks.engines.openvino import OpenVino


logger = logging.getLogger(__name__)

DRAFT_TOKENS = 5  # most that a draft proposes at once


class Lookup(BaseModel, frozen=True, extra="forbid"):
    """Prompt-lookup decoding: what followed the last tokens earlier in the text is proposed, and checked in one pass.

    "Prompt Lookup Decoding", Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    max_ngram_size: int = Field(3, ge=1, le=15, description="How many of the last tokens are looked up.")
    max_proposed: int = Field(5, ge=1, le=16, description="Most tokens proposed at once.")


def runtime_of(
    engine: "Engine", bundle: Path, *, threads: int, lookup: Lookup | None = None, draft: Path | None = None
) -> Runtime:
    """What generates with a bundle of `engine`.

    Raises:
        ValueError: both a lookup and a draft, or the engine's library has neither for this bundle.
    """
    if lookup and draft:
        raise ValueError("Tokens are proposed by a lookup or by a draft, not by both. Give one.")
    if engine.engine == "openvino":
        from tasks.engines.openvino_session import read_model

        reasons = {part: read_model(part)[1] for part in (bundle, draft) if part}
        if not any(reasons.values()):
            return OpenVinoGenAi(bundle, engine, threads=threads, lookup=lookup, draft=draft)
        if lookup or draft:
            said = "; ".join(f"{part}: {reason}" for part, reason in reasons.items() if reason)
            raise ValueError(
                f"OpenVINO proposes tokens with paged attention only, and not here ({said}). "
                "Leave the lookup or draft out."
            )
    if not (lookup or draft):
        return SessionRuntime(engine.load(bundle, threads=threads))
    if engine.engine == "onnxruntime":
        return OnnxRuntimeGenAi(bundle, threads=threads, lookup=lookup, draft=draft)
    raise ValueError(
        f"Tokens are proposed by a lookup or a draft with the engines 'onnxruntime' and 'openvino'; got "
        f"{engine.engine!r}. Leave both out, or compile for one of these."
    )


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

    @property
    def max_length(self) -> int:
        """The longest sequence."""
        return self._session.max_length

    @property
    def facts(self) -> dict[str, str]:
        """What it computes in."""
        return self._session.facts

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
        lookup: Lookup | None = None,
        draft: Path | None = None,
    ) -> None:
        openvino_genai = _library("openvino_genai", "openvino")
        missing = [name for name in OPENVINO_TOKENIZER if not (bundle / name).exists()]
        if missing:
            raise ValueError(
                f"OpenVINO GenAI needs {' and '.join(missing)} in {bundle}, which compiling could not write. Read the "
                "bundle's notes, or compile it again."
            )
        self._genai = openvino_genai
        self._lookup, self._draft = lookup, draft
        self.max_length = int(json.loads((bundle / "config.json").read_text())["max_position_embeddings"])
        properties = engine.properties(threads)
        self.facts = {name.lower(): str(value) for name, value in properties.items()}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        if (lookup or draft) and engine.activations == "int8":
            logger.warning(
                "OpenVINO rounds the inputs of several tokens otherwise than those of one, so answers with proposed "
                "tokens can part from those without where two tokens are about as likely. With `activations` float32 "
                "they are the same."
            )
        if lookup:
            properties["prompt_lookup"] = True
        if draft:
            properties["draft_model"] = openvino_genai.draft_model(draft, "CPU", **engine.properties(threads))
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
        num_steps, num_tokens, passes = 0, Counter[int](), Counter[int]()
        while requests:
            with self._lock:
                if any(self._is_running(handle) for handle in requests.values()):
                    self._pipeline.step()
                    num_steps += 1
                for index, handle in list(requests.items()):
                    tokens = self._read(handle)
                    passes[index] += bool(tokens)
                    for token in tokens:
                        num_tokens[index] += 1
                        if on_token(index, token) and token not in eos_ids:
                            handle.stop()
                            break
                    if not self._is_running(handle) and not handle.can_read():
                        requests.pop(index)
        return self._work(num_steps - 1, num_tokens, passes)

    def _work(self, num_steps: int, num_tokens: Counter[int], passes: Counter[int]) -> Work:
        if not (self._lookup or self._draft):
            return Work(num_steps=num_steps)
        accepted = num_tokens.total() - passes.total()  # each pass gives one token of the model itself
        return Work(num_steps=num_steps, num_accepted=accepted)

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
        if self._lookup:
            config.max_ngram_size = self._lookup.max_ngram_size
            config.num_assistant_tokens = self._lookup.max_proposed
        elif self._draft:
            config.num_assistant_tokens = DRAFT_TOKENS
        return config

    def close(self) -> None:
        """Frees the model."""
        self._pipeline = None


class OnnxRuntimeGenAi:
    """ONNX Runtime GenAI with a draft or a lookup, which both need a prompt at a time.

    The number of proposed tokens adapts to how many are accepted, and after three rounds without one a round goes
    without: text that does not suit costs little.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        threads: int,
        lookup: Lookup | None = None,
        draft: Path | None = None,
    ) -> None:
        onnxruntime_genai = _library("onnxruntime_genai", "onnxruntime")
        onnxruntime_genai.disable_telemetry_events()
        self._genai = onnxruntime_genai
        self._options: dict[str, Any] = {"min_adaptive_k": 2, "cooldown": True}
        if lookup:
            self._options |= {
                "ngram_size": lookup.max_ngram_size + 1,
                "max_draft_tokens": lookup.max_proposed,
                "ngram_chained_lookup": True,
            }
        elif draft:
            self._options["max_draft_tokens"] = DRAFT_TOKENS
        self.max_length = int(json.loads((bundle / GENAI_CONFIG).read_text())["model"]["context_length"])
        self.facts = {"runtime": f"onnxruntime-genai {onnxruntime_genai.__version__}", "threads": str(threads)}
        self._folder = TemporaryDirectory()
        directory = Path(self._folder.name)
        _write_composite(directory, bundle, draft, threads)
        self._model = onnxruntime_genai.Model(str(directory))
        self._lock = threading.Lock()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> Work:
        """See `text.Runtime`."""
        totals: Counter[str] = Counter()
        for index, prompt in enumerate(prompts):
            with self._lock:
                totals.update(self._generate(index, prompt, sampling, eos_ids, on_token))
        return Work(num_steps=totals["steps"], num_proposed=totals["evaluated"], num_accepted=totals["accepted"])

    def _generate(
        self, index: int, prompt: Sequence[int], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> dict[str, int]:
        params = self._genai.GeneratorParams(self._model)
        search: dict[str, Any] = {"max_length": min(len(prompt) + sampling.max_new_tokens, self.max_length)}
        if sampling.temperature > 0:
            search |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            search |= {"top_k": sampling.top_k, "random_seed": sampling.seed + index}
        params.set_search_options(**search)
        params.set_speculative_options(**self._options)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in range(sampling.max_new_tokens):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if on_token(index, token) or token in eos_ids or generator.is_done():
                break
        stats = generator.get_speculative_stats()
        return {
            "steps": int(stats["target_forward_passes"]) + int(stats["standard_fallback_steps"]),
            "evaluated": int(stats["draft_tokens_evaluated"]),
            "accepted": int(stats["draft_tokens_accepted"]),
        }

    def close(self) -> None:
        """Frees the model."""
        self._model = None
        self._folder.cleanup()


def _write_composite(directory: Path, bundle: Path, draft: Path | None, threads: int) -> None:
    """A model directory that refers to the graphs of a bundle and its draft, with the threads to use."""
    config = json.loads((bundle / GENAI_CONFIG).read_text())
    for source, name in ((bundle, "decoder"), (draft, "draft")):
        if source is None:
            continue
        part = json.loads((source / GENAI_CONFIG).read_text())["model"]["decoder"]
        (directory / name).symlink_to(source.resolve(), target_is_directory=True)
        part["filename"] = f"{name}/{part['filename']}"
        part["session_options"]["intra_op_num_threads"] = threads
        config["model"][name] = part
    (directory / GENAI_CONFIG).write_text(json.dumps(config))
    for file in bundle.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != GENAI_CONFIG:
            shutil.copyfile(file, directory / file.name)
