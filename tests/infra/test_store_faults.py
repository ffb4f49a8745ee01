"""What store, network, disk and system do to an artifact on its way. The server and the wire are real."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra import s3
from infra.artifacts import Artifact, CorruptArtifact, exists, fetch, publish, verify
from infra.caching import earlier_result
from infra.settings import settings
from tasks.checkpoint import import_checkpoint
from tests.infra.fault_proxy import Answer, Corrupt, Cut, Exchange, Fault, FaultProxy, Slow, Truncate, fault_proxy
from tests.infra.made import bytes_of, directory

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[2]
MIB = 2**20
PART = 5 * MIB
"""The smallest that S3 takes."""
NUM_PARTS = 6
SIZE = NUM_PARTS * PART - 1000
CUT_S = float(os.environ.get("CUT_S", "2"))
"""For how long the store is away. Half a minute: CUT_S=30 pytest -k survives tests/infra/test_store_faults.py"""


@pytest.fixture(autouse=True)
def proxy(client, s3_server, monkeypatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    with fault_proxy(s3_server.url) as found:
        monkeypatch.setenv("SLIMLINE_S3_ENDPOINT_URL", found.url)
        monkeypatch.setenv("SLIMLINE_STORE", "s3://models/team")
        s3._client.cache_clear()
        settings.cache_clear()
        yield found


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Callable[..., Path]:
    """Goes on as another machine, whose home has this name, with other settings."""

    def go_on(name: str, **environment: str) -> Path:
        for variable, value in {"SLIMLINE_HOME": str(tmp_path / name), **environment}.items():
            monkeypatch.setenv(variable, value)
        settings.cache_clear()
        return tmp_path / name

    return go_on


def weights(seed: int = 0, size: int = SIZE) -> bytes:
    return bytes_of(seed, size)


def nothing_half_written(home: Path) -> bool:
    """Whether neither a copy nor a draft of one is there."""
    return not any(
        path.is_file() for part in ("artifacts", "blobs", "partial") for path in (home / "cache" / part).rglob("*")
    )


class Once:
    """Does a fault to the first request that fits, or to the first few."""

    def __init__(self, fault: Fault, method: str, *, count: int = 1, skip: int = 0, what: str = "/blobs/") -> None:
        self.fault, self.method, self.count, self.skip, self.what = fault, method, count, skip, what
        self._lock = threading.Lock()

    def __call__(self, exchange: Exchange) -> Fault:
        with self._lock:
            if exchange.method != self.method or self.what not in exchange.path:
                return None
            if self.skip:
                self.skip -= 1
                return None
            if not self.count:
                return None
            self.count -= 1
        return self.fault


# The store is away


def test_an_upload_survives_a_cut_and_sends_no_finished_part_again(proxy, machine):
    proxy.plan = _cut_when_done(proxy, 3, CUT_S)
    artifact = publish(directory(weights=weights(), config=b"{}"))
    assert proxy.down_until < time.monotonic()
    assert any(each.status == 0 for each in proxy.log if _part(each))
    sent = [part for each in proxy.log for part in _part(each)]
    assert [sent.count(part) for part in sent[:3]] == [1, 1, 1]
    assert proxy.sent_bytes() < SIZE + PART
    verify(artifact)
    machine("second")
    assert (fetch(artifact) / "weights").read_bytes() == weights()


def test_a_download_survives_a_cut_and_goes_on_where_it_was(proxy, machine):
    artifact = publish(directory(weights=weights()))
    machine("second")
    proxy.log.clear()
    proxy.plan = Once(Cut(CUT_S, after_bytes=3 * MIB), "GET", skip=1)
    assert (fetch(artifact) / "weights").read_bytes() == weights()
    assert proxy.down_until < time.monotonic()
    assert proxy.received_bytes("/blobs/") < SIZE + NUM_PARTS * 2 * MIB  # what was in buffers of the system is lost


def test_an_upload_that_gives_up_says_so_and_is_gone_on_with(proxy, machine):
    home = machine("first", SLIMLINE_S3_RETRY_S="0.5")
    made = directory(weights=weights())
    proxy.plan = _cut_when_done(proxy, 3)
    with pytest.raises(
        ConnectionError, match=r"The S3 endpoint http.* cannot be reached for s3://models/team.* 0\.5 s"
    ):
        publish(made)
    assert nothing_half_written(home)
    assert made.exists()
    first = list(proxy.log)
    finished = {part for each in first if each.status == 200 for part in _part(each)}
    assert finished
    proxy.log.clear()
    proxy.recover()
    artifact = publish(made)
    assert not finished & {part for each in proxy.log for part in _part(each)}
    verify(artifact)


def test_a_download_that_gives_up_says_so_and_is_gone_on_with(proxy, machine):
    artifact = publish(directory(weights=weights()))
    machine("second", SLIMLINE_S3_RETRY_S="0.5")
    proxy.log.clear()
    proxy.plan = _cut_when_done(proxy, 3, of=_range)
    with pytest.raises(ConnectionError, match=r"The S3 endpoint http.* cannot be reached .* Check"):
        fetch(artifact)
    assert not artifact.path.exists()
    finished = {range_ for each in proxy.log if each.received_bytes == PART for range_ in _range(each)}
    assert len(finished) >= 3
    proxy.log.clear()
    proxy.recover()
    assert (fetch(artifact) / "weights").read_bytes() == weights()
    assert not finished & {range_ for each in proxy.log for range_ in _range(each)}


# The store is unwell


def test_answers_of_503_are_waited_out(proxy, machine):
    proxy.plan = Once(Answer(503), "PUT", count=6)
    artifact = publish(directory(weights=weights(), config=b"{}"))
    proxy.plan = Once(Answer(503), "GET", count=6, what="/")
    machine("second")
    assert (fetch(artifact) / "weights").read_bytes() == weights()
    assert [each.status for each in proxy.log].count(503) == 12


def test_a_store_that_stays_at_503_is_named(proxy, machine):
    machine("first", SLIMLINE_S3_RETRY_S="0.5")
    proxy.plan = lambda _: Answer(503)
    with pytest.raises(ConnectionError, match=r"answers 503 \(503\) for s3://models/team.*asked again for 0\.5 s"):
        publish(directory(config=b"{}"))


def test_truncated_bodies_are_completed(proxy, machine):
    artifact = publish(directory(weights=weights()))
    machine("second")
    proxy.log.clear()
    proxy.plan = Once(Truncate(MIB), "GET", count=NUM_PARTS)
    assert (fetch(artifact) / "weights").read_bytes() == weights()
    assert proxy.received_bytes("/blobs/") < SIZE + NUM_PARTS * BUFFERED


BUFFERED = MIB
"""What of a truncated body may be lost in a reader's buffer."""


