"""Tiny bundles for tests of the registry; as a process, one of several that register many: PARENT NAME COUNT FOLDER."""

import json
import sys
from pathlib import Path

from infra.artifacts import new_directory, publish
from infra.registry import Submission, Version, register
from infra.settings import settings
from infra.tracking import Parent, StageResult, start_flow


def tiny(content: str) -> StageResult:
    """A bundle that nothing loads, as a stage would return it."""
    directory = new_directory()
    (directory / "manifest.json").write_text(json.dumps({"content": content}))
    artifact = publish(directory)
    return StageResult(
        artifact=artifact, kind="engine", metrics={}, elapsed_s=0.0, peak_memory_mib=None, run_id="", model_id=None
    )


def code(folder: Path) -> dict[str, object]:
    """Code of a served model that is small, where only the registry is looked at."""
    (folder / "package").mkdir(parents=True, exist_ok=True)
    (folder / "package" / "inner.py").write_text("ANSWER = 'yes'\n")
    (folder / "served.py").write_text(
        "import mlflow\n"
        "from mlflow.pyfunc.model import PythonModel\n"
        "class Served(PythonModel):\n"
        "    def predict(self, context, model_input: list[str], params=None) -> list[str]:\n"
        "        return model_input\n"
        "mlflow.models.set_model(Served())\n"
    )
    return {"python_model": folder / "served.py", "code_paths": [folder / "package"]}


def many(parent: str, name: str, count: str, folder: str) -> None:
    """Register `count` bundles of this process, and one that the others have too."""
    made, within = [], Parent.model_validate_json(parent)
    for content in [*(f"{name} {number}" for number in range(int(count))), "the same"]:
        bundle = tiny(content)
        given = code(Path(folder) / name)
        version = register("many", bundle=bundle, parent=within, verdict="ACCEPT", **given)  # type: ignore[arg-type]
        assert isinstance(version, Version)
        made.append((bundle.artifact.sha256, version.version))
    print(json.dumps(made))  # noqa: T201


def submit(model: str = "many", content: str = "submitted") -> Version | Submission:
    """Register one bundle, or submit it where this account may not."""
    parent = start_flow("many", recipe_json="{}", tags={})
    given = code(settings().home / "code")
    return register(model, bundle=tiny(content), parent=parent, verdict="ACCEPT", **given)  # type: ignore[arg-type]


if __name__ == "__main__":
    many(*sys.argv[1:])
