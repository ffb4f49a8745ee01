"""A release store and a tracking server that go away in the middle of a promotion."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from flows.approving import answer, ask
from flows.releasing import carry_out
from infra import releases, s3
from infra.failures import explain
from infra.ledger import Entry, entries
from infra.settings import environment, settings
from tests.flows.released import compiled, several
from tests.homes import home_at
from tests.infra.asking import ask as ask_server
from tests.infra.asking import end_group, unused_port, wait_until
from tests.infra.fault_proxy import Answer, FaultProxy, fault_proxy

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with home_at(tmp_path_factory.mktemp("home")) as where:
        yield where


@pytest.fixture(scope="module")
def versions(home: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], None]:
    """Registers so many versions of a model."""
    return several(compiled(tiny_checkpoint, tmp_path_factory.mktemp("engine")))


def approved(model: str, version: str) -> Entry:
    asked = ask(model, version, who="ada", why="x", two_person=False, approval_hours=1, revalidate="never")
    answer(asked, who="ben", why="fine", approve=True)
    return asked


@pytest.fixture
def loads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, version: str) -> None:
        served = mlflow.pyfunc.load_model(f"models:/{model}@champion")
        assert served.predict(list(releases.PROMPTS), params={"max_new_tokens": 4})

    monkeypatch.setattr(releases, "smoke_test", load)


@pytest.fixture
def store(client, home, s3_server, loads_here, monkeypatch) -> Iterator[FaultProxy]:
    """The release store behind a wire that can be cut; `client` is of the server."""
    with fault_proxy(s3_server.url) as proxy:
        monkeypatch.setenv("SLIMLINE_HOME", str(home))
        monkeypatch.setenv("SLIMLINE_RELEASE_STORE", "s3://models/release")
        monkeypatch.setenv("SLIMLINE_S3_ENDPOINT_URL", proxy.url)
        settings.cache_clear()
        s3._client.cache_clear()
        yield proxy
        s3._client.cache_clear()


def test_a_store_that_comes_back_delays_and_one_that_does_not_fails_clearly(versions, store, monkeypatch):
    versions("store", 2)
    first = approved("store", "1")
    puts = iter(range(10**6))
    store.plan = lambda exchange: Answer(503) if exchange.method == "PUT" and next(puts) < 5 else None
    assert carry_out(first).what == "promoted"
    assert next(puts) > 5

    second = approved("store", "2")
    monkeypatch.setenv("SLIMLINE_S3_RETRY_S", "1")
    settings.cache_clear()
    store.plan = lambda exchange: Answer(503) if "/blobs/" in exchange.path else None
    with pytest.raises(ConnectionError, match="asked again for 1 s"):
        carry_out(second)
    assert releases.holder("store", "champion") == "1"
    assert entries("store")[-1].what == "approved"
    store.recover()
    assert carry_out(second).replaces == "1"
    releases.verify_copy(entries("store")[-1].copy_sha256)


@pytest.fixture
def server(home, loads_here, tmp_path, monkeypatch) -> Iterator[FaultProxy]:
    """A tracking server behind a wire that can be cut."""
    port = unused_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri"]
    options += [f"sqlite:///{home / 'served.db'}", "--artifacts-destination", str(tmp_path / "files")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            cwd=tmp_path,
            env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until(lambda: ask_server(f"http://127.0.0.1:{port}/health")[0] == 200, 120, "MLflow")
        with fault_proxy(f"http://127.0.0.1:{port}") as proxy:
            monkeypatch.setenv("SLIMLINE_HOME", str(home))
            monkeypatch.setenv("SLIMLINE_TRACKING_URI", proxy.url)
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
            settings.cache_clear()
            yield proxy
    finally:
        end_group(process)


@pytest.mark.slow
def test_mlflow_that_goes_away_in_the_middle_leaves_the_champion_and_says_so(versions, server):
    versions("served", 2)
    carry_out(approved("served", "1"))
    second = approved("served", "2")
    lost = iter(range(10**6))
    server.plan = lambda exchange: Answer(503) if exchange.path.endswith("/alias") and next(lost) < 1 else None
    moved = carry_out(second)  # asked again
    assert moved.what == "promoted"
    assert next(lost) > 1

    back = approved("served", "1")
    server.plan = lambda exchange: (
        Answer(503) if exchange.path.endswith("/alias") and exchange.method == "POST" else None
    )
    with pytest.raises(Exception, match=r"503|too many") as failed:
        carry_out(back)
    assert "The tracking server (MLflow)" in str(explain(failed.value, settings().home))
    server.recover()
    assert releases.holder("served", "champion") == "2"
    assert carry_out(back).replaces == "2"
