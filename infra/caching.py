"""When an earlier result of a stage may stand in for running it again.

Prefect's TASK_SOURCE sees only the task function: with it, a changed algorithm served a stale model. The key here
digests what decides a stage's result: the contents of its inputs, its options, the source it depends on (followed
through imports) and the versions of the libraries it computes with.
"""

import ast
import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefect import Task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import FlowRunContext, TaskRunContext
from prefect.filesystems import WritableFileSystem
from prefect.results import ResultRecord, get_default_result_storage  # type: ignore[attr-defined]
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from infra import s3
from infra.artifacts import Artifact
from infra.hardware import hardware, versions
from infra.settings import settings

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
OURS = ("flows", "tasks", "infra")
NOT_KEYED = ("parent", "label", "timeout_s")
"""Task parameters that say where to record, what to call a run and when to give up, and change nothing about its
result."""


def _source_file(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _imports(module: str) -> frozenset[str]:
    """Our own modules that `module` imports anywhere in its text, packages on the way included."""
    file = _source_file(module)
    found: set[str] = set()
    if file is None:
        return frozenset()
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
        if name.split(".")[0] in OURS:
            parts = name.split(".")
            found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return frozenset(name for name in found if _source_file(name))


@cache
def sources(module: str) -> tuple[Path, ...]:
    """Every source file of ours that `module` depends on, itself included, in order of name."""
    seen, ahead = set(), [module]
    while ahead:
        name = ahead.pop()
        if name in seen:
            continue
        seen.add(name)
        ahead += _imports(name)
    return tuple(sorted({file for name in seen if (file := _source_file(name))}))


@cache
def source_digest(module: str) -> str:
    """SHA-256 over the `sources` of `module` and the data files (templates) beside them."""
    if _source_file(module) is None:
        raise ValueError(f"There is no module {module!r} of ours to digest.")
    digest = hashlib.sha256()
    for file in sources(module):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    for file in sorted(_source_file(module).parent.glob("*.j2")):  # type: ignore[union-attr]
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def content(value: Any) -> Any:
    """What of a task's argument decides the result: of artifacts, their digest, not where they lie."""
    if isinstance(value, Artifact):
        return value.sha256
    if isinstance(value, BaseModel) and isinstance(getattr(value, "artifact", None), Artifact):
        return value.artifact.sha256  # type: ignore[attr-defined]
    if isinstance(value, list | tuple):
        return [content(v) for v in value]
    if isinstance(value, dict):
        return {k: content(v) for k, v in value.items()}
    return to_jsonable_python(value)


def stage_key(task_name: str, parameters: dict[str, Any], module: str, libraries: tuple[str, ...], on: Any) -> str:
    """The digest under which the result of a stage is kept; a readable prefix says which stage."""
    key = {
        "task": task_name,
        "inputs": {k: content(v) for k, v in sorted(parameters.items()) if k not in NOT_KEYED},
        "source": source_digest(module),
        "libraries": versions(*libraries),
        "on": on,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return f"{task_name}-{digest}"


def stage_policy(module: str, *libraries: str, measured: bool = False) -> CacheKeyFnPolicy:
    """The cache policy of a stage whose work is done by `module` with `libraries`.

    Args:
        module: the algorithm module whose source, with all it imports, decides the result.
        libraries: distributions whose version decides the result.
        measured: the result holds for this machine and number of threads only (engines, speed).
    """

    def key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
        on = {**hardware(), "threads": settings().num_threads} if measured else None
        return stage_key(context.task.name, parameters, module, libraries, on)

    return CacheKeyFnPolicy(cache_key_fn=key)


class StoredResults(WritableFileSystem):
    """Prefect's records of results in the bucket of the artifacts they name, as JSON.

    A block of our own rather than prefect-aws's: it has the artifacts' retries, encryption and settings, and there is
    no block to save in every Prefect server and no key in its database.
    """

    _block_type_name = "Slimline results"

    uri: str

    # Prefect calls these when it is not asynchronous, and says so by `_sync`.
    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]
        found = s3.read(f"{self.uri}/{path}")
        if found is None:
            raise FileNotFoundError(f"There is no result {path} at {self.uri}.")
        return found

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> None:  # type: ignore[override]
        try:
            s3.write(f"{self.uri}/{path}", content)
        except Exception as error:  # Prefect goes on without a word
            logger.warning("the result %s could not be kept, so that the stage will be run again: %s", path, error)
            raise

    async def aread_path(self, path: str) -> bytes:
        return await asyncio.to_thread(self.read_path, path)

    async def awrite_path(self, path: str, content: bytes) -> None:
        await asyncio.to_thread(self.write_path, path, content)

    def _resolve_path(self, path: str) -> None:
        """Prefect asks blocks that it has not saved for the path of a key. Keys are names here."""


def _result_storage() -> Any:
    """Where results are kept: beside the artifacts of a store, else where Prefect keeps them, which is in the home."""
    if store := settings().store:
        return StoredResults(uri=f"{store}/results")
    context = FlowRunContext.get()  # it knows; the default is asked of Prefect's server, every time
    return context.result_store.result_storage if context else get_default_result_storage(_sync=True)  # type: ignore[call-arg]


@contextmanager
def shared_results() -> Iterator[None]:
    """Within, in a flow, tasks find and keep their results in the store, so that other machines find them too."""
    context = FlowRunContext.get()
    if context is None or not settings().store:
        yield
        return
    results = context.result_store.model_copy(update={"result_storage": _result_storage()})
    with context.model_copy(update={"result_store": results}):
        yield


def cache_key(task: Task[..., Any], arguments: dict[str, Any]) -> str | None:
    """Under which the result of calling `task` with `arguments` is kept; None: it is not."""
    policy = task.cache_policy
    if not isinstance(policy, CacheKeyFnPolicy) or policy.cache_key_fn is None:
        return None
    return policy.cache_key_fn(SimpleNamespace(task=task), arguments)  # type: ignore[arg-type]


def current_key() -> str | None:
    """Under which the result of the task that is running is kept; None outside of one."""
    context = TaskRunContext.get()
    return cache_key(context.task, context.parameters) if context else None


def earlier_result(task: Task[..., Any], arguments: dict[str, Any]) -> Any | None:
    """The result that calling `task` with `arguments` would be served from the cache, or None if it would run.

    Raises:
        ConnectionError: the store does not answer.
    """
    from prefect.settings import PREFECT_TASKS_REFRESH_CACHE

    refreshed = PREFECT_TASKS_REFRESH_CACHE.value() if task.refresh_cache is None else task.refresh_cache
    return None if refreshed else kept_result(task, arguments)


def kept_result(task: Task[..., Any], arguments: dict[str, Any]) -> Any | None:
    """The result of an earlier call of `task` with `arguments`, or None if none is kept.

    Raises:
        ConnectionError: the store does not answer.
    """
    key = cache_key(task, arguments)
    if not key:
        return None
    storage = _result_storage()
    try:  # not with Prefect's `exists`, which takes a store that is away for one without the result
        return ResultRecord.deserialize(storage.read_path(key, _sync=True)).result
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except Exception:  # noqa: BLE001  Prefect's words for no such file, or a record of another version: the stage runs
        return None
