"""One subject of `latency.py` in a process of its own: the parent's handle on it, and what the child does."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.engines.generation import generate_timed
from tasks.validation.worker import Worker, answer_commands

if TYPE_CHECKING:
    from tasks.engines.generation import Session


class LatencyWorker(Worker):
    """A child process that answers one batch of requests at a time."""

    program = f"from {__name__} import main; main({{answers_fd}})"
    max_length = 0
    """Tokens that it reads; known once it is loaded."""

    def load(self, path: Path, *, original: bool) -> float:
        """Seconds to load an engine bundle, or the original checkpoint in PyTorch, the engine's import included."""
        answer = self.ask(load=str(path), original=original, threads=self.threads)
        self.max_length = int(answer["max_length"])
        return float(answer["load_s"])

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> list[float]:
        """Seconds from the request until each new token of the batch was chosen, see `generate_timed`."""
        times: list[float] = self.ask(input_ids=input_ids.tolist(), new_tokens=new_tokens)["chosen_after_s"]
        return times


def load(path: Path, *, original: bool, threads: int) -> "Session":
    """The session of an engine bundle, or of the original: a checkpoint in PyTorch and float32, or a bundle too.

    A bundle that was tuned here has the threads that were found; all others have as many as are asked for. Without its
    tokenizer, whose library would bring PyTorch into the memory of every other engine.
    """
    if original and not (path / "manifest.json").exists():
        from tasks.engines.pytorch import PyTorch

        return PyTorch(precision="float32").load(path, threads=threads)
    from tasks.engines.compiling import read_manifest, settings_here

    engine, tuned_threads = settings_here(path, read_manifest(path))
    if problem := engine.missing() or engine.cannot_run():
        raise ValueError(problem)
    return engine.load(path, threads=tuned_threads or threads)


def main(answers_fd: int) -> None:
    """Answers the commands of a `LatencyWorker`."""
    session: Session | None = None

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        nonlocal session
        if "load" in command:
            started_at = time.perf_counter()
            session = load(Path(command["load"]), original=command["original"], threads=command["threads"])
            return {"load_s": time.perf_counter() - started_at, "max_length": session.max_length}
        assert session is not None, "load comes first"
        return {
            "chosen_after_s": generate_timed(session, np.array(command["input_ids"], np.int64), command["new_tokens"])
        }

    answer_commands(answers_fd, answer)
