"""Artifacts in a bucket that several machines share; a machine is a home of its own here. The server is real."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect.results import ResultStore
from prefect.serializers import JSONSerializer

from infra import artifacts, s3
from infra.artifacts import Artifact, CorruptArtifact, exists, fetch, files, publish, verify
from infra.caching import StoredResults, cache_key, earlier_result
from infra.failures import InfrastructureError
from infra.settings import settings
from infra.tracking import StageResult
from tasks.checkpoint import import_checkpoint
from tests.infra.made import bytes_of, directory

pytestmark = pytest.mark.servers

MIB = 2**20


@pytest.fixture(autouse=True)
def machine(client, monkeypatch, tmp_path) -> Callable[..., Path]:
    """Goes on as another machine, whose home has this name, with other settings."""

    def go_on(name: str, **environment: str) -> Path:
        settings_now = {"SLIMLINE_HOME": str(tmp_path / name), **environment}
        for variable, value in settings_now.items():
            monkeypatch.setenv(variable, value)
        settings.cache_clear()
        return tmp_path / name

    go_on("first", SLIMLINE_STORE="s3://models/team")
    return go_on


@pytest.fixture
def sent(client) -> list[tuple[str, str, int]]:
    """What is sent: method, path and size of the body."""
    found: list[tuple[str, str, int]] = []

    def note(request, **_: object) -> None:
        size = len(request.body) if isinstance(request.body, bytes | bytearray) else 0
        found.append((request.method, request.url.partition("?")[0].partition("/models/")[2], size))

    client.meta.events.register("before-send.s3", note)
    return found


def contents(where: Path) -> dict[str, bytes]:
    return {p.relative_to(where).as_posix(): p.read_bytes() for p in where.rglob("*") if p.is_file()}


def test_another_machine_gets_what_one_has_published(machine):
    made = directory(config=b"{}", empty=b"", weights=bytes_of(0, 20 * MIB))
    (made / "deep" / "er").mkdir(parents=True)
    (made / "deep" / "er" / "tokens").write_bytes(b"deep")
    before = contents(made)
    artifact = publish(made)
    assert not made.exists()
    assert artifact.uri == f"s3://models/team/artifacts/{artifact.sha256}.json"
    second = machine("second")
    assert exists(artifact)
    assert not artifact.path.exists()
    place = fetch(artifact)
    assert place == artifact.path
    assert place.is_relative_to(second / "cache")
    assert contents(place) == before
    assert {file.path: file.size_bytes for file in files(artifact)} == {n: len(c) for n, c in before.items()}
    verify(artifact)
    assert not list((second / "scratch").iterdir())
    assert not list((second / "cache" / "partial").iterdir())


def test_the_name_is_that_of_the_same_contents_in_a_home(machine, monkeypatch):
    there = publish(directory(a=b"1", b=b"22"))
    monkeypatch.delenv("SLIMLINE_STORE")
    machine("alone")
    here = publish(directory(a=b"1", b=b"22"))
    assert here.uri.startswith("file://")
    assert (here.sha256, here.size_bytes) == (there.sha256, there.size_bytes)


def test_a_changed_shard_is_sent_alone_whether_small_or_of_several_parts(sent):
    shards = {f"shard{n}": bytes_of(n, 9 * MIB if n else 1000) for n in range(3)}
    publish(directory(**shards))
    for name, changed in (("shard0", bytes_of(7, 1000)), ("shard1", bytes_of(8, 9 * MIB))):
        sent.clear()
        shards[name] = changed
        publish(directory(**shards))
        blobs = {path for method, path, _ in sent if method == "PUT" and "/blobs/" in path}
        assert blobs == {f"team/blobs/{hashlib.sha256(changed).hexdigest()}"}


def test_publishing_the_same_again_sends_no_file(sent):
    artifact = publish(directory(a=bytes_of(0, 9 * MIB), b=b"2"))
    sent.clear()
    assert publish(directory(a=bytes_of(0, 9 * MIB), b=b"2")) == artifact
    assert {method for method, _, _ in sent} == {"HEAD"}


def test_a_large_file_that_is_here_already_is_compared_and_not_hashed(machine, monkeypatch):
    content = bytes_of(0, 3 * MIB + 5)
    artifact = publish(directory(a=content, b=b"2"))
    monkeypatch.setattr(artifacts, "_digest", lambda file: hashlib.sha256(_small(file).read_bytes()).hexdigest())
    assert publish(directory(a=content, b=b"2")) == artifact


def _small(file: Path) -> Path:
    assert file.stat().st_size < MIB
    return file


@pytest.mark.parametrize("at", [0, 12345, 2 * MIB, 3 * MIB + 4])
def test_a_file_that_differs_in_one_byte_from_one_of_the_same_size_has_its_own_name(at, machine):
    content = bytes_of(0, 3 * MIB + 5)
    changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    publish(directory(a=content))
    artifact = publish(directory(a=changed))
    assert files(artifact)[0].sha256 == hashlib.sha256(changed).hexdigest()
    machine("second")
    assert contents(fetch(artifact)) == {"a": changed}


def test_what_is_here_is_not_asked_for(sent):
    artifact = publish(directory(a=b"1"))
    sent.clear()
    fetch(artifact)
    assert sent == []


def test_only_the_shard_that_is_not_here_is_fetched(machine, sent):
    shared = bytes_of(0, 3 * MIB)
    one, two = publish(directory(a=shared, b=b"1")), publish(directory(a=shared, b=b"2"))
    machine("second")
    fetch(one)
    sent.clear()
    fetch(two)
    shard = hashlib.sha256(shared).hexdigest()
    assert [path for method, path, _ in sent if method == "GET" and "/blobs/" in path] != []
    assert not any(path.endswith(shard) for _, path, _ in sent)
    assert (one.path / "a").samefile(two.path / "a")


def test_a_file_that_was_deleted_in_the_store_is_missed_and_publishing_again_mends_it(machine, client):
    artifact = publish(directory(a=b"1", b=b"2"))
    client.delete_object(Bucket="models", Key=f"team/blobs/{hashlib.sha256(b'2').hexdigest()}")
    assert not exists(artifact)
    with pytest.raises(CorruptArtifact, match=r"File b of artifact .* is not in the store"):
        verify(artifact)
    machine("second")
    with pytest.raises(FileNotFoundError, match=r"/blobs/.* does not exist"):
        fetch(artifact)
    assert publish(directory(a=b"1", b=b"2")) == artifact
    assert exists(artifact)
    verify(artifact)


def test_what_was_never_published_is_missed():
    absent = Artifact(uri=f"s3://models/team/artifacts/{'0' * 64}.json", sha256="0" * 64, size_bytes=1)
    assert not exists(absent)
    with pytest.raises(FileNotFoundError, match=r"Artifact 000000000000 must be in the store; .* Run the stage again"):
        fetch(absent)


def test_a_changed_byte_in_the_store_is_found_and_never_used(machine, client):
    artifact = publish(directory(weights=b"1234"))
    blob = f"team/blobs/{hashlib.sha256(b'1234').hexdigest()}"
    client.put_object(Bucket="models", Key=blob, Body=b"1235")
    assert exists(artifact)  # same size: only reading the bytes tells
    with pytest.raises(CorruptArtifact, match=f"File weights .* was changed. Delete s3://models/{blob}"):
        verify(artifact)
    second = machine("second")
    with pytest.raises(CorruptArtifact, match="The stored file is damaged"):
        fetch(artifact)
    assert not contents(second / "cache" / "artifacts")
    assert not contents(second / "cache" / "blobs")
    assert not contents(second / "cache" / "partial")


@pytest.mark.parametrize("path", ["../outside", "/etc/outside", "a/../../outside", "a//b", "", "."])
def test_a_manifest_that_leads_out_of_its_directory_is_refused(path, machine, client, tmp_path):
    content = b"evil"
    digest = hashlib.sha256(content).hexdigest()
    listed = json.dumps([{"path": path, "size_bytes": len(content), "sha256": digest}]).encode()
    sha256 = hashlib.sha256(listed).hexdigest()
    client.put_object(Bucket="models", Key=f"team/blobs/{digest}", Body=content)
    client.put_object(Bucket="models", Key=f"team/artifacts/{sha256}.json", Body=listed)
    forged = Artifact(uri=f"s3://models/team/artifacts/{sha256}.json", sha256=sha256, size_bytes=4)
    with pytest.raises(CorruptArtifact, match="must have a plain relative path"):
        fetch(forged)
    assert not exists(forged)
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("store", ["s3://models/team", None])
def test_a_link_is_not_published(store, machine, monkeypatch, tmp_path):
    monkeypatch.delenv("SLIMLINE_STORE")
    machine("first", **({"SLIMLINE_STORE": store} if store else {}))
    (tmp_path / "secret").write_text("secret")
    made = directory(a=b"1")
    (made / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="link is a link"):
        publish(made)


def test_an_artifact_of_a_home_is_found_after_a_store_is_set(machine, monkeypatch):
    monkeypatch.delenv("SLIMLINE_STORE")
    machine("first")
    earlier = publish(directory(a=b"1"))
    machine("first", SLIMLINE_STORE="s3://models/team")
    assert exists(earlier)
    assert contents(fetch(earlier)) == {"a": b"1"}
    verify(earlier)


def test_a_bucket_that_does_not_exist_ends_the_flow_not_the_candidate(machine):
    machine("first", SLIMLINE_STORE="s3://nowhere/team")
    with pytest.raises(InfrastructureError, match=r"The bucket 'nowhere' must exist at .* finished stages are kept"):
        publish(directory(a=b"1"))


def test_refused_credentials_end_the_flow_not_the_candidate(machine, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3._client.cache_clear()
    with pytest.raises(InfrastructureError, match=r"refuses access to s3://models/team\b.* Check the credentials"):
        publish(directory(a=b"1"))


def test_encryption_is_asked_for(client, machine, monkeypatch):
    asked = []
    client.meta.events.register("before-send.s3", lambda request, **_: asked.append(dict(request.headers)))
    machine("first", SLIMLINE_S3_SSE="aws:kms", SLIMLINE_S3_SSE_KMS_KEY_ID="key-1", SLIMLINE_S3_RETRY_S="0")
    with pytest.raises(ConnectionError):  # this server has no key
        publish(directory(a=b"1"))
    encrypted = [h for h in asked if h.get("x-amz-server-side-encryption") == b"aws:kms"]
    assert [h["x-amz-server-side-encryption-aws-kms-key-id"] for h in encrypted] == [b"key-1"]


# The cache


def test_what_was_used_longest_ago_leaves_the_cache_and_comes_back_when_asked_for(machine):
    made = [publish(directory(a=bytes_of(n, MIB))) for n in range(3)]
    script = f"""
