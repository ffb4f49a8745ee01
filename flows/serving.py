"""A bundle behind the part of OpenAI's HTTP interface that plain text needs: completions, chats, streaming.

An own server of one screenful on FastAPI and uvicorn, which are installed with Prefect, because no existing one fits:
OpenVINO Model Server and vLLM run one engine each and are no Python packages that install beside ours, LiteLLM's proxy
brings dozens of dependencies and would still need this adapter, and transformers' and MLflow's servers speak of
PyTorch models and of tables. What a request asks for and this cannot do is refused by name.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import typer
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from infra.listening import listening
from tasks.engines.text import Answer, Sampling, TextGenerator


class StreamOptions(BaseModel, extra="forbid"):
    """What a stream holds besides text."""

    include_usage: bool = False


class Options(BaseModel, extra="forbid"):
    """What completions and chats share. Defaults are OpenAI's."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Not used: nothing here tells users apart.")
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0

    def sampling(self, room: int) -> Sampling:
        """As the engines understand it; `room` is what the longest prompt leaves of the model's context."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_new_tokens=self.max_tokens or max(room, 1),
            temperature=self.temperature,
            top_p=self.top_p if self.temperature else 1.0,  # the likeliest token is in every such set
            seed=uuid.uuid4().int >> 96 if self.seed is None else self.seed,
            stop=tuple(stop),
        )


class CompletionRequest(Options):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: Literal[False] = False
    logprobs: None = None


class Turn(BaseModel, extra="forbid"):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(Options):
    """POST /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None


