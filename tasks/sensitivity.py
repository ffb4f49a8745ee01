"""Task: how much each part of a model minds being rounded; what mixed precision chooses by."""

from prefect import task

from infra.caching import stage_key, stage_policy
from infra.stage import run_stage, work_directory
from infra.tracking import Parent, StageResult
from tasks.quantization import Grid
from tasks.quantization.sensitivity import SensitivitySummary

DECIDES = ("tasks.quantization.sensitivity", ("torch", "transformers"))


@task(
    name="measure-sensitivity",
    task_run_name="measure-sensitivity-{label}",
    cache_policy=stage_policy(DECIDES[0], *DECIDES[1]),
    persist_result=True,
    result_serializer="json",
)
def measure_sensitivity(
    checkpoint: StageResult,
    data: StageResult,
    choices: tuple[Grid, ...],
    embedding_choices: tuple[Grid, ...],
    ignore: tuple[str, ...],
    *,
    parent: Parent,
    label: str = "",
) -> StageResult:
    """The divergence that each part of `checkpoint` causes on each choice; whatever the budget, the same."""
    options = {"choices": choices, "embedding_choices": embedding_choices, "ignore": ignore}
    key = stage_key("measure-sensitivity", {"checkpoint": checkpoint, "data": data, **options}, *DECIDES, None)
    return run_stage(
        "measure-sensitivity",
        "tasks.quantization.sensitivity:measure_sensitivity",
        parent=parent,
        inputs=[checkpoint, data],
        arguments={"checkpoint": checkpoint.artifact.path, "data": data.artifact.path, **options},
        params=options,
        result=SensitivitySummary,
        kind="measurement",
        label=label,
        about=checkpoint,
        work_dir=work_directory(key),
    )
