"""Locks between real processes, ended by SIGKILL, and between real Redis and its clients."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from infra import locks
from infra.locks import held_file, held_in_redis
from tests.infra.asking import redis_server

ROOT = Path(__file__).parents[2]
WORKER = """
import sys, time
from pathlib import Path
import redis
from infra.locks import held_file, held_in_redis

where, name, hold_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
log = Path(sys.argv[4])

def say(what):
    with log.open("a") as stream:
        stream.write(f"{what} {name}\\n")

if where.startswith("redis:"):
    held = held_in_redis(redis.Redis.from_url(where), "stage-1", lambda holder: say(f"waits for {holder}:"), ttl_s=1)
else:
    held = held_file(Path(where), lambda holder: say(f"waits for {holder}:"))
with held:
    say("begin")
    time.sleep(hold_s)
    say("end")
"""


class Workers:
    """Processes that take a lock, hold it and write a log."""

    def __init__(self, where: str, log: Path) -> None:
        self.where, self.log = where, log
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, hold_s: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", WORKER, self.where, name, str(hold_s), str(self.log)]
        self.started.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}))
        return self.started[-1]

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + 30
        while not any(line in said for said in self.lines()):
            assert time.monotonic() < deadline, f"{line!r} was never said: {self.lines()}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as port:
        yield f"redis://127.0.0.1:{port}"


@pytest.fixture(params=["file", "redis"])
def workers(request, tmp_path):
    where = request.getfixturevalue("redis_url") if request.param == "redis" else str(tmp_path / "locks" / "stage-1")
    found = Workers(where, tmp_path / "log")
    yield found
    for process in found.started:
        process.kill()
        process.wait()


@pytest.mark.servers
def test_one_holds_it_at_a_time_and_who_waits_is_told_by_whom(workers):
    first = workers.start("a", 2.5)
    workers.wait_for("begin a")
    second = workers.start("b", 0)
    assert (first.wait(30), second.wait(30)) == (0, 0)
    lines = workers.lines()
    assert lines == [
        "begin a",
        f"waits for process {first.pid} on {socket.gethostname()}: b",
        "end a",
        "begin b",
        "end b",
    ]


@pytest.mark.servers
def test_the_lock_of_a_killed_process_goes_to_who_waits(workers):
    first = workers.start("a", 600)
    workers.wait_for("begin a")
    second = workers.start("b", 0)
    workers.wait_for("waits for")
    first.kill()
    assert second.wait(30) == 0
    assert [line for line in workers.lines() if "waits" not in line] == ["begin a", "begin b", "end b"]


def test_a_lock_that_was_given_back_leaves_no_file(tmp_path):
    file = tmp_path / "locks" / "stage-1"
    with held_file(file, pytest.fail):
        assert file.exists()
    assert not file.exists()


def test_many_threads_of_one_process_take_turns(tmp_path):
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(20):
            with held_file(tmp_path / "lock", lambda holder: None):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 160
    assert max(most) == 1
    assert not (tmp_path / "lock").exists()


@pytest.mark.servers
def test_a_lock_is_renewed_for_as_long_as_it_is_held(redis_url):
    client = redis.Redis.from_url(redis_url)
    with held_in_redis(client, "long", pytest.fail, ttl_s=0.3):
        time.sleep(1)
        assert client.get("slimline:lock:long").startswith(b"process ")
    assert client.get("slimline:lock:long") is None


@pytest.mark.servers
def test_a_lock_that_redis_forgot_is_taken_again_and_one_that_another_took_is_said(redis_url, caplog):
    client = redis.Redis.from_url(redis_url)
    with held_in_redis(client, "lost", pytest.fail, ttl_s=0.6):
        client.delete("slimline:lock:lost")  # as a restart without a saved state does
        time.sleep(0.5)
        assert client.get("slimline:lock:lost").startswith(b"process ")
        client.set("slimline:lock:lost", b"process 1 on elsewhere 0")
        time.sleep(0.5)
    assert "the lock lost was lost; another process may do the same work" in caplog.text
    assert client.get("slimline:lock:lost") == b"process 1 on elsewhere 0"


def test_a_redis_that_does_not_answer_is_said_in_a_sentence(monkeypatch):
    from infra.failures import silent_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = redis.Redis.from_url(f"redis://127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(redis.exceptions.ConnectionError) as found, locks.held_in_redis(dead, "x", pytest.fail):
            pass
    assert "The lock server (Redis) does not answer" in silent_server(found.value)