def test_a_byte_that_changes_on_the_way_in_is_refused_by_the_server_and_sent_again(proxy, machine, client):
    proxy.plan = Once(Corrupt(1000, of="body"), "PUT", count=2)
    artifact = publish(directory(weights=weights(), config=b"0" * 2000))
    assert [each.status for each in proxy.log if each.method == "PUT"].count(400) == 2
    verify(artifact)


def test_a_byte_that_changes_on_the_way_out_is_noticed_and_fetched_again(proxy, machine):
    artifact = publish(directory(weights=weights()))
    machine("second")
    proxy.plan = Once(Corrupt(1000), "GET")
    assert (fetch(artifact) / "weights").read_bytes() == weights()


def test_bytes_that_always_change_are_never_used(proxy, machine):
    artifact = publish(directory(weights=weights(size=MIB)))
    home = machine("second")
    proxy.plan = Once(Corrupt(1000), "GET", count=100)
    with pytest.raises(CorruptArtifact, match=r"must have the digest .* arrived has .*, 3 times"):
        fetch(artifact)
    assert nothing_half_written(home)


# The disk is full


FULL = """
import sys
from pathlib import Path
from infra import failures
from infra.artifacts import Artifact, fetch, new_directory, publish
from infra.settings import settings

home = settings().home
def fill():
    with (home / "filler").open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass
def tell(call):
    try:
        print("done", call())
    except OSError as error:
        print(failures.explain(error, home))
    found = (p for p in home.rglob("*") if p.is_file() and p.name not in ("lock", "filler") and "users" not in p.parts)
    print("left", sorted(str(p.relative_to(home)) for p in found))
if sys.argv[1] == "fetch":
    tell(lambda: fetch(Artifact.model_validate_json(sys.argv[2])).name)
else:
    made = new_directory()
    (made / "config").write_text("{}")
    for name in ("lock", "artifacts", "blobs", "users"):  # the directories are there from earlier
        (home / "cache" / name).mkdir(parents=True) if name != "lock" else None
    fill()
    tell(lambda: publish(made).sha256)
    (home / "filler").unlink()
    tell(lambda: publish(made).sha256[:4])
"""


