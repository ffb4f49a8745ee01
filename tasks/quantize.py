"""Tasks: store the weights of a checkpoint in fewer bits; train what that gave to recover."""

from prefect import task

from infra.caching import stage_key, stage_policy
from infra.stage import run_stage, work_directory
from infra.tracking import Parent, StageResult
from tasks.quantization import QuantizationMethod
from tasks.quantization.summary import QuantizationSummary
from tasks.quantization.training import QuantizationTraining, QuantizationTrainingSummary

DECIDES = ("tasks.quantization.apply", ("torch", "transformers", "compressed-tensors"))
TRAINING = ("tasks.quantization.training", ("torch", "transformers", "accelerate", "compressed-tensors"))


@task(
    name="quantize",
    task_run_name="quantize-{label}",
    cache_policy=stage_policy(DECIDES[0], *DECIDES[1]),
    persist_result=True,
    result_serializer="json",
)
def quantize(
    checkpoint: StageResult,
    data: StageResult,
    method: QuantizationMethod,
    scores: StageResult | None = None,
    times: StageResult | None = None,
    *,
    parent: Parent,
    label: str = "",
) -> StageResult:
    """`checkpoint` with its weights quantized by `method`, on grids chosen by `scores` where it leaves a choice."""
    inputs = {"checkpoint": checkpoint, "data": data, "method": method, "scores": scores, "times": times}
    key = stage_key("quantize", inputs, *DECIDES, None)
    return run_stage(
        "quantize",
        "tasks.quantization.apply:quantize_checkpoint",
        parent=parent,
        inputs=[checkpoint, data, *(measured for measured in (scores, times) if measured)],
        arguments={
            "checkpoint": checkpoint.artifact.path,
            "data": data.artifact.path,
            "method": method,
            "scores": scores.artifact.path if scores else None,
            "times": times.artifact.path if times else None,
        },
        params={"quantization": method},
        result=QuantizationSummary,
        kind="checkpoint",
        label=label,
        is_model=True,
        work_dir=work_directory(key),
    )


@task(
    name="train-quantized",
    task_run_name="train-quantized-{label}",
    cache_policy=stage_policy(TRAINING[0], *TRAINING[1]),
    persist_result=True,
    result_serializer="json",
)
def train_quantized(
    checkpoint: StageResult,
    teacher: StageResult,
    data: StageResult,
    options: QuantizationTraining,
    seed: int,
    *,
    parent: Parent,
    label: str = "",
) -> StageResult:
    """The quantized `checkpoint`, trained on the answers of the float model it was made from."""
    content = {"checkpoint": checkpoint, "teacher": teacher, "data": data, "options": options, "seed": seed}
    return run_stage(
        "train-quantized",
        "tasks.quantization.training:train_quantized",
        parent=parent,
        inputs=[checkpoint, teacher, data],
        arguments={
            "checkpoint": checkpoint.artifact.path,
            "teacher": teacher.artifact.path,
            "data": data.artifact.path,
            "options": options.shared_by(parent.training.processes),
            "seed": seed,
        },
        params={"quantization_training": options, "seed": seed},
        result=QuantizationTrainingSummary,
        kind="checkpoint",
        label=label,
        is_model=True,
        work_dir=work_directory(stage_key("train-quantized", content, *TRAINING, None)),
        together=True,
    )
