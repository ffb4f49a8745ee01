"""What nobody needs any more: old runs, and artifacts that no kept run, registered version or ledger entry leads to.

A registered version keeps its flow run, everything in its lineage with the flow runs that made it, and its bundle,
whatever their age and its verdict. The copies of champions lie apart, in the release store, and are never looked at.
"""

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from infra import s3
from infra.ledger import entries, models
from infra.settings import settings
from infra.tracking import client, every, experiment_ids, lineage

Run = Any
"""MLflow's, which only infra/tracking.py and infra/registry.py import."""


class Unneeded(BaseModel, frozen=True):
    """What would be deleted: `uri` of an artifact or the id of a run, and since when nothing was done with it."""

    what: str
    name: str
    since: datetime
    size_bytes: int = 0


class Kept(BaseModel, frozen=True):
    """What stays: digests of artifacts, and ids of flow runs."""

    artifacts: frozenset[str]
    flow_runs: frozenset[str]


def unneeded(older_than: timedelta) -> list[Unneeded]:
    """Flow runs that ended, and artifacts that were made, longer ago than `older_than`, and that nothing keeps.

    Raises:
        BrokenLedger: a ledger is not whole, so that nobody knows what it keeps.
    """
    before = datetime.now(UTC) - older_than
    kept, runs = _kept_by_versions(), list(_runs())
    flows = {run.info.run_id: run for run in runs if run.data.tags.get("slimline.role") == "flow"}
    old = [run for run in flows.values() if _is_old(run, before) and run.info.run_id not in kept.flow_runs]
    gone = {run.info.run_id for run in old}
    artifacts = set(kept.artifacts)
    for run in runs:
        flow = run.data.tags.get("mlflow.parentRunId", run.info.run_id)
        if flow not in gone:
            artifacts |= _artifacts_of(run)
    found = [Unneeded(what="run", name=run.info.run_id, since=_ended(run)) for run in old]
    return found + [each for each in _artifacts() if each.since < before and _digest(each) not in artifacts]


def _kept_by_versions() -> Kept:
    artifacts, flow_runs = set[str](), set[str]()
    for version in every(client().search_model_versions):
        artifacts.add(version.tags.get("sha256", ""))
        flow_runs.add(version.tags.get("flow_run", ""))
        if "model_id" not in version.tags:
            continue  # of other tools
        for ancestor in lineage(f"models:/{version.name}/{version.version}"):
            artifacts.add(ancestor.sha256 or "")
            if ancestor.run_id:
                run = client().get_run(ancestor.run_id)
                flow_runs.add(run.data.tags.get("mlflow.parentRunId", ancestor.run_id))
                artifacts |= _artifacts_of(run)
    for model in models():
        artifacts |= {entry.sha256 for entry in entries(model)}
    return Kept(artifacts=frozenset(artifacts - {""}), flow_runs=frozenset(flow_runs - {""}))


def _runs() -> Iterator[Run]:
    if experiments := experiment_ids():
        yield from every(client().search_runs, experiments, "")


def _ended(run: Run) -> datetime:
    return datetime.fromtimestamp((run.info.end_time or run.info.start_time) / 1000, UTC)


def _is_old(run: Run, before: datetime) -> bool:
    return run.info.status != "RUNNING" and _ended(run) < before


def _artifacts_of(run: Run) -> set[str]:
    inputs = json.loads(run.data.tags.get("slimline.inputs", "[]"))
    return {run.data.tags.get("artifact.sha256", ""), *(each["sha256"] for each in inputs)}


def _digest(artifact: Unneeded) -> str:
    return artifact.name.rpartition("/")[2].removesuffix(".json")


def _artifacts() -> Iterator[Unneeded]:
    """Of the store that this process publishes to."""
    if store := settings().store:
        for name, changed, size_bytes in s3.listed(f"{store}/artifacts"):
            yield Unneeded(what="artifact", name=f"{store}/artifacts/{name}", since=changed, size_bytes=size_bytes)
        return
    for place in (settings().home / "artifacts").glob("*"):
        size_bytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        since = datetime.fromtimestamp(place.stat().st_mtime, UTC)
        yield Unneeded(what="artifact", name=str(place), since=since, size_bytes=size_bytes)


def delete(found: list[Unneeded], older_than: timedelta) -> int:
    """Delete them; how many bytes that gave back.

    Runs are marked as deleted, as on MLflow's page: `mlflow gc` removes them for good, `mlflow runs restore` brings
    them back. In a bucket the old files go that no artifact names any more; an artifact that somebody publishes in the
    same moment from such a file is found incomplete, and its stage run again.
    """
    freed = 0
    for each in found:
        if each.what == "run":
            _delete_run(each.name)
        elif each.name.startswith("s3://"):
            s3.delete(each.name)
        else:
            shutil.rmtree(Path(each.name))
            freed += each.size_bytes
    if store := settings().store:
        freed += _delete_blobs(store, datetime.now(UTC) - older_than)
    return freed


def _delete_run(flow: str) -> None:
    for run in list(every(client().search_runs, experiment_ids(), f"tags.`mlflow.parentRunId` = '{flow}'")):
        client().delete_run(run.info.run_id)
    client().delete_run(flow)


def _delete_blobs(store: str, before: datetime) -> int:
    blobs = {name: (changed, size) for name, changed, size in s3.listed(f"{store}/blobs")}
    named = {
        file["sha256"]
        for name, _, _ in s3.listed(f"{store}/artifacts")
        for file in json.loads(s3.read(f"{store}/artifacts/{name}") or b"[]")
    }
    freed = 0
    for name, (changed, size_bytes) in blobs.items():
        if name not in named and changed < before:
            s3.delete(f"{store}/blobs/{name}")
            freed += size_bytes
    return freed
