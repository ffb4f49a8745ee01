"""An accepted engine bundle becomes a version of the registered model; the verdict on any other is noted in MLflow."""

from collections.abc import Mapping
from pathlib import Path

from infra import registry
from infra.artifacts import fetch
from infra.registry import Submission, Version
from infra.tracking import Parent, StageResult
from tasks.calibration.exported_families import kind_at
from tasks.validation.verdicts import Judgement

ROOT = Path(__file__).parents[1]


def register(
    model: str, bundle: StageResult, *, parent: Parent, verdict: str, tags: dict[str, str], description: str
) -> Version | Submission:
    """The version of `model` that serves `bundle`, with alias `candidate`; see `infra.registry.register`."""
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


def record_verdicts(bundles: Mapping[str, StageResult], judgements: Mapping[str, Judgement], parent: Parent) -> None:
    """Note the verdict on every judged bundle, whether it gets a version or not."""
    for name, judgement in judgements.items():
        if name in bundles:
            registry.record_verdict(bundles[name], parent, verdict=judgement.verdict, why=judgement.sentence, name=name)
