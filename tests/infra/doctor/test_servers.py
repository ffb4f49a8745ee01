"""What `slimline doctor` says of servers: real ones, and what a proxy before them does to their answers."""

import contextlib
import http.client
import http.server
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from infra import tracking
from infra.doctor import servers, stores
from infra.doctor.examination import examine
from infra.doctor.finding import Finding
from infra.settings import QUIET, settings, shown
from tests.infra.asking import ask_json, end_group, unused_port, wait_until

pytestmark = pytest.mark.servers
ROOT = Path(__file__).parents[3]
PATIENT_S = 300
"""For a check on a loaded machine."""


@dataclass(frozen=True)
class Servers:
    """Where MLflow and Prefect answer."""

    mlflow_url: str
    prefect_url: str

    @property
    def prefect_api_url(self) -> str:
        return f"{self.prefect_url}/api"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home").resolve()


@pytest.fixture(scope="module")
def stack(home):
    """MLflow and Prefect on databases of the home."""
    ours = ("SLIMLINE_", "PREFECT_", "MLFLOW_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env |= {"SLIMLINE_HOME": str(home), "PREFECT_HOME": str(home / "prefect"), **QUIET}
    prepare = (
        "from infra.settings import settings; from infra.tracking import prepare_database as p; p(settings().home)"
    )
    subprocess.run([sys.executable, "-c", prepare], cwd=ROOT, env=env, check=True)
    found = Servers(closed(), closed())
    mlflow = ["mlflow", "server", "--workers", "1", "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]
    mlflow += ["--no-serve-artifacts", "--default-artifact-root", (home / "mlruns").as_uri()]
    started = []
    try:
        for name, command, url in (
            ("mlflow", mlflow, found.mlflow_url),
            ("prefect", ["prefect", "server", "start"], found.prefect_url),
        ):
            where = ["--host", "127.0.0.1", "--port", str(urlsplit(url).port)]
            with (home / f"{name}.log").open("wb") as log:
                server = subprocess.Popen(
                    [sys.executable, "-m", *command, *where],
                    cwd=ROOT,
                    env={**env, "PREFECT_UI_STATIC_DIRECTORY": str(home / "ui")},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            started.append(server)
        wait_until(lambda: ask_json(f"{found.prefect_api_url}/flows/count", {}) is not None, 420, f"{home}/prefect.log")
        searching = f"{found.mlflow_url}/api/2.0/mlflow/experiments/search"
        wait_until(lambda: ask_json(searching, {"max_results": 1}) is not None, 420, f"{home}/mlflow.log")
        yield found
    finally:
        for server in started:
            end_group(server)


@pytest.fixture
def environ(home, monkeypatch) -> Callable[..., None]:
    """Sets variables of this process and of the checks that it starts."""
    for name in [name for name in os.environ if name.startswith(("SLIMLINE_", "PREFECT_", "MLFLOW_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLIMLINE_HOME", str(home))

    def change(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()

    change()
    return change


def first(findings: Iterator[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


@contextmanager
def proxy(target: str, *, host: str | None = None, change: Callable[[str, int, bytes], tuple[int, bytes]] | None = None,
          date: str | None = None) -> Iterator[str]:  # fmt: skip
    """The address of a proxy before `target` that calls it by another name, or changes its answers."""
    where = urlsplit(target)

    class Handler(http.server.BaseHTTPRequestHandler):
        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {**self.headers, "Host": host or where.netloc, "Accept-Encoding": "identity"}
            connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            status, content = answer.status, answer.read()
            if change:
                status, content = change(self.path, status, content)
            self.send_response_only(status)
            self.send_header("Date", date or answer.headers["Date"])
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = forward

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def closed() -> str:
    """The address of a port where nobody listens."""
    return f"http://127.0.0.1:{unused_port()}"


@pytest.fixture
def closed_port() -> str:
    return closed()


def test_nothing_configured_is_nothing_wrong(environ, tmp_path):
    environ(SLIMLINE_HOME=str(tmp_path))
    found = examine(["mlflow", "prefect", "databases", "network", "redis"], PATIENT_S)
    assert {finding.state for finding in found} == {"skipped"}
    assert "runs are kept in sqlite" in first(iter(found), "mlflow").says


def test_running_servers_are_well_and_what_they_lack_is_told(stack, environ):
    environ(SLIMLINE_TRACKING_URI=stack.mlflow_url, SLIMLINE_PREFECT_API_URL=stack.prefect_api_url)
    found = examine(["mlflow", "prefect", "databases", "network"], PATIENT_S)
    states = {finding.name: finding.state for finding in found}
    assert states == {
        "mlflow": "ok",
        "prefect": "ok",
        "deployments": "problem",
        "slots": "skipped",
        "database of mlflow": "ok",
        "database of prefect": "ok",
        "names": "ok",
        "encryption": "ok",
    }
    assert "slimline deploy" in first(iter(found), "deployments").remedy


def test_pools_and_slots_are_told_and_the_remedies_work(stack, environ):
    api = stack.prefect_api_url
    environ(PREFECT_API_URL=api, SLIMLINE_PREFECT_API_URL=api)
    ask_json(f"{api}/work_pools/", {"name": "cpu", "type": "process"})
    flow = ask_json(f"{api}/flows/", {"name": "start"})
    wanted = {"name": "start", "flow_id": flow["id"], "entrypoint": "flows.start.start", "work_pool_name": "cpu"}
    ask_json(f"{api}/deployments/", wanted)
    ask_json(f"{api}/work_pools/", {"name": "gpu-sm90", "type": "process"})
    ask_json(f"{api}/deployments/", wanted | {"name": "start-gpu", "work_pool_name": "gpu-sm90"})
    ask_json(f"{api}/v2/concurrency_limits/", {"name": "gpu", "limit": 2, "active_slots": 1})
    found = {finding.name: finding for finding in examine(["prefect"], PATIENT_S)}
    assert found["deployments"].says == "start, start-gpu"
    assert (found["pool cpu"].state, found["pool gpu-sm90"].state) == ("problem", "problem")
    assert "no worker polls it (last seen: never)" in found["pool cpu"].says
    assert found["slots"].says == "gpu (1 of 2) are held and no flow runs"

    freeing = found["slots"].remedy.removeprefix("Free them: ").partition(";")[0].split()
    subprocess.run([sys.executable, "-m", *freeing], check=True)
    starting = found["pool cpu"].remedy.removeprefix("Start one: ").split()
    environ(PREFECT_WORKER_WEBSERVER_PORT=str(unused_port()))
    worker = subprocess.Popen([sys.executable, "-m", *starting], start_new_session=True)
    try:
        wait_until(lambda: ask_json(f"{api}/work_pools/cpu/workers/filter", {}), 60, "the worker to poll")
        found = {finding.name: finding for finding in examine(["prefect"], PATIENT_S)}
    finally:
        end_group(worker)
    assert (found["pool cpu"].state, found["slots"].state) == ("ok", "ok")
    assert "1 worker" in found["pool cpu"].says
    assert found["pool gpu-sm90"].state == "warning", "its machines may be still to come: other pools have workers"

    ask_json(f"{api}/work_pools/cpu", {"is_paused": True}, method="PATCH")
    assert first(iter(examine(["prefect"], PATIENT_S)), "pool cpu").says == "is paused: its runs wait"


def test_closed_port_is_told_from_a_server_that_hangs(environ, closed_port, monkeypatch):
    environ(SLIMLINE_TRACKING_URI=closed_port, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    (found,) = servers.mlflow()
    assert found.says == f"{closed_port} cannot be reached: nobody listens there"
    assert "SLIMLINE_TRACKING_URI" in found.remedy
    monkeypatch.setattr(servers, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environ(SLIMLINE_TRACKING_URI=address)
        (found,) = servers.mlflow()
    assert found.says == f"{address} does not answer in time"


def test_closed_port_of_prefect(environ, closed_port):
    environ(SLIMLINE_PREFECT_API_URL=f"{closed_port}/api")
    (found,) = [each for each in examine(["prefect"], PATIENT_S) if each.name == "prefect"]
    assert (found.state, found.says) == ("problem", f"{closed_port}/api cannot be reached: nobody listens there")


def test_name_that_the_server_does_not_know_is_told_from_a_wrong_password(stack, environ):
    with proxy(stack.mlflow_url, host="mlflow:5000") as address:
        environ(SLIMLINE_TRACKING_URI=address)
        found = first(servers.mlflow(), "mlflow")
        assert found.state == "problem"
        assert "refuses the name" in found.says
        assert "--allowed-hosts" in found.remedy
    with proxy(stack.mlflow_url, change=lambda path, status, body: (401, b"You are not authenticated.")) as address:
        environ(SLIMLINE_TRACKING_URI=address, MLFLOW_TRACKING_USERNAME="trainer", MLFLOW_TRACKING_PASSWORD="old")
        found = first(servers.mlflow(), "mlflow")
        assert "refuses the user 'trainer'" in found.says
        assert "old" not in found.says + found.remedy


def test_server_of_another_version_is_a_problem(stack, environ):
    older = {"/version": b"2.9.0", "/api/admin/version": b'"3.1.0"'}
    with proxy(stack.mlflow_url, change=lambda path, status, body: (status, older.get(path, body))) as address:
        environ(SLIMLINE_TRACKING_URI=address)
        assert "is mlflow 2.9.0; this machine has 3." in first(servers.mlflow(), "mlflow").says
    with proxy(stack.prefect_url, change=lambda path, status, body: (status, older.get(path, body))) as address:
        environ(PREFECT_API_URL=f"{address}/api", SLIMLINE_PREFECT_API_URL=f"{address}/api")
        assert "is prefect 3.1.0; this machine has 3." in first(iter(examine(["prefect"], PATIENT_S)), "prefect").says


def test_clock_that_differs_is_a_problem(stack, environ):
    with proxy(stack.mlflow_url, date=formatdate(time.time() - 3600, usegmt=True)) as address:
        environ(SLIMLINE_TRACKING_URI=address)
        found = first(servers.mlflow(), "clock")
        assert "3,60" in found.says
        assert "ahead of MLflow" in found.says
        assert "NTP" in found.remedy


def test_something_else_that_listens_there_is_no_mlflow(stack, environ):
    environ(SLIMLINE_TRACKING_URI=stack.prefect_url)
    found = first(servers.mlflow(), "mlflow")
    assert found.state == "problem"
    assert "Is it MLflow's server" in found.remedy


def test_database_that_was_not_migrated_is_a_problem(stack, environ, home, tmp_path):
    shutil.copy(home / "mlflow.db", tmp_path / "older.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "older.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'older'")
    environ(MLFLOW_BACKEND_STORE_URI=f"sqlite:///{tmp_path / 'older.db'}", SLIMLINE_HOME=str(tmp_path))
    (found,) = stores.databases()
    assert f"older.db is at older; the mlflow installed here expects {tracking.expected_schema()}" in found.says
    assert f"mlflow db upgrade sqlite:///{tmp_path / 'older.db'}" in found.remedy
    environ(MLFLOW_BACKEND_STORE_URI=f"sqlite:///{tmp_path / 'empty.db'}")
    (found,) = stores.databases()
    assert "is empty: its tables were never made" in found.says


def test_secrets_that_would_travel_unencrypted_are_told(environ, tmp_path):
    environ(SLIMLINE_TRACKING_URI="http://192.0.2.1:5000", MLFLOW_TRACKING_PASSWORD="secret-word")
    found = first(servers.network(), "encryption")
    assert found.state == "warning"
    assert "MLflow (http://192.0.2.1:5000)" in found.says
    environ(SLIMLINE_TRACKING_URI="https://192.0.2.1:5000", MLFLOW_TRACKING_INSECURE_TLS="true")
    assert first(servers.network(), "encryption").says == "certificates are not checked by MLflow"
    environ(MLFLOW_TRACKING_SERVER_CERT_PATH=str(tmp_path / "ca.pem"))
    assert "there is no such file" in first(servers.network(), "encryption").says


def test_name_that_nobody_knows_is_a_problem(environ):
    environ(SLIMLINE_TRACKING_URI="http://mlflow.invalid:5000")
    assert first(servers.network(), "names").says == "mlflow.invalid cannot be resolved here"


def test_passwords_are_not_shown():
    assert shown("postgresql://mlflow:pa:ss@db/mlflow") == "postgresql://mlflow:***@db/mlflow"
    assert shown("redis://:word@cache:6379/0") == "redis://:***@cache:6379/0"
    assert shown("http://mlflow:5000/#/runs") == "http://mlflow:5000/#/runs"
