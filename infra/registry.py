"""Registered model versions: what release teams promote and serve.

A version holds the engine bundle and the code that runs it, so it loads in any process where the pinned libraries are
installed; and a signature over all of that, which is verified before any of it is parsed.
"""

import logging
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import BaseModel

from infra.artifacts import fetch, new_directory
from infra.failures import silent_server
from infra.hardware import versions
from infra.locks import held
from infra.settings import settings
from infra.signing import (
    SIGNATURE,
    Facts,
    Unverified,
    check,
    key_id,
    sign,
    signature_of,
    signing_key,
)
from infra.tracking import Parent, StageResult, client, stage_run, stored_files

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.models import ModelSignature

logger = logging.getLogger(__name__)

CANDIDATE = "candidate"
ACCEPT = "ACCEPT"
BUNDLE = "bundle"
"""What a served model finds the bundle's directory by, among its artifacts."""
# fmt: off
REQUIRED = (
    "mlflow", "torch", "transformers", "tokenizers", "compressed-tensors", "safetensors", "numpy", "pandas", "pydantic",
    "pydantic-settings", "cryptography", "onnxruntime", "openvino", "openvino-genai",
)
# fmt: on
"""Distributions a served bundle may need; those installed here are written into the version with their versions."""


class Version(BaseModel, frozen=True):
    """A registered version. `uri` names it by its alias."""

    model: str
    version: str
    uri: str
    alias: str


def register(
    model: str,
    *,
    bundle: StageResult,
    parent: Parent,
    verdict: str,
    python_model: Path,
    code_paths: Sequence[Path],
    tags: Mapping[str, str] | None = None,
    description: str = "",
    gives_vectors: bool = False,
) -> Version:
    """The version of `model` that serves `bundle`, with the alias `candidate`.

    The same bundle (by SHA-256) gives the same version, whoever asks and how often.

    Args:
        model: name of the registered model, created on first use.
        bundle: an engine bundle as a stage returned it.
        parent: the flow's run; the registration is recorded as a child of it.
        verdict: of the validation.
        python_model: the file MLflow loads the model from; it sees the bundle as `context.artifacts["bundle"]`.
        code_paths: packages it imports; they travel with the version.
        tags: besides those every version has: sha256, verdict, model_id, git_sha, prefect.flow_run_id, recipe.sha256.
        description: for people, Markdown.
        gives_vectors: it answers a text with a vector, and takes no parameters; else with a text.

    Raises:
        ValueError: the verdict is not ACCEPT, or the name is not one MLflow allows.
    """
    if verdict != ACCEPT:
        raise ValueError(
            f"Only an accepted bundle is registered; the verdict on {bundle.artifact.sha256[:12]} is {verdict}. "
            "Change the recipe or its limits and run again."
        )
    if not re.fullmatch(r"[^/:]+", model):
        raise ValueError(f"The name of a registered model must not be empty or contain '/' or ':'; got {model!r}.")
    # MLflow cannot compare and set: two flows that register the same bundle at once would make two versions.
    with held(settings().home / "registry.lock"):
        found = _find(model, bundle.artifact.sha256)
        if found is None:
            signature = _signature(gives_vectors)
            found = _create(
                model, bundle, parent, verdict, python_model, code_paths, tags or {}, description, signature
            )
        client().set_registered_model_alias(model, CANDIDATE, str(found.version))
    client().set_tag(parent.run_id, "registered_model", f"{model}/{found.version}")
    return Version(model=model, version=str(found.version), uri=f"models:/{model}@{CANDIDATE}", alias=CANDIDATE)


def _find(model: str, sha256: str) -> "ModelVersion | None":
    """The signed version of a bundle. One that an earlier Slimline registered without a signature loads nowhere."""
    found = client().search_model_versions(f"name = '{model}' and tags.sha256 = '{sha256}'")
    return next((version for version in found if "signed_by" in version.tags), None)


