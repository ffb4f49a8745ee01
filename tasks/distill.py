"""Tasks: train a smaller student on a teacher's answers; train a pruned model to recover."""

from prefect import task

from infra.caching import stage_key, stage_policy
from infra.stage import run_stage, work_directory
from infra.tracking import Parent, StageResult
from tasks.distillation import Distillation, Recovery
from tasks.distillation.training import TrainingSummary

DECIDES = ("tasks.distillation.training", ("torch", "transformers", "accelerate"))


@task(
    name="distill",
    task_run_name="distill-{label}",
    cache_policy=stage_policy(DECIDES[0], *DECIDES[1]),
    persist_result=True,
    result_serializer="json",
)
def distill(
    teacher: StageResult, data: StageResult, options: Distillation, seed: int, *, parent: Parent, label: str = ""
) -> StageResult:
    """A student made of some of the teacher's layers and trained on its soft targets."""
    key = stage_key("distill", {"teacher": teacher, "data": data, "options": options, "seed": seed}, *DECIDES, None)
    return run_stage(
        "distill",
        "tasks.distillation.training:distill",
        parent=parent,
        inputs=[teacher, data],
        arguments={
            "teacher": teacher.artifact.path,
            "data": data.artifact.path,
            "options": options.shared_by(parent.training.processes),
            "seed": seed,
        },
        params={"distillation": options, "seed": seed},
        result=TrainingSummary,
        kind="checkpoint",
        label=label,
        is_model=True,
        work_dir=work_directory(key),
        together=True,
    )


@task(
    name="recover",
    task_run_name="recover-{label}",
    cache_policy=stage_policy(DECIDES[0], *DECIDES[1]),
    persist_result=True,
    result_serializer="json",
)
def recover(
    checkpoint: StageResult,
    teacher: StageResult,
    data: StageResult,
    options: Recovery,
    seed: int,
    *,
    parent: Parent,
    label: str = "",
) -> StageResult:
    """The pruned `checkpoint`, trained on the answers of the model it was pruned from."""
    content = {"checkpoint": checkpoint, "teacher": teacher, "data": data, "options": options, "seed": seed}
    return run_stage(
        "recover",
        "tasks.distillation.training:recover",
        parent=parent,
        inputs=[checkpoint, teacher, data],
        arguments={
            "checkpoint": checkpoint.artifact.path,
            "teacher": teacher.artifact.path,
            "data": data.artifact.path,
            "options": options.shared_by(parent.training.processes),
            "seed": seed,
        },
        params={"recovery": options, "seed": seed},
        result=TrainingSummary,
        kind="checkpoint",
        label=label,
        is_model=True,
        work_dir=work_directory(stage_key("recover", content, *DECIDES, None)),
        together=True,
    )
