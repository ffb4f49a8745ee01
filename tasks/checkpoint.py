"""Task: bring a model from where it lives into the store, as a plain checkpoint."""

import shutil
from pathlib import Path

from prefect import task

from infra import registry, s3
from infra.artifacts import new_directory
from infra.caching import stage_policy
from infra.stage import run_stage
from infra.tracking import Parent, StageResult
from tasks.calibration.checkpoints import CheckpointSummary, ParsedSource, parse_source


def fingerprint(source: str) -> str:
    """What tells a source from a changed one of the same name: versions, sizes and times; cheap, reads no weights.

    Raises:
        ValueError: the source does not exist or cannot be reached; the message says what to do.
    """
    parsed = parse_source(source)
    if parsed.kind == "s3":
        return s3.fingerprint(parsed.value)
    if parsed.kind == "mlflow":
        return registry.fingerprint(parsed.value)
    return parsed.fingerprint()


@task(
    name="import-checkpoint",
    task_run_name="import-{source}",
    cache_policy=stage_policy("tasks.calibration.checkpoints", "torch", "transformers", "gguf", "compressed-tensors"),
    persist_result=True,
    result_serializer="json",
)
def import_checkpoint(source: str, source_fingerprint: str, *, parent: Parent, label: str = "") -> StageResult:
    """The model at `source` as a plain checkpoint in the store."""
    download = new_directory()
    try:
        return run_stage(
            "import",
            "tasks.calibration.checkpoints:import_checkpoint",
            parent=parent,
            inputs=[],
            arguments={"source": str(_local(parse_source(source), download))},
            params={"source": source, "fingerprint": source_fingerprint},
            result=CheckpointSummary,
            kind="checkpoint",
            label=label,
            is_model=True,
        )
    finally:
        shutil.rmtree(download, ignore_errors=True)


def _local(source: ParsedSource, download: Path) -> str | Path:
    """Sources behind a service are downloaded here, so that the algorithm packages need no network."""
    if source.kind == "s3":
        return s3.download(source.value, download)
    if source.kind == "mlflow":
        return registry.download(source.value, download)
    return str(source)
