"""One subject of `latency.py` in a process of its own: the parent's handle on it, and what the child does."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.calibration.exported_families import Kind, kind_at
from tasks.engines.generation import generate_timed
from tasks.validation.worker import Worker, answer_commands

if TYPE_CHECKING:
    from tasks.engines.encoder import EncoderSession, PyTorchEncoder
    from tasks.engines.encoder_decoder import EncoderDecoderSession, PyTorchEncoderDecoder
    from tasks.engines.generation import Session

    Loaded = Session | EncoderSession | PyTorchEncoder | EncoderDecoderSession | PyTorchEncoderDecoder


class LatencyWorker(Worker):
    """A child process that answers one batch of requests at a time."""

    program = f"from {__name__} import main; main({{answers_fd}})"
    kind: Kind = "decoder"
    """What its model does; known once it is loaded, as is:"""
    max_length: int | None = 0
    """Tokens that it reads; None: as many as memory takes."""

    def load(self, path: Path, *, original: bool) -> float:
        """Seconds to load an engine bundle, or the original checkpoint in PyTorch, the engine's import included."""
        answer = self.ask(load=str(path), original=original, threads=self.threads)
        self.kind, self.max_length = answer["kind"], answer["max_length"]
        return float(answer["load_s"])

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> list[float]:
        """Seconds from the request until each new token of the batch was chosen, see `generate_timed`.

        Of an encoder, which writes none: until everything was said, one number.
        """
        times: list[float] = self.ask(input_ids=input_ids.tolist(), new_tokens=new_tokens)["chosen_after_s"]
        return times


def load(path: Path, *, original: bool, threads: int) -> "tuple[Kind, Loaded]":
    """What an engine bundle, or the original, does, and a session of it.

    The original is a checkpoint in PyTorch and float32, with the attention that transformers chooses, or a bundle too.
    A bundle that was tuned here has the threads that were found; all others have as many as are asked for. Without its
    tokenizer, whose library would bring PyTorch into the memory of every other engine.
    """
    kind = kind_at(path)
    if original and not (path / "manifest.json").exists():
        return kind, _load_original(path, kind, threads)
    from tasks.engines.compiling import read_manifest, settings_here

    engine, tuned_threads = settings_here(path, read_manifest(path))
    if problem := engine.missing() or engine.cannot_run():
        raise ValueError(problem)
    if kind != "decoder":
        from tasks.engines.exported_bundle import load_for

        return kind, load_for(path, engine, threads=threads)
    return kind, engine.load(path, threads=tuned_threads or threads)


def _load_original(path: Path, kind: Kind, threads: int) -> "Loaded":
    if kind == "decoder":
        from tasks.engines.pytorch import PyTorch

        return PyTorch(precision="float32").load(path, threads=threads)
    if kind == "encoder":
        from tasks.engines.encoder import load_pytorch_encoder

        return load_pytorch_encoder(path, threads=threads)
    import torch

    from tasks.engines.encoder_decoder import PyTorchEncoderDecoder, read_greedy
    from tasks.quantization.exported_checkpoint import read_checkpoint, read_config

    torch.set_num_threads(threads)
    return PyTorchEncoderDecoder(read_checkpoint(path, attention=None), read_greedy(path, read_config(path)))


def main(answers_fd: int) -> None:
    """Answers the commands of a `LatencyWorker`."""
    kind: Kind = "decoder"
    session: Any = None

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        nonlocal kind, session
        if "load" in command:
            started_at = time.perf_counter()
            kind, session = load(Path(command["load"]), original=command["original"], threads=command["threads"])
            return {"load_s": time.perf_counter() - started_at, "kind": kind, "max_length": session.max_length}
        assert session is not None, "load comes first"
        input_ids = np.array(command["input_ids"], np.int64)
        if kind == "encoder":
            from tasks.engines.encoder import encode_timed

            return {"chosen_after_s": [encode_timed(session, input_ids)]}
        return {"chosen_after_s": generate_timed(session, input_ids, command["new_tokens"])}

    answer_commands(answers_fd, answer)
