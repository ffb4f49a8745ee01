import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from infra import services, tracking
from infra.services import ROOT, ProcessId, down, running, up
from infra.settings import environment, settings

SERVED = """
import subprocess, sys
from prefect import flow, serve

@flow
def hello() -> None: ...

if __name__ == "__main__":
    # Prefect starts flow runs in sessions of their own, too
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    serve(hello.to_deployment("hello"))
"""
EMBEDDED = """
from infra.settings import prepare_environment
prepare_environment()
from prefect import flow
from infra.tracking import end_flow, start_flow

@flow(name="earlier")
def earlier() -> None:
    end_flow(start_flow("earlier", recipe_json="{}", tags={}), "FINISHED")

earlier()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    where = tmp_path_factory.mktemp("home").resolve()
    (where / "served.py").write_text(SERVED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMLINE_HOME", str(where))
        settings.cache_clear()
        yield where
    settings.cache_clear()
    services._kill(where)


@pytest.fixture(scope="module")
def started(home):
    environ = environment(PREFECT_HOME=None, PREFECT_API_URL=None, MLFLOW_TRACKING_URI=None)
    subprocess.run([sys.executable, "-c", EMBEDDED], cwd=ROOT, env=environ, check=True)
    yield up(home, deployments=served(home))
    down(home)


def served(home: Path) -> list[str]:
    return [sys.executable, str(home / "served.py")]


def ask(url: str, body: object = None, **headers: str):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return answer.status, answer.read()


def left(home: Path) -> list[list[str]]:
    return [process.cmdline() for process in services._marked(home)]


@pytest.mark.servers
def test_both_pages_open_on_loopback_and_refuse_foreign_hosts(started):
    for page in (started.mlflow_url, started.prefect_url):
        for url in (page, page.replace("127.0.0.1", "localhost")):
            status, text = ask(f"{url}/")
            assert status == 200
            assert b"<html" in text.lower()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        ask(f"{started.mlflow_url}/", Host="evil.example")


@pytest.mark.servers
def test_runs_made_without_servers_are_shown(started):
    found = json.loads(ask(f"{started.prefect_api_url}/flows/filter", {})[1])
    assert {"earlier", "hello"} <= {flow["name"] for flow in found}
    experiment = tracking.experiment_id()
    names = [run.info.run_name for run in tracking.client().search_runs([experiment])]
    assert names == ["earlier"]
    url = tracking.client().search_runs([experiment])[0].data.tags["prefect.flow_run_url"]
    assert url.startswith(started.prefect_url)  # chosen before the server ran


@pytest.mark.servers
def test_while_servers_run_they_are_used(started, tmp_path):
    assert tracking.tracking_uri() == started.mlflow_url
    parent = tracking.start_flow("served", recipe_json='{"seed": 1}', tags={})
    (tmp_path / "report.html").write_text("<html>42</html>")
    tracking.link_report(parent, tmp_path / "report.html")
    query = f"get-artifact?path=report.html&run_uuid={parent.run_id}"
    assert ask(f"{started.mlflow_url}/{query}")[1] == b"<html>42</html>"
    tracking.end_flow(parent, "FINISHED")


@pytest.mark.servers
def test_a_second_up_says_what_runs(started, home):
    assert running(home) == started
    assert up(home, deployments=["never", "started"]) == started


@pytest.mark.servers
def test_when_a_child_dies_the_rest_ends_and_the_log_says_why(started, home):
    server = next(p for p in services._marked(home) if "mlflow" in p.cmdline() and p.ppid() == started.pid)
    server.kill()
    wait_until(lambda: not left(home))
    assert running(home) is None
    assert "mlflow ended with SIGKILL" in (home / "logs" / "supervisor.log").read_text()
    assert not (home / "services.json").exists()
    assert down(home) is False


@pytest.mark.servers
@pytest.mark.slow
def test_down_finds_what_a_killed_supervisor_left(home):
    found = up(home, deployments=served(home))
    assert len(left(home)) >= 5  # the supervisor, two servers, the deployments, and what those started
    os.kill(found.pid, signal.SIGKILL)
    wait_until(lambda: running(home) is None)
    assert left(home)
    assert down(home) is True
    assert left(home) == []
    assert down(home) is False


@pytest.mark.servers
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_up_leaves_nothing(number, tmp_path):
    code = "import sys; from pathlib import Path; from infra.services import up; up(Path(sys.argv[1]))"
    starting = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
    )
    wait_until(lambda: len(left(tmp_path)) >= 2)
    starting.send_signal(number)
    assert starting.wait(30) != 0
    wait_until(lambda: not left(tmp_path))
    assert running(tmp_path) is None


@pytest.mark.servers
def test_an_up_that_takes_too_long_says_what_did_not_answer_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=rf"was not ready after 1 s\. Logs: {tmp_path}/logs"):
        up(tmp_path, deployments=["never", "started"], timeout_s=1)
    assert left(tmp_path) == []


@pytest.mark.parametrize("what", ["dead", "reused"])
def test_a_stale_note_is_recognised(what, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    pid = child.pid if what == "dead" else os.getpid()
    state = services._State(
        supervisor=ProcessId(pid=pid, started_at=ProcessId.own().started_at - 100),
        addresses=services.addresses(tmp_path),
        state="running",
    )
    (tmp_path / "services.json").write_text(state.model_dump_json())
    assert running(tmp_path) is None
    assert down(tmp_path) is False
    assert not (tmp_path / "services.json").exists()


def test_addresses_are_chosen_once_and_change_only_when_somebody_else_took_them(tmp_path):
    import socket

    first = services.addresses(tmp_path)
    assert services.addresses(tmp_path) == first
    assert services._free_ports(tmp_path)["mlflow"] == services._port(first.mlflow_url)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((services.HOST, services._port(first.mlflow_url)))
        other.listen()
        assert services._free_ports(tmp_path)["mlflow"] != services._port(first.mlflow_url)
    assert services.addresses(tmp_path).prefect_url == first.prefect_url


def wait_until(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_a_process_is_told_from_a_later_one_with_its_number():
    own = ProcessId.own()
    assert own.alive()
    assert not own.model_copy(update={"started_at": own.started_at - 10}).alive()
    assert not ProcessId(pid=max(psutil.pids()) + 100_000, started_at=0).alive()