import os
from infra.artifacts import Artifact, fetch
for artifact in {[a.model_dump() for a in made]!r}:
    fetch(Artifact(**artifact))
"""
    machine("second", SLIMLINE_CACHE_GIB=str(3.5 / 1024))
    _python(script)
    for age, artifact in enumerate(made):  # the first was used last
        os.utime(artifact.path.parent, (1e9 - age, 1e9 - age))
    fetch(publish(directory(a=bytes_of(9, MIB))))
    assert [artifact.path.exists() for artifact in made] == [True, True, False]
    assert exists(made[2])
    assert contents(fetch(made[2])) == {"a": bytes_of(2, MIB)}


def test_what_a_running_process_uses_stays_whatever_the_limit(machine, caplog):
    made = [publish(directory(a=bytes_of(n, MIB))) for n in range(3)]
    machine("second", SLIMLINE_CACHE_GIB=str(1.5 / 1024))
    for artifact in made:
        fetch(artifact)
    assert all(artifact.path.exists() for artifact in made)
    assert "running processes use 0.0 GiB of copies" in caplog.text
    other = publish(directory(a=bytes_of(9, MIB)))
    assert all(artifact.path.exists() for artifact in (*made, other))


def test_an_artifact_shares_its_files_and_they_count_once(machine):
    shared = bytes_of(0, MIB)
    made = [publish(directory(a=shared, b=bytes([n]))) for n in range(5)]
    script = f"""
