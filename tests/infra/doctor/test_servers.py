"""What `slimline doctor` says of servers: real ones, and what a proxy before them does to their answers."""

import http.client
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from time import time
from urllib.parse import urlsplit

import pytest

from infra import services
from infra.doctor import servers, stores
from infra.doctor.examination import examine
from infra.doctor.finding import Finding
from infra.settings import settings, shown

pytestmark = pytest.mark.servers

FORMS = """
from prefect import flow

@flow
def hello() -> None: ...

deployment = hello.to_deployment("start")
deployment.entrypoint = "flows.start.start"
deployment.work_pool_name = "cpu"
deployment.apply()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home").resolve()


@pytest.fixture(scope="module")
def stack(home):
    """The servers of `slimline up` with its deployments."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLIMLINE_", "PREFECT_", "MLFLOW_"))]:
            patch.delenv(name)
        patch.setenv("SLIMLINE_HOME", str(home))
        settings.cache_clear()
        try:
            yield services.up(home)
        finally:
            services.down(home)
            settings.cache_clear()


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
            headers = {**self.headers, "Host": host or where.netloc}
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


@pytest.fixture
def closed_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_nothing_configured_is_nothing_wrong(environ, tmp_path):
    environ(SLIMLINE_HOME=str(tmp_path))
    found = examine(["mlflow", "prefect", "databases", "network", "redis"])
    assert {finding.state for finding in found} == {"skipped"}
    assert "runs are kept in sqlite" in first(iter(found), "mlflow").says


def test_running_stack_is_well(stack, environ):
    found = examine(["mlflow", "prefect", "databases", "network"])
    assert [finding for finding in found if finding.state not in ("ok", "skipped")] == []
    names = {finding.name: finding.says for finding in found}
    assert {"mlflow", "prefect", "deployments", "database of mlflow", "database of prefect"} <= names.keys()
    assert "start" in names["deployments"]


def test_slot_that_no_run_holds_is_found_and_the_remedy_frees_it(stack, environ):
    environ(PREFECT_API_URL=stack.prefect_api_url)
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    subprocess.run([*prefect, "gcl", "create", "gpu", "--limit", "2", "--active-slots", "1"], check=True)
    found = first(iter(examine(["prefect"])), "slots")
    assert (found.state, found.says) == ("problem", "gpu (1 of 2) are held and no flow runs")
    remedy = found.remedy.removeprefix("Free them: ").partition(";")[0].split()
    subprocess.run([sys.executable, "-m", *remedy], check=True)
    assert first(iter(examine(["prefect"])), "slots").state == "ok"


def test_pool_without_a_worker_is_a_problem(stack, environ):
    environ(PREFECT_API_URL=stack.prefect_api_url)
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    subprocess.run([*prefect, "work-pool", "create", "cpu", "--type", "process"], check=True)
    subprocess.run([sys.executable, "-c", FORMS], check=True)
    found = first(iter(examine(["prefect"])), "pool cpu")
    assert found.state == "problem"
    assert "no worker polls it (last seen: never)" in found.says
    assert "prefect worker start --pool cpu" in found.remedy
    subprocess.run([*prefect, "work-pool", "pause", "cpu"], check=True)
    assert first(iter(examine(["prefect"])), "pool cpu").says == "is paused: its runs wait"


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
    (found,) = [each for each in examine(["prefect"], timeout_s=60) if each.name == "prefect"]
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
        assert "is prefect 3.1.0; this machine has 3." in first(iter(examine(["prefect"])), "prefect").says


def test_clock_that_differs_is_a_problem(stack, environ):
    with proxy(stack.mlflow_url, date=formatdate(time() - 3600, usegmt=True)) as address:
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


def test_database_that_was_not_migrated_is_a_problem(environ, tmp_path):
    environ(MLFLOW_BACKEND_STORE_URI=f"sqlite:///{tmp_path / 'empty.db'}", SLIMLINE_HOME=str(tmp_path))
    found = first(stores.databases(), "database of mlflow")
    assert found.state == "problem"
    assert "mlflow db upgrade" in found.remedy
    subprocess.run(found.remedy.partition(": ")[2].split(), check=True, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})  # fmt: skip
    assert first(stores.databases(), "database of mlflow").state == "ok"


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


def test_command_ends_with_1_where_there_is_a_problem(environ, closed_port, home):
    environ(SLIMLINE_TRACKING_URI=closed_port)
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "doctor", "mlflow", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (found,) = json.loads(done.stdout)
    assert found["state"] == "problem"
