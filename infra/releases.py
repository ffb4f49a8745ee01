"""What a promotion touches: the aliases of a registered model, the copy of a version's bytes, and whether it answers.

Copies lie in the release store by their content, apart from everything that `mlflow gc` may delete. Each has all files
of a version, its signature included, so that it proves itself and a damaged version can be made whole from it.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from infra.artifacts import Artifact, Bucket, Home, Store, new_directory
from infra.isolation import StageCrashed
from infra.ledger import Entry, release_store
from infra.registry import find_model, find_version, note, stored_version
from infra.settings import PREFIX, Settings, environment, settings
from infra.signing import OF_MLFLOW, check, signature_of
from infra.tracking import RunFacts, client, run_facts, tracking_uri

CHAMPION = "champion"
PREVIOUS = "previous"
PRODUCTION = "production"
"""The folder of the release store that copies lie in."""
PROMPTS = ("The capital of France is", "def add(a, b):")
SMOKE_TEST_S = 900.0
"""After which a version that has not answered does not answer."""
SERVED_WITH = ("home", "signing_key", "trusted_keys", "threads")
"""Settings that a champion is asked with; others of ours (addresses, secrets) are not its business."""
LEDGER = "slimline.ledger"
"""Tag of a registered model: number and digest of its last entry, by which entries cut off the end are missed."""


class SmokeTestFailed(StageCrashed):
    """A champion does not answer."""


# Aliases


def holder(model: str, alias: str) -> str | None:
    """The version with this alias."""
    found = find_model(model).aliases.get(alias)
    return None if found is None else str(found)


def point(model: str, alias: str, version: str) -> None:
    """Move the alias to this version: one request, so there is always exactly one holder."""
    client().set_registered_model_alias(model, alias, version)


def unpoint(model: str, alias: str) -> None:
    """Take the alias from whoever has it."""
    client().delete_registered_model_alias(model, alias)


def tell_registry(entry: Entry) -> None:
    """Write on the version's page what the ledger says of it, and on the model's where the ledger ends."""
    told = f"{entry.time:%Y-%m-%d %H:%M} UTC by {entry.who}: {entry.why}"[:5000]
    note(entry.model, entry.version, {f"release.{entry.what.replace(' ', '_')}": told})
    client().set_registered_model_tag(entry.model, LEDGER, f"{entry.number} {entry.digest}")


def told_to_registry(model: str) -> tuple[int, str] | None:
    """Number and digest of the last entry that MLflow was told of."""
    number, _, digest = find_model(model).tags.get(LEDGER, "").partition(" ")
    return (int(number), digest) if number.isdecimal() else None


# Copies


def copies() -> Store:
    """Where the bytes of champions are kept."""
    root = release_store()
    return Bucket(f"{root}/{PRODUCTION}") if root.startswith("s3://") else Home(Path(root) / PRODUCTION)


def copy_of(sha256: str) -> Artifact:
    """The copy of this name, whether it is there or not."""
    root = f"{release_store()}/{PRODUCTION}"
    uri = f"{root}/artifacts/{sha256}.json" if root.startswith("s3://") else f"file://{root}/artifacts/{sha256}"
    return Artifact(uri=uri, sha256=sha256, size_bytes=0)


def copy(model: str, version: str) -> Artifact:
    """All files of a version as MLflow has them now, verified and copied into the release store.

    Raises:
        Unverified: they are not as they were signed.
        InfrastructureError, ConnectionError: the store refuses or does not answer.
    """
    folder = new_directory()
    try:
        found = stored_version(model, version, folder / "version")
        shutil.rmtree(found / OF_MLFLOW, ignore_errors=True)
        (found / OF_MLFLOW).unlink(missing_ok=True)
        return copies().put(found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def verify_copy(sha256: str) -> None:
    """Read every byte of a copy in the store.

    Raises:
        CorruptArtifact: a file is missing or changed.
        Unverified: it is not what was signed.
    """
    copies().verify(copy_of(sha256))


def verify_stored(model: str, version: str) -> None:
    """Fetch all files of a version from MLflow and compare every byte with what was signed.

    Raises:
        Unverified: a file is missing, changed or added.
    """
    scratch = settings().home / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as folder:
        stored_version(model, version, Path(folder) / "version")


def restore(model: str, version: str, sha256: str) -> None:
    """Put the files of a copy in place of what MLflow has of the version.

    Raises:
        CorruptArtifact, FileNotFoundError: the copy is damaged, too.
        Unverified: MLflow has files that are not the version's, or the copy is not what was signed.
    """
    copied = copies().get(copy_of(sha256))
    check(copied, signature_of(copied))
    found = find_version(f"models:/{model}/{version}")
    client().log_model_artifacts(found.tags["model_id"], str(copied))
    verify_stored(model, version)


# Does it answer


def smoke_test(model: str, version: str) -> None:
    """Ask the champion as its users do: MLflow loads it through the alias, in a process of its own.

    Raises:
        SmokeTestFailed: it does not load, does not answer, or not with a text or vector per prompt.
    """
    log = settings().home / "logs" / f"smoke-test-{quote(model, safe='')}-{version}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(json.dumps({"inputs": PROMPTS}))
        command = [
            sys.executable,
            "-P",
            "-m",
            "mlflow",
            "models",
            "predict",
            "--model-uri",
            f"models:/{model}@{CHAMPION}",
        ]
        command += ["--env-manager", "local", "--content-type", "json"]
        try:
            done = subprocess.run(
                [*command, "--input-path", str(asked), "--output-path", str(answered)],
                cwd=folder,
                env=_serving_environment(),
                capture_output=True,
                text=True,
                timeout=SMOKE_TEST_S,
            )
        except subprocess.TimeoutExpired:
            raise SmokeTestFailed(f"Version {version} of {model} did not answer within {SMOKE_TEST_S:.0f} s.") from None
        log.write_text(done.stdout + done.stderr)
        if done.returncode:
            last = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "no word")
            raise SmokeTestFailed(f"Version {version} of {model} does not answer: {last.strip()} (all of it: {log}).")
        answers = json.loads(answered.read_text())["predictions"]
    if len(answers) != len(PROMPTS) or not all(map(_is_answer, answers)):
        raise SmokeTestFailed(
            f"Version {version} of {model} must answer {len(PROMPTS)} prompts with a text or a vector each; it answers "
            f"{str(answers)[:200]}."
        )


def _serving_environment() -> dict[str, str]:
    ours = {f"{PREFIX}{name.upper()}": None for name in Settings.model_fields if name not in SERVED_WITH}
    return environment(**ours, MLFLOW_TRACKING_URI=tracking_uri(), SLIMLINE_HOME=str(settings().home), PYTHONPATH=None)


def _is_answer(answer: Any) -> bool:
    if isinstance(answer, list):
        return bool(answer) and all(isinstance(each, float | int) and math.isfinite(each) for each in answer)
    return isinstance(answer, str) and bool(answer.strip())


# What is known of a version


class Known(BaseModel, frozen=True):
    """What MLflow knows of a version: its tags, what registering wrote on its page, and the run that made it."""

    model: str
    version: str
    tags: dict[str, str]
    description: str
    run: RunFacts | None

    @property
    def sha256(self) -> str:
        """Of the bundle."""
        return self.tags.get("sha256", "")

    @property
    def figures(self) -> dict[str, float]:
        """Of the winner of its run, by their names."""
        found = self.run.metrics if self.run else {}
        return {name.removeprefix("winner."): value for name, value in found.items() if name.startswith("winner.")}


def known(model: str, version: str) -> Known:
    """What MLflow knows of a version.

    Raises:
        ValueError: there is no such version.
    """
    found = find_version(f"models:/{model}/{version}")
    run_id = found.tags.get("flow_run")
    return Known(
        model=model,
        version=str(found.version),
        tags=dict(found.tags),
        description=found.description or "",
        run=run_facts(run_id) if run_id else None,
    )


def compared(candidate: Known, champion: Known | None) -> str:
    """Figures of both side by side, a Markdown table."""
    names = [*candidate.figures, *(champion.figures.keys() - candidate.figures.keys() if champion else ())]
    if not names:
        return "MLflow has no figures of its run."
    title = f"today's champion, version {champion.version}" if champion else "no champion yet"
    rows = [f"| figure | version {candidate.version} | {title} |", "|---|---|---|"]
    for name in names:
        cells = [_cell(candidate.figures, name), _cell(champion.figures if champion else {}, name)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:,.6g}" if name in figures else ""
