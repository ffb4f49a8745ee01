"""Tasks: what the original answers to the items of a benchmark, and how well each candidate does beside it."""

import shutil
from pathlib import Path

from prefect import task

from infra import s3
from infra.artifacts import new_directory
from infra.caching import stage_policy
from infra.settings import settings
from infra.stage import run_stage
from infra.tracking import Parent, StageResult
from tasks.compile import LIBRARIES
from tasks.validation.benchmarks import AnyBenchmark
from tasks.validation.benchmarks.measuring import BenchmarkSummary, OriginalAnswers

MODULE = "tasks.validation.benchmarks.measuring"
SCORERS = ("sacrebleu", "rouge-score", "lm-eval")


def benchmark_fingerprint(benchmark: AnyBenchmark) -> str:
    """What tells changed data from those of the same name.

    Raises:
        ValueError, FileNotFoundError: they do not exist or cannot be reached.
    """
    found = benchmark.data_fingerprint()
    return s3.fingerprint(benchmark.data) if found is None else found


@task(
    name="ask-original",
    task_run_name="ask-original-{label}",
    cache_policy=stage_policy(MODULE, *LIBRARIES, *SCORERS),
    persist_result=True,
    result_serializer="json",
)
def ask_original(
    checkpoint: StageResult, benchmark: AnyBenchmark, data_fingerprint: str, *, parent: Parent, label: str = ""
) -> StageResult:
    """The original's answers to a benchmark, in PyTorch: what candidates are compared with."""
    download = new_directory()
    try:
        return run_stage(
            "ask-original",
            f"{MODULE}:ask_original",
            parent=parent,
            inputs=[checkpoint],
            arguments={
                "checkpoint": checkpoint.artifact.path,
                "benchmark": benchmark,
                "data": benchmark.file() or _downloaded(benchmark.data, download),
                "threads": settings().num_threads,
            },
            params={"benchmark": benchmark, "fingerprint": data_fingerprint},
            result=OriginalAnswers,
            kind="measurement",
            about=checkpoint,
            label=label,
        )
    finally:
        shutil.rmtree(download, ignore_errors=True)


@task(
    name="measure-benchmark",
    task_run_name="benchmark-{label}",
    cache_policy=stage_policy(MODULE, *LIBRARIES, *SCORERS, measured=True),
    persist_result=True,
    result_serializer="json",
)
def measure_benchmark(
    bundle: StageResult,
    reference: StageResult,
    benchmark: AnyBenchmark,
    *,
    parent: Parent,
    label: str = "",
    timeout_s: float | None = None,
) -> StageResult:
    """How well an engine bundle answers a benchmark, item by item beside the original."""
    return run_stage(
        "benchmark",
        f"{MODULE}:measure_benchmark",
        parent=parent,
        inputs=[bundle, reference],
        arguments={
            "bundle": bundle.artifact.path,
            "reference": reference.artifact.path,
            "benchmark": benchmark,
            "threads": settings().num_threads,
        },
        params={"benchmark": benchmark},
        result=BenchmarkSummary,
        kind="measurement",
        about=bundle,
        label=label,
        timeout_s=timeout_s,
    )


def _downloaded(data: str, download: Path) -> Path:
    """The data file of an S3 location, so that the algorithm packages need no network."""
    files = [path for path in s3.download(data, download).rglob("*") if path.is_file()]
    if len(files) != 1:
        raise ValueError(f"A benchmark's data are one object; below {data} there are {len(files)}. Name one.")
    return files[0]
