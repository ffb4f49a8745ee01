"""Task: the facts that explain why a candidate is slower or worse."""

from prefect import task

from infra.caching import stage_policy
from infra.settings import settings
from infra.stage import run_stage
from infra.tracking import Parent, StageResult
from tasks.compile import LIBRARIES
from tasks.validation.diagnosis import Facts


@task(
    name="diagnose",
    task_run_name="diagnose-{label}",
    cache_policy=stage_policy("tasks.validation.diagnosis", *LIBRARIES, measured=True),
    persist_result=True,
    result_serializer="json",
)
def diagnose(
    bundle: StageResult,
    checkpoint: StageResult | None,
    original: StageResult | None,
    data: StageResult,
    *,
    parent: Parent,
    label: str = "",
) -> StageResult:
    """What an engine runs for a token, and how far each block of its checkpoint is from the original's."""
    known = [result for result in (checkpoint, original) if result]
    return run_stage(
        "diagnose",
        "tasks.validation.diagnosis:examine",
        parent=parent,
        inputs=[bundle, *known, data],
        arguments={
            "bundle": bundle.artifact.path,
            "checkpoint": checkpoint.artifact.path if checkpoint else None,
            "original": original.artifact.path if original else None,
            "data": data.artifact.path,
            "threads": settings().num_threads,
        },
        params={},
        result=Facts,
        kind="measurement",
        about=bundle,
        label=label,
    )