def build(generator: TextGenerator, name: str, *, max_concurrent: int = 8) -> FastAPI:
    """The application.

    Args:
        generator: answers; may be asked from several threads.
        name: what clients call the model.
        max_concurrent: requests that generate at a time; others wait.
    """
    app = FastAPI(title=f"Slimline: {name}", docs_url=None, redoc_url=None)
    started_at = int(time.time())
    gate = asyncio.Semaphore(max_concurrent)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(str(part) for part in e['loc'][1:])}: {e['msg']}" for e in error.errors()[:5]]
        return _error(400, "; ".join(problems))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, **generator.runtime.facts}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": started_at, "owned_by": "slimline"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> dict[str, Any] | StreamingResponse:
        prompts = [generator.encode(each) if isinstance(each, str) else each for each in _prompts(body.prompt)]
        job = _job(body, prompts, "text_completion", "cmpl", lambda text: {"text": text}, lambda text: {"text": text})
        return await _respond(job, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chats(body: ChatRequest, request: Request) -> dict[str, Any] | StreamingResponse:
        body.max_tokens = body.max_tokens or body.max_completion_tokens
        try:
            prompt = generator.encode_chat([turn.model_dump() for turn in body.messages])
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        job = _job(
            body,
            [prompt],
            "chat.completion",
            "chatcmpl",
            lambda text: {"message": {"role": "assistant", "content": text}},
            lambda text: {"delta": {"role": "assistant", "content": text}},
        )
        return await _respond(job, request)

    def _job(body: Options, prompts: list[list[int]], kind: str, prefix: str, whole: Shape, piece: Shape) -> "_Job":
        if body.model != name:
            raise HTTPException(404, f"The model here is {name!r}; got {body.model!r}.")
        room = generator.runtime.max_length - max(map(len, prompts), default=0) + 1
        try:
            sampling = body.sampling(room)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return _Job(generator, name, body, prompts, sampling, kind, prefix, whole, piece)

    async def _respond(job: _Job, request: Request) -> dict[str, Any] | StreamingResponse:
        problem = next((each for each in map(job.problem, range(len(job.prompts))) if each), None)
        if problem or not job.prompts:
            raise HTTPException(400, problem or "A request must have a prompt; got none.")
        if job.body.stream:
            return StreamingResponse(job.stream(gate), media_type="text/event-stream")
        async with gate:
            running = asyncio.create_task(asyncio.to_thread(job.run, lambda index, text: None))
            while not running.done():
                await asyncio.wait([running], timeout=0.5)
                if not running.done() and await request.is_disconnected():
                    job.abandoned = True
            return job.response(await running)

    return app


Shape = Callable[[str], dict[str, Any]]
"""How a text stands in a choice of a response."""


@dataclass
class _Job:
    """One request's work."""

    generator: TextGenerator
    name: str
    body: Options
    prompts: list[list[int]]
    sampling: Sampling
    kind: str
    prefix: str
    whole: Shape
    piece: Shape
    abandoned: bool = False  # the client has gone: whatever generates ends at its next token
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    def problem(self, index: int) -> str | None:
        """Why the model cannot take a prompt; None if it can."""
        try:
            self.generator.check(index, self.prompts[index], self.sampling.max_new_tokens)
        except ValueError as error:
            return str(error)
        return None

    def run(self, on_text: Callable[[int, str], None]) -> list[Answer]:
        """Generates; in a thread of its own."""

        def listen(index: int, text: str) -> bool:
            on_text(index, text)
            return self.abandoned

        return self.generator.answer(self.prompts, self.sampling, listen)[0]

    def response(self, answers: list[Answer]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {"index": index, **self.whole(answer.text), "logprobs": None, "finish_reason": answer.finish_reason}
            for index, answer in enumerate(answers)
        ]
        return {**self._head(self.kind), "choices": choices, "usage": _usage(answers)}

    async def stream(self, gate: asyncio.Semaphore) -> AsyncIterator[str]:
        """The answer as events, in pieces as they come."""
        kind = self.kind if self.kind == "text_completion" else f"{self.kind}.chunk"
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, str] | None]()

        def put(item: tuple[int, str] | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, item)

        def work() -> list[Answer]:
            try:
                return self.run(lambda index, text: put((index, text)))
            finally:
                put(None)

        async with gate:
            running = asyncio.create_task(asyncio.to_thread(work))
            try:
                while (item := await pieces.get()) is not None:
                    choice = {"index": item[0], **self.piece(item[1]), "logprobs": None, "finish_reason": None}
                    yield _event({**self._head(kind), "choices": [choice]})
                try:
                    answers = await running
                except Exception as error:  # noqa: BLE001 - whatever it is, the client is told and not left waiting
                    yield _event({"error": {"message": str(error), "type": "server_error"}})
                    return
                for index, answer in enumerate(answers):
                    last = {"index": index, **self.piece(""), "logprobs": None, "finish_reason": answer.finish_reason}
                    yield _event({**self._head(kind), "choices": [last]})
                if self.body.stream_options and self.body.stream_options.include_usage:
                    yield _event({**self._head(kind), "choices": [], "usage": _usage(answers)})
                yield "data: [DONE]\n\n"
            finally:  # also where the client went away
                self.abandoned = True
                await asyncio.wait([running])

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"{self.prefix}-{self.number}", "object": kind, "created": self.created, "model": self.name}


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    """One prompt or several, each a text or token ids."""
    several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
    return list(prompt) if several else [prompt]


def _usage(answers: list[Answer]) -> dict[str, int]:
    asked, written = sum(a.num_prompt_tokens for a in answers), sum(len(a.tokens) for a in answers)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": content}, status_code=status)


def run(generator: TextGenerator, name: str, *, host: str, port: int, max_concurrent: int) -> None:
    """Serves until it is interrupted.

    Raises:
        OSError: the port is taken.
    """
    with listening(host, port) as listener:
        base = f"http://{host}:{listener.getsockname()[1]}"
        typer.echo(f"{name} is served at {base}/v1 (OpenAI's interface); stop with Ctrl-C")
        config = uvicorn.Config(build(generator, name, max_concurrent=max_concurrent), log_level="warning")
        with suppress(KeyboardInterrupt):  # raised again by uvicorn after it has ended in order
            uvicorn.Server(config).run(sockets=[listener])
    generator.close()
