import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from flows.retention import make_room
from infra import registry
from infra.artifacts import Artifact, exists, new_directory, publish
from infra.ledger import append
from infra.retention import delete, unneeded
from infra.settings import settings
from infra.tracking import Parent, StageResult, client, end_flow, stage_run, start_flow
from tests.flows.released import CODE
from tests.homes import home_at

DAY = timedelta(days=1)


@pytest.fixture
def home(tmp_path):
    with home_at(tmp_path / "home") as where:
        yield where


def made(parent: Parent, text: str, *inputs: StageResult) -> StageResult:
    out = new_directory()
    (out / "model.txt").write_text(text)
    with stage_run(text, parent, params={}, inputs=inputs) as run:
        return run.finish(publish(out), kind="checkpoint", metrics={}, model=True)


def flow(name: str) -> Parent:
    return start_flow(name, recipe_json="{}", tags={})


def names(found) -> set[str]:
    return {each.name.rpartition("/")[2].removesuffix(".json") for each in found}


def age(home: Path, monkeypatch, days: int = 2) -> None:
    """All that is there was made some days ago, in the eyes of what comes now."""
    then = time.time() - days * 86400
    for place in (home / "artifacts").glob("*"):
        os.utime(place, (then, then))
    from infra import retention

    ended = retention._ended
    limit = time.time()

    def earlier(run):
        return (
            ended(run) - timedelta(days=days) if run.info.end_time and run.info.end_time / 1000 <= limit else ended(run)
        )

    monkeypatch.setattr(retention, "_ended", earlier)


def test_what_a_version_or_the_ledger_leads_to_stays_however_old(home, monkeypatch):
    first = flow("first")  # its stages are the ancestors of a version that a later flow registers
    original = made(first, "original")
    lost = made(first, "of the same flow")
    end_flow(first, "FINISHED")
    second = flow("second")
    engine = made(second, "engine", original)
    version = registry.register("kept", bundle=engine, parent=second, verdict="ACCEPT", **CODE)
    end_flow(second, "FINISHED")
    third = flow("third")
    unused = made(third, "unused")
    released = made(third, "in the ledger")
    end_flow(third, "FINISHED")
    append("other", who="ada", what="promoted", version="1", sha256=released.artifact.sha256)
    age(home, monkeypatch)
    young = flow("young")
    fresh = made(young, "fresh", unused)

    found = unneeded(DAY)
    assert names(found) == {third.run_id}  # what it made is read by a young run, or in the ledger
    client().delete_run(young.run_id)
    client().delete_run(fresh.run_id)
    found = unneeded(DAY)
    assert names(found) == {third.run_id, unused.artifact.sha256}
    assert unneeded(3 * DAY) == []

    _, said = make_room(1, dry_run=True)
    assert said.endswith("Nothing was deleted.")
    assert exists(unused.artifact)
    make_room(1, dry_run=False)
    assert not exists(unused.artifact)
    for kept in (original, engine, released, lost, fresh):
        assert exists(kept.artifact), kept
    assert client().get_run(third.run_id).info.lifecycle_stage == "deleted"
    assert client().get_run(second.run_id).info.lifecycle_stage == "active"
    assert registry.verified_version("kept", version.version).is_dir()
    assert unneeded(DAY) == []


@pytest.mark.servers
def test_in_a_bucket_files_go_that_no_artifact_names(home, client, monkeypatch):
    monkeypatch.setenv("SLIMLINE_HOME", str(home))
    monkeypatch.setenv("SLIMLINE_STORE", "s3://models/retention")
    settings.cache_clear()
    artifacts: list[Artifact] = []
    for texts in (("shared", "one"), ("shared", "two")):
        out = new_directory()
        for text in texts:
            (out / text).write_text(text)
        artifacts.append(publish(out))
    append("other", who="ada", what="promoted", version="1", sha256=artifacts[0].sha256)
    found = unneeded(timedelta(0))
    assert names(found) == {artifacts[1].sha256}
    assert delete(found, timedelta(0)) == len("two")
    assert exists(artifacts[0])
    assert not exists(artifacts[1])
