"""Task: bring an engine bundle from where it lies into the store."""

from pathlib import Path

from prefect import task

from infra.caching import stage_policy
from infra.stage import run_stage
from infra.tracking import Parent, StageResult
from tasks.compile import LIBRARIES
from tasks.engines.importing import ImportedSummary


@task(
    name="import-bundle",
    task_run_name="import-bundle-{label}",
    cache_policy=stage_policy("tasks.engines.importing", *LIBRARIES, measured=True),
    persist_result=True,
    result_serializer="json",
)
def import_bundle(bundle: str, manifest_sha256: str, *, parent: Parent, label: str = "") -> StageResult:
    """The bundle in the directory `bundle`, whose manifest names every file's digest."""
    return run_stage(
        "import-bundle",
        "tasks.engines.importing:import_bundle",
        parent=parent,
        inputs=[],
        arguments={"bundle": Path(bundle)},
        params={"bundle": bundle, "manifest_sha256": manifest_sha256},
        result=ImportedSummary,
        kind="engine",
        label=label,
        is_model=True,
    )