def _create(
    model: str,
    bundle: StageResult,
    parent: Parent,
    verdict: str,
    python_model: Path,
    code_paths: Sequence[Path],
    tags: Mapping[str, str],
    description: str,
    signature: "ModelSignature",
) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    flow = client().get_run(parent.run_id).data.tags
    tags = {
        **tags,
        "sha256": bundle.artifact.sha256,
        "verdict": verdict,
        "git_sha": flow.get("mlflow.source.git.commit", ""),
        "prefect.flow_run_id": flow.get("prefect.flow_run_id", ""),
        "recipe.sha256": flow.get("recipe.sha256", ""),
        "flow_run": parent.run_id,
        "signed_by": key_id(signing_key().public_key()),
    }
    tags = {name: value for name, value in tags.items() if value}
    with stage_run(f"register {model}", parent, params={"model": model}, inputs=[bundle]) as run:
        logged = client().create_logged_model(
            parent.experiment,
            name=model.replace(".", "-"),
            source_run_id=run.run_id,
            tags=tags,
            model_type="registered",
        )
        facts = Facts(
            model=model,
            sha256=bundle.artifact.sha256,
            verdict=verdict,
            git_commit=tags.get("git_sha", ""),
            recipe_sha256=tags.get("recipe.sha256", ""),
            flow_run=tags.get("prefect.flow_run_id", ""),
        )
        _write_model(logged, run.run_id, bundle, facts, python_model, code_paths, signature)
        try:
            client().create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client().create_model_version(
            model,
            source=f"models:/{logged.model_id}",
            run_id=run.run_id,
            model_id=logged.model_id,
            tags={**tags, "model_id": logged.model_id},
            description=description,
            await_creation_for=0,  # a pointer to what is there already; waiting only announces itself
        )
        run.set_tags({"registered_model": f"{model}/{version.version}"})
    return version


def _write_model(
    logged: "LoggedModel",
    run_id: str,
    bundle: StageResult,
    facts: Facts,
    python_model: Path,
    code_paths: Sequence[Path],
    signature: "ModelSignature",
) -> None:
    """The files of a version: as MLflow loads them, signed as they are."""
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    folder = new_directory()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*input example", category=UserWarning)
            mlflow.pyfunc.save_model(
                folder,
                mlflow_model=Model(
                    artifact_path=logged.artifact_location,
                    model_uuid=logged.model_id,
                    run_id=run_id,
                    model_id=logged.model_id,
                ),
                python_model=str(python_model),
                artifacts={BUNDLE: str(fetch(bundle.artifact))},
                code_paths=[str(path) for path in code_paths],
                signature=signature,
                # Inferring them would load the model and ask the package index.
                pip_requirements=_requirements(),
            )
        for cached in list(folder.rglob("__pycache__")):
            shutil.rmtree(cached)
        (folder / SIGNATURE).write_text(sign(folder, facts).model_dump_json())
        client().log_model_artifacts(logged.model_id, str(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    client().log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
    client().finalize_logged_model(logged.model_id, "READY")


def _requirements() -> list[str]:
    """Without local labels ("2.13.0+cpu"): those are not published, and pip takes them for the same version."""
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions(*REQUIRED).items()]


def _signature(gives_vectors: bool) -> "ModelSignature":
    """One prompt per row, one text, or vector, per row. The column has no name: a plain list is as welcome."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType

    if gives_vectors:
        return ModelSignature(inputs=Schema([ColSpec("string")]), outputs=Schema([ColSpec(Array(DataType.double))]))
    return ModelSignature(
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", "long", 64),
                ParamSpec("temperature", "double", 0.0),
                ParamSpec("seed", "long", 0),
            ]
        ),
    )


def find_version(uri: str) -> "ModelVersion":
    """The registered version behind "models:/name@alias" or "models:/name/version".

    Raises:
        ValueError: the URI is none of these or names nothing; the message lists what there is.
    """
    from mlflow.exceptions import MlflowException

    parsed = re.fullmatch(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))", uri)
    if parsed is None:
        raise ValueError(f"An MLflow model is named models:/name@alias or models:/name/version; got {uri!r}.")
    name = parsed["name"]
    try:
        if parsed["alias"]:
            return client().get_model_version_by_alias(name, parsed["alias"])
        return client().get_model_version(name, parsed["version"])
    except MlflowException as error:
        known = sorted(m.name for m in client().search_registered_models())
        raise ValueError(
            f"There is no {uri}: {error.message.rstrip('.')}. Registered: {', '.join(known) or 'no model yet'}."
        ) from None


def find_model(name: str) -> "RegisteredModel":
    """The registered model of this name.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client().get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = ", ".join(sorted(each.name for each in client().search_registered_models())) or "no model yet"
        raise ValueError(f"There is no registered model {name!r}. Registered: {known}.") from None


def fingerprint(uri: str) -> str:
    """What tells this version from another one that later gets the same alias."""
    found = find_version(uri)
    return f"{found.name}/{found.version} {found.tags.get('sha256', '')} {found.creation_timestamp}"


def download(uri: str, out: Path) -> Path:
    """The checkpoint of a registered version, as files below `out`: the directory that holds its config.json.

    Versions that hold a plain checkpoint directory and those of MLflow's transformers flavor are understood; of the
    latter, the tokenizer is put beside the model.

    Raises:
        ValueError: there is no such version, or it holds no checkpoint.
    """
    root = _fetch(find_version(uri), out)
    checkpoints = [path.parent for path in sorted(root.rglob("config.json")) if any(path.parent.glob("*.safetensors"))]
    if len(checkpoints) != 1:
        names = ", ".join(str(path.relative_to(root)) for path in checkpoints) or "none"
        raise ValueError(
            f"A source must hold one checkpoint (a directory with config.json and *.safetensors); {uri} holds {names}. "
            "A compiled engine is not a checkpoint: name the model it was compiled from."
        )
    tokenizer = root / "components" / "tokenizer"
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, checkpoints[0], dirs_exist_ok=True)
    return checkpoints[0]


