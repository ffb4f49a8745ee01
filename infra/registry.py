"""Registered model versions: what release teams promote and serve.

A version holds the engine bundle and the code that runs it, so it loads in any process where the pinned libraries are
installed; and a signature over all of that, which is verified before any of it is parsed.
"""

import hashlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from infra.artifacts import fetch, new_directory
from infra.failures import silent_server
from infra.hardware import hardware, versions
from infra.locks import held, held_everywhere
from infra.sbom import SBOM, sbom
from infra.settings import settings
from infra.signing import (
    SIGNATURE,
    Envelope,
    Facts,
    Unverified,
    check,
    sign,
    signature_of,
    signing_key,
    statement_sha256,
)
from infra.tracking import (
    Parent,
    StageResult,
    client,
    every,
    experiment_ids,
    lineage,
    metric_name,
    run_url,
    stage_run,
    stored_files,
)

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.models import ModelSignature

logger = logging.getLogger(__name__)

CANDIDATE = "candidate"
ACCEPT = "ACCEPT"
SUBMISSION, WAITING = "submission", "waits for a releaser"
"""Tag of a model in MLflow that somebody else has to register."""
LONGEST_DESCRIPTION = 5000
BUNDLE = "bundle"
"""What a served model finds the bundle's directory by, among its artifacts."""
# fmt: off
REQUIRED = (
    "mlflow", "torch", "transformers", "tokenizers", "compressed-tensors", "safetensors", "numpy", "pandas", "pydantic",
    "pydantic-settings", "cryptography", "onnx", "onnxruntime", "openvino", "openvino-genai", "tensorrt",
    "tensorrt-rtx-cu13",
)
# fmt: on
"""Distributions a served bundle may need; those installed here are written into the version with their versions."""


class Version(BaseModel, frozen=True):
    """A registered version. `uri` names it by its alias."""

    model: str
    version: str
    uri: str
    alias: str


class Submission(BaseModel, frozen=True):
    """An accepted and signed bundle that waits for somebody who may register it, as MLflow's model `model_id`."""

    model: str
    model_id: str


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
) -> Version | Submission:
    """The version of `model` that serves `bundle`, with the alias `candidate`.

    The same bundle (by SHA-256) gives the same version, whoever asks and how often, on all machines that share locks
    (`infra.locks.held_everywhere`). Where MLflow lets others register only, it is signed and left for them: `admit`.

    Args:
        model: name of the registered model, created on first use.
        bundle: an engine bundle as a stage returned it.
        parent: the flow's run; the registration is recorded as a child of it.
        verdict: of the validation, which ran on this machine.
        python_model: the file MLflow loads the model from; it sees the bundle as `context.artifacts["bundle"]`.
        code_paths: packages it imports; they travel with the version.
        tags: besides those every version has: sha256, size_bytes, parents, verdict, hardware, model_id, git_sha,
            recipe.sha256, flow_run, flow_run_url, prefect.flow_run_id, prefect.flow_run_url, sbom_sha256, signed_by.
        description: for people, Markdown; what is longer than MLflow keeps is cut off at a line.
        gives_vectors: it answers a text with a vector, and takes no parameters; else with a text.

    Raises:
        ValueError: the verdict is not ACCEPT, the name is not one MLflow allows, or the key to sign with is none.
    """
    if verdict != ACCEPT:
        raise ValueError(
            f"Only an accepted bundle is registered; the verdict on {bundle.artifact.sha256[:12]} is {verdict}. "
            "Change the recipe or its limits and run again."
        )
    if not re.fullmatch(r"[^/:@'\"]+", model):
        raise ValueError(f"The name of a registered model must not be empty or contain / : @ ' or \"; got {model!r}.")
    signing_key()  # what is wrong with it is told before anything is kept
    # MLflow cannot compare and set: two flows that register the same bundle at once would make two versions.
    with held_everywhere(f"register-{model}-{bundle.artifact.sha256}", _wait_for):
        if found := _find(model, bundle.artifact.sha256):
            return _noted(parent, _again(found))
        for waiting in _submitted(model, bundle.artifact.sha256):
            return _noted(parent, _left(waiting))
        about = (verdict, tags or {}, description, gives_vectors)
        logged = _create(model, bundle, parent, python_model, code_paths, *about)
        if made := _permitted(lambda: _make_version(logged, {})):
            return _noted(parent, made)
        client().set_logged_model_tags(logged.model_id, {SUBMISSION: WAITING})
        return _noted(parent, _left(logged))


