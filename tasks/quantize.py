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
    checkpoint: StageResult, data: StageResult, method: QuantizationMethod, *, parent: Parent, label: str = ""
) -> StageResult:
    """`checkpoint` with its weights quantized by `method`."""
    key = stage_key("quantize", {"checkpoint": checkpoint, "data": data, "method": method}, *DECIDES, None)
    return run_stage(
        "quantize",
        "tasks.quantization.apply:quantize_checkpoint",
        parent=parent,
        inputs=[checkpoint, data],
        arguments={"checkpoint": checkpoint.artifact.path, "data": data.artifact.path, "method": method},
        params={"quantization": method},
        result=QuantizationSummary,
        kind="checkpoint",
        label=label,
        is_model=True,
        work_dir=work_directory(key),
    )
