"""Task: compile a checkpoint for an engine, and compare the engine with PyTorch."""

from prefect import task

from infra.caching import stage_policy
from infra.settings import settings
from infra.stage import run_stage
from infra.tracking import Parent, StageResult
from tasks.engines import Engine
from tasks.engines.compiling import EngineSummary

LIBRARIES = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "openvino-tokenizers",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


@task(
    name="compile",
    task_run_name="compile-{label}",
    cache_policy=stage_policy("tasks.engines.compiling", *LIBRARIES, measured=True),
    persist_result=True,
    result_serializer="json",
)
def compile_engine(
    checkpoint: StageResult, data: StageResult, engine: Engine, *, parent: Parent, label: str = ""
) -> StageResult:
    """An engine bundle: the engine's own files, the tokenizer and a manifest."""
    return run_stage(
        "compile",
        "tasks.engines.compiling:compile_engine",
        parent=parent,
        inputs=[checkpoint, data],
        arguments={
            "checkpoint": checkpoint.artifact.path,
            "data": data.artifact.path,
            "engine": engine,
            "threads": settings().num_threads,
        },
        params={"engine": engine},
        result=EngineSummary,
        kind="engine",
        label=label,
        is_model=True,
    )
