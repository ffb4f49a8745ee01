"""Tasks: what the original says, how well a candidate says it, and how fast all of them are."""

from prefect import task

from infra.caching import stage_policy
from infra.settings import settings
from infra.stage import run_stage
from infra.tracking import Parent, StageResult
from tasks.compile import LIBRARIES
from tasks.validation import Load, Quality, Speed
from tasks.validation.latency import SpeedSummary, Subject
from tasks.validation.load import LoadSummary
from tasks.validation.quality import QualitySummary, ReferenceSummary


@task(
    name="measure-reference",
    task_run_name="measure-reference",
    cache_policy=stage_policy("tasks.validation.quality", *LIBRARIES),
    persist_result=True,
    result_serializer="json",
)
def measure_reference(
    checkpoint: StageResult, data: StageResult, options: Quality, *, parent: Parent, label: str = ""
) -> StageResult:
    """The original's answers on the evaluation tokens, in PyTorch: what candidates are compared with."""
    return run_stage(
        "reference",
        "tasks.validation.quality:measure_reference",
        parent=parent,
        inputs=[checkpoint, data],
        arguments={
            "checkpoint": checkpoint.artifact.path,
            "data": data.artifact.path,
            "options": options,
            "threads": settings().num_threads,
        },
        params={"quality": options},
        result=ReferenceSummary,
        kind="measurement",
        about=checkpoint,
        label=label,
    )


@task(
    name="measure-quality",
    task_run_name="quality-{label}",
    cache_policy=stage_policy("tasks.validation.quality", *LIBRARIES, measured=True),
    persist_result=True,
    result_serializer="json",
)
def measure_quality(
    bundle: StageResult,
    reference: StageResult,
    data: StageResult,
    options: Quality,
    *,
    timeout_s: float | None = None,
    parent: Parent,
    label: str = "",
) -> StageResult:
    """Perplexity of an engine bundle and its agreement with the original, item by item."""
    return run_stage(
        "quality",
        "tasks.validation.quality:measure_quality",
        parent=parent,
        inputs=[bundle, reference, data],
        arguments={
            "bundle": bundle.artifact.path,
            "reference": reference.artifact.path,
            "data": data.artifact.path,
            "options": options,
            "threads": settings().num_threads,
        },
        params={"quality": options},
        result=QualitySummary,
        kind="measurement",
        about=bundle,
        label=label,
        timeout_s=timeout_s,
    )


@task(
    name="measure-speed",
    task_run_name="measure-speed",
    cache_policy=stage_policy("tasks.validation.latency", *LIBRARIES, "psutil", measured=True),
    persist_result=True,
    result_serializer="json",
)
def measure_speed(
    bundles: dict[str, StageResult],
    baselines: dict[str, str],
    original: StageResult,
    data: StageResult,
    options: Speed,
    counters: str,
    *,
    parent: Parent,
    label: str = "",
) -> StageResult:
    """Latency, throughput and memory of every bundle and of the original, interleaved in one run.

    `baselines` names, for a bundle, the bundle of the unchanged model in the same engine. `counters` says what tells
    energy and memory of GPUs here: where that changes, it is measured again.
    """
    subjects = [
        Subject(name=name, bundle=bundle.artifact.path, baseline=baselines.get(name))
        for name, bundle in bundles.items()
    ]
    return run_stage(
        "speed",
        "tasks.validation.latency:measure_speed",
        parent=parent,
        inputs=[*bundles.values(), original, data],
        arguments={
            "subjects": subjects,
            "original": original.artifact.path,
            "data": data.artifact.path,
            "options": options,
            "threads": settings().num_threads,
        },
        params={"speed": options, "subjects": ", ".join(bundles), "counters": counters},
        result=SpeedSummary,
        kind="measurement",
        label=label,
    )


@task(
    name="measure-load",
    task_run_name="measure-load",
    cache_policy=stage_policy("tasks.validation.load", *LIBRARIES, measured=True),
    persist_result=True,
    result_serializer="json",
)
def measure_load(
    bundles: dict[str, StageResult], data: StageResult, options: Load, *, parent: Parent, label: str = ""
) -> StageResult:
    """Every bundle, served to many users at a time: throughput, latency and goodput by the level of load."""
    return run_stage(
        "load",
        "tasks.validation.load:measure_load",
        parent=parent,
        inputs=[*bundles.values(), data],
        arguments={
            "subjects": [Subject(name=name, bundle=bundle.artifact.path) for name, bundle in bundles.items()],
            "data": data.artifact.path,
            "options": options,
            "threads": settings().num_threads,
        },
        params={"load": options, "subjects": ", ".join(bundles)},
        result=LoadSummary,
        kind="measurement",
        label=label,
    )
