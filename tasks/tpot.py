"""Task: how long a token takes on the target engine with each choice; what mixed precision keeps a time budget by."""

from prefect import task

from infra.caching import stage_policy
from infra.settings import settings
from infra.stage import run_stage
from infra.tracking import Parent, StageResult
from tasks.compile import LIBRARIES
from tasks.engines import Engine
from tasks.quantization import Grid
from tasks.quantization.activations import Format
from tasks.quantization.token_times import TokenTimes
from tasks.validation import Speed


@task(
    name="measure-tpot",
    task_run_name="measure-tpot-{label}",
    cache_policy=stage_policy("tasks.validation.tpot", *LIBRARIES, "compressed-tensors", "psutil", measured=True),
    persist_result=True,
    result_serializer="json",
)
def measure_tpot(
    checkpoint: StageResult,
    data: StageResult,
    engine: Engine,
    choices: tuple[Grid, ...],
    tables: tuple[Grid | None, ...],
    ignore: tuple[str, ...],
    kv_cache: Format | None,
    options: Speed,
    *,
    parent: Parent,
    label: str = "",
) -> StageResult:
    """The time of a token on `engine` with each choice; whatever the budget, the same."""
    chosen = {"engine": engine, "choices": choices, "tables": tables, "ignore": ignore, "kv_cache": kv_cache}
    return run_stage(
        "measure-tpot",
        "tasks.validation.tpot:measure_tpot",
        parent=parent,
        inputs=[checkpoint, data],
        arguments={
            "checkpoint": checkpoint.artifact.path,
            "data": data.artifact.path,
            "options": options,
            "threads": settings().num_threads,
            **chosen,
        },
        params={**chosen, "speed": options},
        result=TokenTimes,
        kind="measurement",
        label=label,
        about=checkpoint,
    )
