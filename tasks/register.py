"""Task: an accepted engine bundle becomes a version of the registered model."""

from pathlib import Path

from infra import registry
from infra.artifacts import fetch
from infra.registry import Version
from infra.tracking import Parent, StageResult
from tasks.calibration.exported_families import kind_at

ROOT = Path(__file__).parents[1]


def register(
    model: str, bundle: StageResult, *, parent: Parent, verdict: str, tags: dict[str, str], description: str
) -> Version:
    """The version of `model` that serves `bundle`, with alias `candidate`; the same bundle gives the same version."""
    return registry.register(
        model,
        bundle=bundle,
        parent=parent,
        verdict=verdict,
        python_model=ROOT / "tasks" / "serving.py",
        code_paths=[ROOT / "tasks", ROOT / "infra"],
        tags=tags,
        description=description,
        gives_vectors=kind_at(fetch(bundle.artifact)) == "encoder",
    )