def test_a_disk_that_a_download_does_not_fit_on_is_named_and_given_back(proxy, small_disk, tmp_path):
    artifact = publish(directory(weights=weights()))
    (tmp_path / "small").mkdir()
    proxy.log.clear()
    ran = _on_small_disk(small_disk, tmp_path / "small", "fetch", artifact.model_dump_json())
    assert "The disk is full" in ran[0]
    assert f"MiB are free at {tmp_path / 'small'}" in ran[0]
    assert ran[1] == "left []"
    assert proxy.received_bytes("/blobs/") == 0  # it was noticed before


def test_a_disk_that_is_full_while_publishing_is_named_and_the_same_directory_is_published_later(
    proxy, small_disk, tmp_path
):
    (tmp_path / "small").mkdir()
    ran = _on_small_disk(small_disk, tmp_path / "small", "publish")
    assert "The disk is full" in ran[0]
    assert re.fullmatch(r"left \['scratch/[^/]+/config'\]", ran[1])
    assert ran[2].startswith("done ")
    assert "manifest.json" in ran[3]


def _on_small_disk(small_disk, home: Path, *arguments: str) -> list[str]:
    ran = small_disk(home, "8m", sys.executable, "-c", FULL, *arguments, SLIMLINE_HOME=str(home), PYTHONPATH=str(ROOT))
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


# The process is killed


PROCESS = f"""
import random, sys
from infra import s3
from infra.artifacts import Artifact, fetch, new_directory, publish
s3.PART_BYTES = {PART}
if len(sys.argv) > 1:
    fetch(Artifact.model_validate_json(sys.argv[1]))
else:
    made = new_directory()
    (made / "weights").write_bytes(random.Random(0).randbytes({SIZE}))
    print(publish(made).model_dump_json())
"""


def test_a_killed_publisher_leaves_nothing_visible_and_the_next_sends_only_the_rest(proxy, machine, client):
    home = machine("first")
    proxy.plan = _one_part_at_a_time("PUT")
    _kill_when(_start(), lambda: sum(each.status == 200 for each in proxy.log if _part(each)) >= 3)
    finished = {part for each in proxy.log if each.status == 200 for part in _part(each)}
    assert len(finished) >= 3
    assert not client.list_objects_v2(Bucket="models").get("Contents")
    assert nothing_half_written(home)
    proxy.log.clear()
    artifact = _published(_start())
    again = {part for each in proxy.log for part in _part(each)}
    assert again
    assert not again & finished
    verify(artifact)


def test_a_killed_reader_leaves_no_half_of_an_artifact_and_the_next_fetches_only_the_rest(proxy, machine):
    artifact = publish(directory(weights=weights()))
    machine("second")
    proxy.log.clear()
    proxy.plan = _one_part_at_a_time("GET")

    def ranges() -> set[str]:
        done = (each for each in proxy.log if each.method == "GET" and "/blobs/" in each.path)
        return {each.headers["range"] for each in done if each.received_bytes >= PART}

    _kill_when(_start(artifact.model_dump_json()), lambda: len(ranges()) >= 3)
    finished = ranges()
    assert not artifact.path.exists()
    proxy.log.clear()
    assert (fetch(artifact) / "weights").read_bytes() == weights()
    # The last of them may have arrived and not been noted.
    assert len(ranges() & finished) <= 1
    assert proxy.received_bytes("/blobs/") < SIZE


def _cut_when_done(
    proxy: FaultProxy, num_parts: int, for_s: float = 60, of: Callable[[Exchange], set[str]] | None = None
) -> Callable[[Exchange], Fault]:
    """Lets so many parts pass, waits until they are there, and cuts the others off; nothing happens to later ones."""
    which = of or _part
    turn = threading.Lock()
    count = [0]

    def plan(exchange: Exchange) -> Fault:
        if not which(exchange) or proxy.down_until:
            return None
        with turn:
            count[0] += 1
            if count[0] <= num_parts:
                return None
            while sum(_is_done(each) for each in proxy.log if which(each)) < num_parts:
                time.sleep(0.01)
            time.sleep(0.2)  # until the other side knows, too
        return Cut(for_s, of="answer" if exchange.method == "GET" else "body")

    return plan


