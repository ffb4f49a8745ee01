"""Task: remove weights or structures of a checkpoint."""

from prefect import task

from infra.caching import stage_policy
from infra.stage import run_stage
from infra.tracking import Parent, StageResult
from tasks.pruning import PruningMethod
from tasks.pruning.apply import PruningSummary


@task(
    name="prune",
    task_run_name="prune-{label}",
    cache_policy=stage_policy("tasks.pruning.apply", "torch", "transformers"),
    persist_result=True,
    result_serializer="json",
)
def prune(
    checkpoint: StageResult, data: StageResult, method: PruningMethod, *, parent: Parent, label: str = ""
) -> StageResult:
    """`checkpoint` pruned with `method`, calibrated on the calibration tokens of `data`."""
    return run_stage(
        "prune",
        "tasks.pruning.apply:prune_checkpoint",
        parent=parent,
        inputs=[checkpoint, data],
        arguments={"checkpoint": checkpoint.artifact.path, "data": data.artifact.path, "method": method},
        params={"pruning": method},
        result=PruningSummary,
        kind="checkpoint",
        label=label,
        is_model=True,
    )