from infra.artifacts import Artifact, fetch
for artifact in {[a.model_dump() for a in made]!r}:
    fetch(Artifact(**artifact))
"""
    machine("second", SLIMLINE_CACHE_GIB=str(1.5 / 1024))
    _python(script)
    fetch(publish(directory(c=b"1")))
    assert all(artifact.path.exists() for artifact in made)


def test_a_copy_that_lost_a_file_is_fetched_again(machine):
    artifact = publish(directory(a=b"1", b=b"2"))
    machine("second")
    shutil.rmtree(fetch(artifact) / "b", ignore_errors=True)
    (artifact.path / "b").unlink()
    assert contents(fetch(artifact)) == {"a": b"1", "b": b"2"}


def _python(script: str) -> None:
    """Runs in a process of its own, which uses nothing any more when it has ended."""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2], timeout=120)


# Results


FLOW = """
import os
import sys
from infra.settings import prepare_environment, settings
prepare_environment()
from prefect import flow, task
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE, temporary_settings
from flows.running import Runner
from infra.artifacts import fetch, new_directory, publish
from infra.caching import earlier_result, stage_policy
from infra.tracking import StageResult

@task(name="make", cache_policy=stage_policy("tasks.pruning.magnitude"), persist_result=True, result_serializer="json")
def make(text, *, parent=None, label=""):
    out = new_directory()
    (out / "text").write_text(text)
    return StageResult(artifact=publish(out), kind="data", metrics={}, elapsed_s=1, peak_memory_mib=None, run_id="1",
                       model_id=None)