def _is_done(exchange: Exchange) -> bool:
    return exchange.received_bytes == PART if exchange.method == "GET" else exchange.status == 200


def _one_part_at_a_time(method: str) -> Callable[[Exchange], Fault]:
    """Passes requests for parts one after the other, so that a kill finds some done and some not."""
    turn = threading.Lock()
    count = [0]

    def plan(exchange: Exchange) -> Fault:
        if exchange.method != method or "/blobs/" not in exchange.path:
            return None
        with turn:
            count[0] += 1
            return Slow(0.3 * (count[0] - 1)) if count[0] <= 2 * NUM_PARTS else None

    return plan


def _start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def _kill_when(process: "subprocess.Popen[str]", so_far: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not so_far():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(0.2)  # what the proxy still passes on


def _published(process: "subprocess.Popen[str]") -> Artifact:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return Artifact.model_validate_json(out)


def _part(exchange: Exchange) -> set[str]:
    """The number of the part that is sent, if one is."""
    pairs = dict(pair.partition("=")[::2] for pair in exchange.query.split("&"))
    return {pairs["partNumber"]} if exchange.method == "PUT" and "partNumber" in pairs else set()


def _range(exchange: Exchange) -> set[str]:
    """The range of a blob that is asked for, if one is."""
    return {exchange.headers["range"]} if exchange.method == "GET" and "/blobs/" in exchange.path else set()


# Others


def test_publishers_of_the_same_do_not_disturb_each_other(proxy, machine, tmp_path):
    def start(home: str) -> "subprocess.Popen[str]":
        machine(home)
        return _start()

    processes = [start(home) for home in ("first", "first", "second", "second")]
    found = {_published(process) for process in processes}
    (artifact,) = found
    assert proxy.sent_bytes() < 2.1 * SIZE  # once for each machine
    machine("third")
    verify(artifact)
    assert (
        hashlib.sha256((fetch(artifact) / "weights").read_bytes()).hexdigest() == hashlib.sha256(weights()).hexdigest()
    )


def test_an_idle_upload_of_another_machine_is_gone_on_with(proxy, machine, monkeypatch):
    machine("first", SLIMLINE_S3_RETRY_S="0.2")
    proxy.plan = _cut_when_done(proxy, 3)
    with pytest.raises(ConnectionError):
        publish(directory(weights=weights()))
    finished = {part for each in proxy.log if each.status == 200 for part in _part(each)}
    assert finished
    proxy.log.clear()
    proxy.recover()
    machine("second")
    monkeypatch.setattr(s3, "IDLE_S", -10.0)  # by the server's clock of whole seconds
    verify(publish(directory(weights=weights())))
    assert not finished & {part for each in proxy.log for part in _part(each)}


def test_an_upload_that_nobody_goes_on_with_is_ended(client, monkeypatch):
    def unfinished() -> list[str]:
        found = client.list_multipart_uploads(Bucket="models", Prefix="team/").get("Uploads", [])
        return [upload["Key"] for upload in found]

    upload = client.create_multipart_upload(Bucket="models", Key="team/blobs/abandoned")["UploadId"]
    client.upload_part(Bucket="models", Key="team/blobs/abandoned", UploadId=upload, PartNumber=1, Body=b"1")
    assert s3.end_abandoned("s3://models/team/blobs") == 0
    assert unfinished() == ["team/blobs/abandoned"]
    monkeypatch.setattr(s3, "ABANDONED_S", -10.0)
    assert s3.end_abandoned("s3://models/team/blobs") == 1
    assert unfinished() == []


def test_a_store_that_is_away_is_not_taken_for_an_empty_one(proxy, machine):
    artifact = publish(directory(config=b"{}"))
    machine("second", SLIMLINE_S3_RETRY_S="0.2")
    proxy.cut(60)
    with pytest.raises(ConnectionError):
        exists(artifact)
    with pytest.raises(ConnectionError):
        earlier_result(import_checkpoint, {"source": "somewhere", "source_fingerprint": ""})
