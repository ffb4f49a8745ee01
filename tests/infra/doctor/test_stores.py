"""What `slimline doctor` says of the store and of Redis, with real servers."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from infra import s3
from infra.doctor import servers, stores
from infra.settings import settings
from tests.infra.asking import redis_server

pytestmark = pytest.mark.servers


@pytest.fixture(autouse=True)
def at_once(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLINE_S3_RETRY_S", "0")
    monkeypatch.setenv("SLIMLINE_STORE", "s3://models/slimline")


def found(monkeypatch: pytest.MonkeyPatch, **variables: str):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    s3._client.cache_clear()
    (finding,) = stores.store()
    return finding


def test_store_that_works_says_how_fast(client, monkeypatch):
    finding = found(monkeypatch)
    assert finding.state == "ok"
    assert "written, read and removed in" in finding.says
    assert "10 MiB in parts" in finding.says
    assert client.list_objects_v2(Bucket="models").get("Contents", []) == []


def test_bucket_that_does_not_exist(monkeypatch):
    finding = found(monkeypatch, SLIMLINE_STORE="s3://nowhere/slimline")
    assert finding.state == "problem"
    assert "The bucket 'nowhere' must exist" in finding.says
    assert "Create the bucket" in finding.remedy


def test_wrong_secret(monkeypatch):
    finding = found(monkeypatch, AWS_SECRET_ACCESS_KEY="wrong")
    assert finding.state == "problem"
    assert "refuses access" in finding.says
    assert "s3:PutObject" in finding.remedy


def test_closed_port(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    finding = found(monkeypatch, SLIMLINE_S3_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    assert finding.state == "problem"
    assert "cannot be reached" in finding.says
    assert "SLIMLINE_S3_ENDPOINT_URL" in finding.remedy


def test_clock_that_differs(monkeypatch):
    monkeypatch.setattr(servers, "MAX_SKEW_S", -1)  # a clock that is right is further off than that
    settings.cache_clear()
    s3._client.cache_clear()
    clock, store = stores.store()
    assert clock.state == "problem"
    assert "ahead of the store" in clock.says or "behind the store" in clock.says
    assert store.state == "ok"


@pytest.fixture
def redis_port(tmp_path) -> Iterator[int]:
    """Of a server that wants the password `right`."""
    with redis_server(tmp_path, "right") as port:
        yield port


def test_redis_lends_a_lock_once_and_tells_a_wrong_password_from_a_closed_port(redis_port, monkeypatch):
    def found(password: str, port: int):
        monkeypatch.setenv("SLIMLINE_REDIS_URL", f"redis://:{password}@127.0.0.1:{port}/0")
        settings.cache_clear()
        (finding,) = stores.redis()
        assert password not in finding.says + finding.remedy
        return finding

    assert "a lock in" in found("right", redis_port).says
    refused = found("wrong-word", redis_port)
    assert refused.state == "problem"
    assert "refuses the password" in refused.says
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = found("right", taken.getsockname()[1])
    assert closed.state == "problem"
    assert "cannot be reached" in closed.says