def holds_bundle(uri: str) -> bool:
    """Whether a version was registered by a flow, which registers engine bundles only.

    Raises:
        ValueError: there is no such version.
    """
    return find_version(uri).tags.get("verdict") is not None


def verified_bundle(model: str, version: str) -> Path:
    """The engine bundle of a registered version; see `verified_version`."""
    folder = verified_version(model, version)
    return next(path for path in (folder / "artifacts").iterdir() if path.is_dir())


def verified_version(model: str, version: str) -> Path:
    """All files of a registered version, fetched once and kept below the home; every byte is verified at each call.

    Its `signature.json` says what they are (`infra.signing.signature_of`, `check`).

    Raises:
        ValueError: there is no such version.
        Unverified: it is unsigned, by a key that is not trusted, changed, or another version's. What of a copy here
            was changed is fetched again first.
    """
    found = find_version(f"models:/{model}/{version}")
    folder = settings().home / "versions" / f"{model}-{version}"
    with held(folder.with_suffix(".lock")):
        if folder.exists():
            try:
                return _verified(folder, found)
            except Unverified as error:
                logger.warning("fetching %s version %s again: %s", model, version, error)
                shutil.rmtree(folder)
        with TemporaryDirectory(dir=folder.parent) as partial:
            fetched = _fetch(found, Path(partial) / "model")
            _verified(fetched, found)
            fetched.rename(folder)
    return folder


def _verified(folder: Path, version: "ModelVersion") -> Path:
    try:
        facts = check(folder, signature_of(folder)).facts
    except Unverified as error:
        raise Unverified(f"Version {version.version} of {version.name} must not be used. {error}") from None
    if (facts.model, facts.sha256) != (version.name, version.tags.get("sha256")):
        raise Unverified(
            f"Version {version.version} of {version.name} must not be used: its files were signed as {facts.model} "
            f"with the bundle {facts.sha256[:12]}, and the registry says {version.tags.get('sha256', 'none')[:12]}."
        )
    return folder


def stored_version(model: str, version: str, out: Path) -> Path:
    """All files of a version as MLflow has them now, in the directory `out`, which is made; every byte is verified.

    Raises:
        ValueError: there is no such version.
        Unverified: as `verified_version`.
        FileNotFoundError: MLflow lost its files.
    """
    found = find_version(f"models:/{model}/{version}")
    try:
        fetched = _fetch(found, out)
    except OSError as error:
        if silent_server(error):
            raise
        raise FileNotFoundError(f"MLflow lost the files of version {version} of {model}: {error}.") from error
    return _verified(fetched, found)


def bundle_at(uri: str) -> Path:
    """The verified engine bundle behind "models:/name@alias" or "models:/name/version"; see `verified_version`.

    Raises:
        ValueError: there is no such version, or it holds no bundle.
    """
    found = find_version(uri)
    if "verdict" not in found.tags:
        raise ValueError(f"{uri} must hold an engine bundle; it was not registered by a flow. Name one that was.")
    return verified_bundle(found.name, str(found.version))


def _fetch(version: "ModelVersion", out: Path) -> Path:
    """All files of a version, in the directory `out`, which is made."""
    import mlflow.artifacts

    client()  # points the function below at our server
    out.mkdir(parents=True, exist_ok=True)
    uri = f"models:/{version.name}/{version.version}"
    with stored_files(uri):
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(out)))