def admit(model: str | None = None) -> list[Version]:
    """The new versions of what was submitted by those who may not register, each verified byte by byte first.

    Args:
        model: only of this registered model.

    Raises:
        Unverified: something that was submitted is not as a trusted key signed it, or not what it says it is; the
            others are registered.
    """
    made, refused = [], []
    for logged in _submitted(model):
        name, sha256 = logged.tags["registered_as"], logged.tags["sha256"]
        with held_everywhere(f"register-{name}-{sha256}", _wait_for):
            if _find(name, sha256) is None:
                try:
                    verified = _verify_submission(logged)
                except Unverified as error:
                    refused.append(str(error))
                    continue
                made.append(_make_version(logged, verified))
            client().set_logged_model_tags(logged.model_id, {SUBMISSION: "registered"})
    if refused:
        raise Unverified(" ".join(refused))
    return made


def _verify_submission(logged: "LoggedModel") -> dict[str, str]:
    """Its tags, as they were signed."""
    import mlflow.artifacts

    client()  # points the function below at our server
    uri, folder = f"models:/{logged.model_id}", new_directory()
    try:
        with stored_files(f"model {logged.model_id}"):
            fetched = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
        envelope = signature_of(fetched)
        facts = check(fetched, envelope).facts
    except Unverified as error:
        raise Unverified(f"Model {logged.model_id} must not be registered. {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    said = (logged.tags["registered_as"], ACCEPT, logged.tags["sha256"])
    if said != (facts.model, facts.verdict, facts.sha256):
        raise Unverified(
            f"Model {logged.model_id} must not be registered: it was signed as {facts.model}, {facts.verdict}, bundle "
            f"{facts.sha256[:12]}, and submitted as {said[0]}, {said[1]}, bundle {said[2][:12]}."
        )
    return _signed_tags(facts, envelope)


def _submitted(model: str | None, sha256: str | None = None) -> "list[LoggedModel]":
    """What waits to be registered, the oldest first."""
    if not (experiments := experiment_ids()):
        return []
    query = f"tags.{SUBMISSION} = '{WAITING}'"
    query += f" and tags.registered_as = '{model}'" if model else ""
    query += f" and tags.sha256 = '{sha256}'" if sha256 else ""
    order = [{"field_name": "creation_timestamp", "ascending": True}]
    return list(every(client().search_logged_models, experiments, query, order_by=order))


def _permitted(call: Callable[[], Version]) -> Version | None:
    """What the call gives; None where this account may not."""
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        return None


def _again(found: "ModelVersion") -> Version:
    """A version that is there becomes the candidate again, where this account may say so."""
    version = _version(found)
    _permitted(lambda: _point(version))
    return version


def _point(version: Version) -> Version:
    client().set_registered_model_alias(version.model, CANDIDATE, version.version)
    return version


def _version(found: "ModelVersion") -> Version:
    uri = f"models:/{found.name}@{CANDIDATE}"
    return Version(model=found.name, version=str(found.version), uri=uri, alias=CANDIDATE)


def _left(logged: "LoggedModel") -> Submission:
    return Submission(model=logged.tags["registered_as"], model_id=logged.model_id)


def _noted(parent: Parent, registered: Version | Submission) -> Version | Submission:
    known = registered.version if isinstance(registered, Version) else registered.model_id
    client().set_tag(parent.run_id, "registered_model", f"{registered.model}/{known}")
    return registered


def record_verdict(bundle: StageResult, parent: Parent, *, verdict: str, why: str, name: str) -> None:
    """Note the verdict on a bundle with its model in MLflow, where searches find it; of several runs, the last.

    Args:
        bundle: an engine bundle as a stage returned it.
        parent: the flow's run that judged it.
        verdict: of the validation.
        why: in a sentence.
        name: of the candidate.
    """
    from mlflow.exceptions import MlflowException

    if bundle.model_id is None:
        return
    tags = {"verdict": verdict, "verdict.why": why[:5000], "verdict.flow_run": parent.run_id, "candidate": name}
    try:
        client().get_logged_model(bundle.model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logger.warning("the verdict on %s is in the report only: MLflow does not know %s", name, bundle.model_id)
    else:
        client().set_logged_model_tags(bundle.model_id, tags)


def _wait_for(holder: str) -> None:
    logger.info("waiting for %s, which registers", holder)


def _find(model: str, sha256: str) -> "ModelVersion | None":
    """The signed version of a bundle. One that an earlier Slimline registered without a signature loads nowhere."""
    found = client().search_model_versions(f"name = '{model}' and tags.sha256 = '{sha256}'")
    return next((version for version in found if "signed_by" in version.tags), None)


def _create(
    model: str,
    bundle: StageResult,
    parent: Parent,
    python_model: Path,
    code_paths: Sequence[Path],
    verdict: str,
    tags: Mapping[str, str],
    description: str,
    gives_vectors: bool,
) -> "LoggedModel":
    """All a version will be, kept and signed as a model of MLflow's."""
    from mlflow.entities import LoggedModelOutput

    flow = client().get_run(parent.run_id).data.tags
    bill = sbom()
    facts = Facts(
        model=model,
        sha256=bundle.artifact.sha256,
        verdict=verdict,
        hardware=hardware(),
        git_commit=flow.get("mlflow.source.git.commit", ""),
        recipe_sha256=flow.get("recipe.sha256", ""),
        sbom_sha256=hashlib.sha256(bill.encode()).hexdigest(),
        flow_run=flow.get("prefect.flow_run_id", ""),
        parents=_parents(bundle),
    )
    tags = {
        **{metric_name(name): value for name, value in tags.items()},
        "size_bytes": str(bundle.artifact.size_bytes),
        "sha256": facts.sha256,
        "flow_run": parent.run_id,
        "flow_run_url": run_url(parent.run_id, parent.experiment),
        "prefect.flow_run_url": flow.get("prefect.flow_run_url", ""),
        "registered_as": model,
        "description": _cut(description),
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
        envelope = _write_model(logged, bundle, facts, bill, python_model, code_paths, _signature(gives_vectors))
        client().log_outputs(run.run_id, [LoggedModelOutput(logged.model_id, 0)])
        client().set_logged_model_tags(logged.model_id, _signed_tags(facts, envelope))
        client().finalize_logged_model(logged.model_id, "READY")
    return client().get_logged_model(logged.model_id)


def _signed_tags(facts: Facts, envelope: Envelope) -> dict[str, str]:
    """The tags of a version that its signature vouches for."""
    tags = {
        "sha256": facts.sha256,
        "parents": " ".join(facts.parents),
        "verdict": facts.verdict,
        "hardware": json.dumps(facts.hardware),
        "git_sha": facts.git_commit,
        "recipe.sha256": facts.recipe_sha256,
        "prefect.flow_run_id": facts.flow_run,
        "sbom_sha256": facts.sbom_sha256,
        "statement_sha256": statement_sha256(envelope),
        "signed_by": envelope.signatures[0].keyid,
    }
    return {name: value for name, value in tags.items() if value}


def _make_version(logged: "LoggedModel", verified: Mapping[str, str]) -> Version:
    """A new version of what is kept as a model of MLflow's, and the candidate.

    Args:
        logged: with its tags, which whoever made it may have changed.
        verified: tags that count instead of its own.
    """
    from mlflow.exceptions import MlflowException

    tags = {**logged.tags, **verified, "model_id": logged.model_id}
    model, description = tags.pop("registered_as"), tags.pop("description", "")
    tags.pop(SUBMISSION, None)
    try:
        client().create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with held_everywhere(f"registry-{model}", _wait_for):  # so that the newest version is the candidate
        made = client().create_model_version(
            model,
            source=f"models:/{logged.model_id}",
            run_id=logged.source_run_id,
            model_id=logged.model_id,
            tags=tags,
            description=description,
            await_creation_for=0,  # a pointer to what is there already; waiting only announces itself
        )
        version = _point(_version(made))
    if logged.source_run_id:
        client().set_tag(logged.source_run_id, "registered_model", f"{model}/{made.version}")
    return version


def _parents(bundle: StageResult) -> tuple[str, ...]:
    """The digests of the models it was made from, nearest first; none where MLflow does not know it."""
    if bundle.model_id is None:
        return ()
    try:
        ancestors = lineage(bundle.model_id)[1:]
    except ValueError as error:
        logger.warning("the parents of %s are not named: %s", bundle.artifact.sha256[:12], error)
        return ()
    return tuple(ancestor.sha256 for ancestor in ancestors if ancestor.sha256)


def _cut(description: str) -> str:
    """As much as MLflow keeps in PostgreSQL."""
    if len(description) <= LONGEST_DESCRIPTION:
        return description
    told = "\n\n(The rest is in the report, with the flow's run.)"
    return description[: LONGEST_DESCRIPTION - len(told)].rpartition("\n")[0] + told


def _write_model(
    logged: "LoggedModel",
    bundle: StageResult,
    facts: Facts,
    bill: str,
    python_model: Path,
    code_paths: Sequence[Path],
    signature: "ModelSignature",
) -> Envelope:
    """Keeps the files of a version: as MLflow loads them, signed as they are."""
    import mlflow.pyfunc
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
                    run_id=logged.source_run_id,
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
        (folder / SBOM).write_text(bill)
        envelope = sign(folder, facts)
        (folder / SIGNATURE).write_text(envelope.model_dump_json())
        client().log_model_artifacts(logged.model_id, str(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return envelope


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
                ParamSpec("stop", "string", [], shape=(-1,)),
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
        known = sorted(m.name for m in every(client().search_registered_models))
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
        known = ", ".join(sorted(each.name for each in every(client().search_registered_models))) or "no model yet"
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
        envelope = signature_of(folder)
        facts = check(folder, envelope).facts
    except Unverified as error:
        raise Unverified(f"Version {version.version} of {version.name} must not be used. {error}") from None
    said = (version.name, version.tags.get("sha256"), version.tags.get("statement_sha256"))
    if said != (facts.model, facts.sha256, statement_sha256(envelope)):
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


def tell_of_changes(webhook: Mapping[str, Any]) -> None:
    """Have MLflow send what happens in its registry, in place of an earlier webhook of the same name.

    Args:
        webhook: name, url, events and secret, as MLflow's client takes them.
    """
    for known in client().list_webhooks():
        if known.name == webhook["name"]:
            client().delete_webhook(known.webhook_id)
    client().create_webhook(**webhook)


def candidates() -> list[tuple[str, str, dict[str, str]]]:
    """Model, version and tags of every candidate that a flow registered."""
    found = []
    for model in every(client().search_registered_models):
        if CANDIDATE in model.aliases:
            version = client().get_model_version(model.name, model.aliases[CANDIDATE])
            if "verdict" in version.tags:
                found.append((model.name, str(version.version), dict(version.tags)))
    return found


def note(model: str, version: str, tags: Mapping[str, str]) -> None:
    """Set tags of a registered version."""
    for name, value in tags.items():
        client().set_model_version_tag(model, version, name, value)
