"""Task: store the weights of a checkpoint in fewer bits."""

from prefect import task

from infra.caching import stage_key, stage_policy
from infra.stage import run_stage, work_directory
from infra.tracking import Parent, StageResult
from tasks.quantization import QuantizationMethod
from tasks.quantization.summary import QuantizationSummary

DECIDES = ("tasks.quantization.apply", ("torch", "transformers", "compressed-tensors"))


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
    *,
    parent: Parent,
    label: str = "",
) -> StageResult:
    """`checkpoint` with its weights quantized by `method`, on grids chosen by `scores` where it leaves a choice."""
    inputs = {"checkpoint": checkpoint, "data": data, "method": method, "scores": scores}
    key = stage_key("quantize", inputs, *DECIDES, None)
    return run_stage(
        "quantize",
        "tasks.quantization.apply:quantize_checkpoint",
        parent=parent,
        inputs=[checkpoint, data, *([scores] if scores else [])],
        arguments={
            "checkpoint": checkpoint.artifact.path,
            "data": data.artifact.path,
            "method": method,
            "scores": scores.artifact.path if scores else None,
        },
        params={"quantization": method},
        result=QuantizationSummary,
        kind="checkpoint",
        label=label,
        is_model=True,
        work_dir=work_directory(key),
    )
