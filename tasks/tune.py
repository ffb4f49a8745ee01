"""Task: the settings with which an engine bundle is fastest on this machine."""

from prefect import task

from infra.caching import stage_policy
from infra.settings import settings
from infra.stage import run_stage
from infra.tracking import Parent, StageResult
from tasks.compile import LIBRARIES
from tasks.engines.compiling import TunedSummary
from tasks.engines.tuning import Tuning


@task(
    name="tune",
    task_run_name="tune-{label}",
    cache_policy=stage_policy("tasks.engines.compiling", *LIBRARIES, measured=True),
    persist_result=True,
    result_serializer="json",
)
def tune_engine(bundle: StageResult, options: Tuning, *, parent: Parent, label: str = "") -> StageResult:
    """The same bundle with the settings in its manifest, which everything that loads it here uses."""
    return run_stage(
        "tune",
        "tasks.engines.compiling:tune_copy",
        parent=parent,
        inputs=[bundle],
        arguments={
            "bundle": bundle.artifact.path,
            "compiled": bundle.metrics,
            "options": options,
            "max_threads": settings().num_threads,
        },
        params={"tune": options},
        result=TunedSummary,
        kind="engine",
        label=label,
        is_model=True,
    )