@flow(persist_result=False)
def twice():
    run = Runner(None)
    for text in ("one", "two"):
        result = run(make, text=text)
        print(text, run.records[-1].cached, (fetch(result.artifact) / "text").read_text())

for os.environ["SLIMLINE_HOME"] in sys.argv[1:]:
    settings.cache_clear()
    twice()
    print("known", *(earlier_result(make, {"text": text}) is not None for text in ("one", "three")))
with temporary_settings({PREFECT_TASKS_REFRESH_CACHE: True}):
    twice()
"""


def test_an_earlier_result_is_asked_for_once_and_one_of_another_version_is_none(client, sent):
    inputs = {"source": "somewhere", "source_fingerprint": ""}
    assert earlier_result(import_checkpoint, inputs) is None
    assert [method for method, _, _ in sent] == ["GET"]
    artifact = Artifact(uri="s3://models/team/artifacts/0.json", sha256="0", size_bytes=1)
    result = StageResult(
        artifact=artifact, kind="data", metrics={}, elapsed_s=1, peak_memory_mib=None, run_id="1", model_id=None
    )
    store = ResultStore(result_storage=StoredResults(uri="s3://models/team/results"), serializer=JSONSerializer())
    store.write(result, key=cache_key(import_checkpoint, inputs))
    sent.clear()
    assert earlier_result(import_checkpoint, inputs) == result
    assert [method for method, _, _ in sent] == ["GET"]
    client.put_object(Bucket="models", Key=f"team/results/{cache_key(import_checkpoint, inputs)}", Body=b"{}")
    assert earlier_result(import_checkpoint, inputs) is None


def test_a_second_machine_finds_the_results_of_the_first(machine, client, tmp_path):
    homes = [str(machine(name)) for name in ("first", "second")]
    ran = subprocess.run(
        [sys.executable, "-c", FLOW, *homes],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    first = ["one False one", "two False two", "known True False"]
    second = ["one True one", "two True two", "known True False"]
    anew = ["one False one", "two False two"]  # as the nightly deployment asks for it
    assert ran.stdout.splitlines() == first + second + anew
    assert not list((tmp_path / "prefect").glob("storage/*"))
    results = client.list_objects_v2(Bucket="models", Prefix="team/results/")["Contents"]
    assert len(results) == 2
    for item in results:
        record = json.loads(client.get_object(Bucket="models", Key=item["Key"])["Body"].read())
        assert record["metadata"]["serializer"]["type"] == "json"
