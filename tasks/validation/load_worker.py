"""One served engine of `load.py` in a process of its own, and the users who ask it.

The engine is what `slimline serve` answers with (tasks/engines/text.py): OpenVINO GenAI with continuous batching, ONNX
Runtime's session with one request after the other. The users are threads of the same process, as the handlers of a
server's requests are: text is made of tokens as there, HTTP is left out. Answers do not end by themselves, so that all
engines do the same work.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.engines.text import OnToken, Runtime, Sampling, TextGenerator, Work
from tasks.validation.arrivals import Request, Serve, Served, closed_loop, open_loop
from tasks.validation.worker import Worker, answer_commands

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LoadWorker(Worker):
    """A child process that serves one engine bundle to one level of load after the other."""

    program = f"from {__name__} import main; main({{answers_fd}})"
    max_length = 0
    """Tokens that it reads; known once it is loaded."""

    def load(self, bundle: Path) -> float:
        """Seconds to load the bundle and its tokenizer."""
        answer = self.ask(load=str(bundle), threads=self.threads)
        self.max_length = int(answer["max_length"])
        return float(answer["load_s"])

    def run(
        self,
        requests: Sequence[Request],
        *,
        due_s: Sequence[float] | None,
        users: int | None,
        window_s: float,
        drain_s: float,
        max_concurrent: int,
    ) -> list[Served]:
        """What became of the requests of one level.

        Args:
            requests: of an open loop, all of them; of a closed one, they are asked again from the first if need be.
            due_s: of an open loop, when each is due.
            users: of a closed loop.
            window_s: see `arrivals.open_loop`.
            drain_s: see there.
            max_concurrent: see there.
        """
        answer = self.ask(
            requests=[[list(request.prompt), request.new_tokens] for request in requests],
            due_s=due_s,
            users=users,
            times={"window_s": window_s, "drain_s": drain_s, "max_concurrent": max_concurrent},
            extra_s=window_s + drain_s,
        )
        return [Served(**each) for each in answer["served"]]


class _Told:
    """A runtime that tells of every token before text is made of it."""

    def __init__(self, runtime: Runtime, on_token: Callable[[], bool]) -> None:
        self.max_length, self.facts = runtime.max_length, runtime.facts
        self._runtime, self._on_token = runtime, on_token

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> Work:
        """See `text.Runtime`."""

        def listen(index: int, token: int) -> bool:
            ends = self._on_token()
            return on_token(index, token) or ends

        return self._runtime.generate(prompts, sampling, eos_ids, listen)

    def close(self) -> None:
        """Leaves the runtime to others."""


def server_of(runtime: Runtime, tokenizer: "PreTrainedTokenizerBase") -> Serve:
    """Greedy answers of exactly as many tokens as are asked for."""

    def serve(prompt: Sequence[int], new_tokens: int, on_token: Callable[[], bool]) -> None:
        generator = TextGenerator(_Told(runtime, on_token), tokenizer, eos_ids=())
        generator.answer([prompt], Sampling(max_new_tokens=new_tokens), lambda index, text: None)

    return serve


def main(answers_fd: int) -> None:
    """Answers the commands of a `LoadWorker`."""
    serve: Serve | None = None

    def load(bundle: Path, threads: int) -> dict[str, Any]:
        nonlocal serve
        from tasks.engines.compiling import load_generator

        started_at = time.perf_counter()
        generator = load_generator(bundle, threads=threads)
        serve = server_of(generator.runtime, generator.tokenizer)
        return {"load_s": time.perf_counter() - started_at, "max_length": generator.runtime.max_length}

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        if "load" in command:
            return load(Path(command["load"]), command["threads"])
        assert serve is not None, "load comes first"
        requests = [Request(prompt, new_tokens) for prompt, new_tokens in command["requests"]]
        times = command["times"]
        if command["users"] is None:
            served = open_loop(serve, list(zip(command["due_s"], requests, strict=True)), **times)
        else:
            endless: Iterator[Request] = cycle(requests)
            served = closed_loop(serve, endless, users=command["users"], **times)
        return {"served": [asdict(each) for each in served]}

    answer_commands(answers_fd, answer)
