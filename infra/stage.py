"""One stage from its inputs to its recorded result; what every task in tasks/ does around its algorithm."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from infra.artifacts import Artifact, exists, fetch, new_directory, publish
from infra.caching import current_key
from infra.console import stage_progress
from infra.failures import is_transient
from infra.isolation import Finished, run_isolated
from infra.progress import page_progress
from infra.settings import settings
from infra.torchrun import Torchrun
from infra.tracking import Parent, StageResult, StageRun, stage_run


def work_directory(key: str) -> Path:
    """Where the stage with this cache key keeps what must survive a SIGKILL; `run_stage` removes it at the end."""
    return settings().home / "work" / key


def run_stage(
    stage: str,
    function: str,
    *,
    parent: Parent,
    inputs: Sequence[StageResult],
    arguments: dict[str, Any],
    params: dict[str, Any],
    result: type[BaseModel],
    kind: str,
    label: str = "",
    about: StageResult | None = None,
    is_model: bool = False,
    work_dir: Path | None = None,
    timeout_s: float | None = None,
    together: bool = False,
) -> StageResult:
    """Call the stage function in its own process, publish what it wrote, and record it as a child of `parent`.

    Args:
        stage: the stage's name in MLflow and on the terminal.
        function: "package.module:name"; gets `arguments` and `out`, an empty directory.
        inputs: earlier results it works on, which are fetched, so that `arguments` may name their paths; lineage leads
            to them.
        params: what to show as the run's parameters.
        result: the model that the function returns; its figures become metrics.
        kind: what the published directory is: checkpoint, data, engine, measurement.
        label: which candidate this is for; only for people.
        about: the model that was measured, when the result is a measurement.
        is_model: whether the result is a model, a node of the lineage.
        work_dir: kept when the stage fails or is killed, so that it can go on; removed when it is done.
        timeout_s: after which it is ended, with all it started; None: as `parent` says.
        together: it may be called by several processes at once, as many as `parent` says; needs `work_dir`.

    What was computed is noted before it is published and recorded: if a store or server is gone by then, the next
    attempt, of this run or of a later one, only does that. `forget` removes the note.

    Raises:
        StageError: it failed, crashed, or took too long.
        InfrastructureError: not the stage failed, but the disk.
    """
    for each in inputs:
        fetch(each.artifact)
    key = current_key()
    tags = {"slimline.key": key} if key else {}
    out = new_directory()
    if work_dir:
        work_dir.mkdir(parents=True, exist_ok=True)
        arguments = {**arguments, "work_dir": work_dir}
    title = f"{label} {stage}".strip()
    try:
        with (
            stage_run(title, parent, params=params, inputs=inputs, tags=tags) as run,
            stage_progress(title) as bar,
            page_progress(title) as page,
        ):

            def on_progress(step: int, total: int, metrics: dict[str, float]) -> None:
                bar(step, total, metrics)
                page(step, total)
                run.progress(step, total, metrics)

            computed = _noted(key)
            if computed:
                run.set_tags({"slimline.computed": "by an attempt that was ended before it was recorded"})
            else:
                if together and parent.training.processes > 1:
                    function, arguments = _together(function, arguments, parent.training)
                try:
                    _, finished = run_isolated(
                        function,
                        {**arguments, "out": out},
                        result=result,
                        log_path=settings().home / "logs" / f"{run.run_id}.log",
                        on_progress=on_progress,
                        timeout_s=timeout_s or parent.stage_timeout_s,
                    )
                except BaseException:
                    shutil.rmtree(out, ignore_errors=True)  # before it is recorded: that needs room on the disk too
                    raise
                computed = _note(key, out, finished)
            artifact = computed.artifact or _publish(key, computed)
            _log_child(run, settings().home / "logs" / f"{run.run_id}.log")
            done = run.finish(
                artifact,
                kind=kind,
                metrics=result.model_validate(computed.finished.value),
                model=is_model,
                about=about,
                elapsed_s=computed.finished.elapsed_s,
                peak_memory_mib=computed.finished.peak_memory_mib,
            )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if work_dir:
        shutil.rmtree(work_dir, ignore_errors=True)
    return done


def _together(function: str, arguments: dict[str, Any], how: Torchrun) -> tuple[str, dict[str, Any]]:
    """The stage function that calls `function` in several processes, and its arguments."""
    given = {name: value for name, value in arguments.items() if name != "work_dir"}
    return "infra.torchrun:run", {
        "function": function,
        "arguments": to_jsonable_python(given),
        "how": how,
        "work_dir": arguments["work_dir"],
    }


class _Computed(BaseModel, frozen=True):
    """What a stage computed, until it is recorded; in `directory` until it is published."""

    directory: Path
    finished: Finished
    artifact: Artifact | None = None


def _place(key: str) -> Path:
    return settings().home / "computed" / key


def _noted(key: str | None) -> _Computed | None:
    """What an earlier attempt computed and did not get to record."""
    note = _place(key) / "note.json" if key else None
    if note is None or not note.exists():
        return None
    try:
        found = _Computed.model_validate(json.loads(note.read_bytes()))  # pydantic's own JSON has no NaN
    except ValidationError:  # of another version
        return None
    return found if found.directory.exists() or (found.artifact and exists(found.artifact)) else None


def _note(key: str | None, out: Path, finished: Finished) -> _Computed:
    """Keep what was computed where the next attempt finds it."""
    if key is None:
        return _Computed(directory=out, finished=finished)
    place = _place(key)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    computed = _Computed(directory=out.rename(place / "files"), finished=finished)
    _write(key, computed)
    return computed


def _publish(key: str | None, computed: _Computed) -> Artifact:
    try:
        artifact = publish(computed.directory)
    except Exception as error:
        if key and not is_transient(error):  # it needs the room
            forget(key)
        raise
    if key:
        _write(key, computed.model_copy(update={"artifact": artifact}))
    return artifact


def _write(key: str, computed: _Computed) -> None:
    draft = _place(key) / "note.tmp"  # the stage's lock is held: nobody else writes it
    draft.write_text(json.dumps(computed.model_dump(), default=str))  # paths; NaN stays
    draft.replace(_place(key) / "note.json")


def forget(key: str) -> None:
    """Remove the note of what was computed; for when the stage's result is kept."""
    shutil.rmtree(_place(key), ignore_errors=True)


def _log_child(run: StageRun, log: Path) -> None:
    if log.exists() and log.stat().st_size:
        run.log_file(log)
