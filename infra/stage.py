"""One stage from its inputs to its recorded result; what every task in tasks/ does around its algorithm."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from infra.artifacts import fetch, new_directory, publish
from infra.console import stage_progress
from infra.isolation import run_isolated
from infra.progress import page_progress
from infra.settings import settings
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
        timeout_s: after which it is ended, with all it started; None: never.

    Raises:
        StageError: it failed, crashed, or took too long.
        InfrastructureError: not the stage failed, but the disk.
    """
    for each in inputs:
        fetch(each.artifact)
    out = new_directory()
    if work_dir:
        work_dir.mkdir(parents=True, exist_ok=True)
        arguments = {**arguments, "work_dir": work_dir}
    title = f"{label} {stage}".strip()
    try:
        with (
            stage_run(title, parent, params=params, inputs=inputs) as run,
            stage_progress(title) as bar,
            page_progress(title) as page,
        ):

            def on_progress(step: int, total: int, metrics: dict[str, float]) -> None:
                bar(step, total, metrics)
                page(step, total)
                run.progress(step, total, metrics)

            try:
                value, finished = run_isolated(
                    function,
                    {**arguments, "out": out},
                    result=result,
                    log_path=settings().home / "logs" / f"{run.run_id}.log",
                    on_progress=on_progress,
                    timeout_s=timeout_s,
                )
            except BaseException:
                shutil.rmtree(out, ignore_errors=True)  # before it is recorded: that needs room on the disk too
                raise
            _log_child(run, settings().home / "logs" / f"{run.run_id}.log")
            done = run.finish(
                publish(out),
                kind=kind,
                metrics=value,
                model=is_model,
                about=about,
                elapsed_s=finished.elapsed_s,
                peak_memory_mib=finished.peak_memory_mib,
            )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if work_dir:
        shutil.rmtree(work_dir, ignore_errors=True)
    return done


def _log_child(run: StageRun, log: Path) -> None:
    if log.exists() and log.stat().st_size:
        run.log_file(log)
