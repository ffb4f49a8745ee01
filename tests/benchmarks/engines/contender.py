"""A contender: a model in one runtime, made once, then served by a process that answers one request at a time.

It is imported in the environments of all peers, so it needs numpy only. Every peer's script has the same commands:

    SCRIPT list                        names and options, one JSON object in the last line
    SCRIPT make NAME --bundle DIR ...  writes the runtime's own files
    SCRIPT serve NAME --bundle DIR ... loads them, then reads requests from stdin, one JSON line each, and answers
                                       through what was its stdout; what libraries print goes to stderr

Requests: {"rounds": [prompts of a batch], "new_tokens": n} is answered by times and the last round's tokens,
{"windows": [token ids]} by the log-probabilities of their tokens. When stdin ends, the runner is gone, and the process
goes at once.
"""

import argparse
import gc
import importlib.metadata
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Options = dict[str, Any]


class Generated(NamedTuple):
    """One batch of greedy answers."""

    ttft_s: float
    """From the request until the first token of every sequence is chosen."""
    total_s: float
    """From the request until the last token of every sequence is chosen."""
    tokens: list[list[int]]
    """[batch, new_tokens]; the end-of-text token ends nothing, so that all do equal work."""


class Model(Protocol):
    """A loaded contender."""

    facts: Mapping[str, str]
    """What the runtime says that it computes in."""

    def generate(self, input_ids: Ids, new_tokens: int) -> Generated:
        """Greedy answers to [batch, length] prompts of equal length."""

    def log_probs(self, input_ids: Ids) -> Floats | None:
        """[length - 1]: of every token of [length] but the first, given those before it; None: it cannot tell."""


class Making(NamedTuple):
    """What a contender is made of."""

    name: str
    options: Options
    checkpoint: Path
    """Float checkpoint directory of Hugging Face's format."""
    gguf: Path | None
    """The file that the checkpoint was de-quantized from."""
    data: Path
    """Prepared data: tokens for calibration and evaluation."""
    work: Path
    """For what several contenders of a tool are made of."""
    out: Path
    threads: int


@contextmanager
def quiet() -> Any:
    """No garbage collection inside: it would be timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def generate_greedily(
    prefill: Callable[[Ids], Floats], decode: Callable[[Ids], Floats], input_ids: Ids, new_tokens: int
) -> Generated:
    """For a runtime that gives logits [batch, vocab_size] and leaves the choice of tokens to its user."""
    with quiet():
        started_at = time.perf_counter()
        chosen = [prefill(input_ids).argmax(axis=-1)]
        ttft_s = time.perf_counter() - started_at
        while len(chosen) < new_tokens:
            chosen.append(decode(chosen[-1]).argmax(axis=-1))
        total_s = time.perf_counter() - started_at
    return Generated(ttft_s, total_s, np.stack(chosen, axis=1).tolist())


def log_probs_of(logits: Floats, input_ids: Ids) -> Floats:
    """[length - 1] from logits [length - 1 or length, vocab_size] of the positions of `input_ids`."""
    wanted = input_ids[1:]
    logits = logits[: len(wanted)].astype(np.float32)
    largest = logits.max(axis=1, keepdims=True)
    totals = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1))
    found: Floats = logits[np.arange(len(wanted)), wanted] - totals
    return found


def main(
    packages: list[str],
    contenders: Mapping[str, Options],
    make: Callable[[Making], None],
    load: Callable[[Options, Path, int], Model],
) -> None:
    """The command line that every peer's script has.

    Args:
        packages: whose versions are recorded; those that make up the runtime.
        contenders: options by the contender's name; `tool` and `kind` (float32, bfloat16, int8 or int4) are read by the
            runner, and `bundle_of`, the name of a contender whose files this one serves instead of its own,
            `float_embedding`, whether the files hold a float32 embedding beside the LM head, and `student`, whether it
            is made of the student's checkpoint instead of the model's.
        make: writes a contender's files into `Making.out`.
        load: a contender from its options, the directory of its files, and a number of threads.
    """
    parser = argparse.ArgumentParser(description=f"Contenders of {', '.join(packages)}.")
    parser.add_argument("command", choices=["list", "make", "serve"])
    parser.add_argument("name", choices=contenders, nargs="?")
    parser.add_argument("--bundle", type=Path, help="Directory of the runtime's files.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.command == "list":
        print(json.dumps(contenders))  # noqa: T201
        return
    options = contenders[arguments.name]
    if arguments.command == "make":
        make(
            Making(
                arguments.name,
                options,
                arguments.checkpoint,
                arguments.gguf,
                arguments.data,
                arguments.work,
                arguments.bundle,
                arguments.threads,
            )
        )
        return
    versions = {package: importlib.metadata.version(package) for package in packages}
    serve(lambda: load(options, arguments.bundle, arguments.threads), versions)


def serve(load: Callable[[], Model], versions: dict[str, str]) -> None:
    """Answers requests until stdin ends; an error is an answer too."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)  # also out of the middle of a computation

    threading.Thread(target=listen, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started_at = time.perf_counter()
    model = load()
    ready = {"load_s": time.perf_counter() - started_at, "facts": dict(model.facts), "versions": versions}
    answers.write(json.dumps(ready) + "\n")
    while True:
        waits_since, cpu_before = time.perf_counter(), time.process_time()
        request = json.loads(requests.get())
        idle = {"idle_s": time.perf_counter() - waits_since, "idle_cpu_s": time.process_time() - cpu_before}
        try:
            answer = _answer(model, request)
        except Exception as error:  # noqa: BLE001  the runner raises it, with the contender's name
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer | idle) + "\n")


def _answer(model: Model, request: dict[str, Any]) -> dict[str, Any]:
    if "windows" in request:
        found = [model.log_probs(np.array(window, np.int64)) for window in request["windows"]]
        return {"log_probs": [None if values is None else float(values.sum(dtype=np.float64)) for values in found]}
    rounds = [model.generate(np.array(prompts, np.int64), request["new_tokens"]) for prompts in request["rounds"]]
    lengths = {len(tokens) for generated in rounds for tokens in generated.tokens}
    if lengths != {request["new_tokens"]}:
        raise RuntimeError(f"Every answer must have {request['new_tokens']} tokens; got {sorted(lengths)}.")
    return {
        "ttft_s": [generated.ttft_s for generated in rounds],
        "total_s": [generated.total_s for generated in rounds],
        "tokens": rounds[-1].tokens,
    }
