import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path
from tempfile import TemporaryDirectory

import boto3
import psutil
import pytest

from infra import tracking
from infra.services import Services, down, running, up
from infra.services.credentials import credentials
from infra.services.processes import kill, marked
from infra.services.programs import ROOT
from infra.services.supervisor import MAX_DEATHS
from infra.settings import environment, settings
from tests.infra.asking import ask, ask_json, wait_until

DEPLOYED = """
import subprocess, sys
from prefect import flow
from prefect.client.orchestration import get_client
from flows.deployments import WorkPool, _put_pool
from pathlib import Path

@flow
def hello() -> None:
    # like stages, in a session of its own
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)

if __name__ == "__main__":
    with get_client(sync_client=True) as client:
        _put_pool(client, "cpu", WorkPool(), Path())
    hello.from_source(str(Path(__file__).parent), "deployed.py:hello").deploy("hello", work_pool_name="cpu")
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
def home():
    # Not below pytest's own directory: every pytest that starts closes it to other users, and root's PostgreSQL is one
    with TemporaryDirectory(prefix="slimline-home-") as directory, pytest.MonkeyPatch.context() as patch:
        where = Path(directory).resolve()
        (where / "deployed.py").write_text(DEPLOYED)
        patch.setenv("SLIMLINE_HOME", str(where))
        settings.cache_clear()
        yield where
        kill(where)
    settings.cache_clear()


@pytest.fixture(scope="module")
def started(home):
    environ = environment(PREFECT_HOME=None, PREFECT_API_URL=None, MLFLOW_TRACKING_URI=None)
    subprocess.run([sys.executable, "-c", EMBEDDED], cwd=ROOT, env=environ, check=True)
    yield up(home, deploy=deployed(home))
    down(home)


def deployed(home: Path) -> list[str]:
    return [sys.executable, str(home / "deployed.py")]


def left(home: Path) -> list[list[str]]:
    return [found for process in marked(home) if (found := cmdline(process))]


@pytest.mark.servers
def test_both_pages_open_on_loopback_and_refuse_foreign_hosts(started):
    for page in (started.mlflow_url, started.prefect_url):
        for url in (page, page.replace("127.0.0.1", "localhost")):
            status, text = ask(f"{url}/")
            assert status == 200
            assert b"<html" in text.lower()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        ask(f"{started.mlflow_url}/", headers={"Host": "evil.example"})


@pytest.mark.servers
def test_runs_made_without_servers_are_shown(started):
    found = ask_json(f"{started.prefect_api_url}/flows/filter", {})
    assert {"earlier", "hello"} <= {flow["name"] for flow in found}
    (run,) = tracking.client().search_runs(tracking.experiment_ids())
    assert run.info.run_name == "earlier"
    assert run.data.tags["prefect.flow_run_url"].startswith(started.prefect_url)  # chosen before the server ran
    query = f"get-artifact?path=recipe.json&run_uuid={run.info.run_id}"
    assert ask(f"{started.mlflow_url}/{query}")[1] == b"{}"  # a file below the home


@pytest.mark.servers
def test_while_servers_run_they_are_used_and_files_lie_in_their_s3(started, home, tmp_path):
    assert tracking.tracking_uri() == started.mlflow_url
    parent = tracking.start_flow("served", recipe_json='{"seed": 1}', tags={})
    (tmp_path / "report.html").write_text("<html>42</html>")
    tracking.link_report(parent, tmp_path / "report.html")
    tracking.end_flow(parent, "FINISHED")
    query = f"get-artifact?path=report.html&run_uuid={parent.run_id}"
    assert ask(f"{started.mlflow_url}/{query}")[1] == b"<html>42</html>"
    in_s3 = boto3.client(
        "s3",
        endpoint_url=started.s3_url,
        region_name="us-east-1",
        **{name.lower(): value for name, value in credentials(home).for_s3().items() if value},
    )
    listed = in_s3.list_objects_v2(Bucket="mlflow")["Contents"]
    assert f"{parent.experiment}/{parent.run_id}/artifacts/report.html" in {item["Key"] for item in listed}
    assert tracking.find_flow_run("served").run_id == parent.run_id
    assert tracking.find_flow_run("earlier").experiment != parent.experiment


@pytest.mark.servers
def test_nobody_without_the_keys_reads_the_store(started, home):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        ask(f"{started.s3_url}/mlflow")
    filer = json.loads((home / "ports.json").read_text())["filer"]
    with pytest.raises(OSError, match=r"refused|404|405"):
        ask(f"http://127.0.0.1:{filer}/buckets/mlflow/")


@pytest.mark.servers
def test_a_flow_run_asked_for_by_the_api_runs_on_the_worker(started):
    deployment = ask_json(f"{started.prefect_api_url}/deployments/name/hello/hello")
    run = ask_json(f"{started.prefect_api_url}/deployments/{deployment['id']}/create_flow_run", {})

    def state() -> str:
        return ask_json(f"{started.prefect_api_url}/flow_runs/{run['id']}")["state"]["name"]

    wait_until(lambda: state() in ("Completed", "Failed", "Crashed"), timeout_s=120)
    assert state() == "Completed"


@pytest.mark.servers
def test_secrets_are_in_their_owners_files_only(started, home):
    keys = credentials(home)
    secrets = [keys.s3_secret_key, keys.postgres_password]
    assert not any(secret.get_secret_value() in repr(keys) for secret in secrets)
    holders = {
        file.relative_to(home).as_posix(): file.stat().st_mode & 0o777
        for file in home.rglob("*")
        if file.is_file() and any(secret.get_secret_value().encode() in file.read_bytes() for secret in secrets)
    }
    assert holders == {"credentials.json": 0o600, "seaweedfs/identities.json": 0o600}
    commands = [" ".join(process.cmdline()) for process in marked(home)]
    assert commands
    assert not any(secret.get_secret_value() in command for secret in secrets for command in commands)


@pytest.mark.servers
def test_a_second_up_says_what_runs(started, home):
    assert running(home) == started
    assert up(home, deploy=["never", "started"]) == started
    with pytest.raises(ValueError, match=r"stopped to run on postgres; they run on sqlite .* slimline down"):
        up(home, database="postgres")


@pytest.mark.servers
def test_what_dies_is_started_again(started, home):
    (server,) = servers(started, "mlflow")
    family = [server, *server.children(recursive=True)]
    assert len(family) > 1  # which held the port
    server.kill()
    wait_until(lambda: servers(started, "mlflow") not in ([], [server]), 60)
    wait_until(lambda: ask(f"{started.mlflow_url}/")[0] == 200)
    assert not [process for process in family if process.is_running()]
    assert running(home) == started
    assert tracking.find_flow_run("served")
    said = (home / "logs" / "supervisor.log").read_text()
    assert re.search(r"mlflow ended with SIGKILL: .*\. It is started again\.", said)


@pytest.mark.servers
def test_a_slot_that_a_run_holds_outlives_prefects_server(started):
    limits = f"{started.prefect_api_url}/v2/concurrency_limits"
    ask_json(f"{limits}/", {"name": "held", "limit": 1})
    asked = {"names": ["held"], "slots": 1, "mode": "concurrency", "lease_duration": 300}
    lease = ask_json(f"{limits}/increment-with-lease", asked)["lease_id"]
    (server,) = servers(started, "prefectserver")
    server.kill()
    wait_until(lambda: servers(started, "prefectserver") not in ([], [server]), 60)
    wait_until(lambda: ask_json(f"{limits}/held"), what="Prefect again")
    assert ask(f"{limits}/leases/{lease}/renew", {"lease_duration": 300})[0] == 204  # else the run would be ended
    assert ask_json(f"{limits}/held")["active_slots"] == 1


def servers(started: Services, name: str) -> list[psutil.Process]:
    """The processes of that program which the supervisor started itself."""
    return [p for p in psutil.Process(started.pid).children() if name in "".join(cmdline(p)[:4])]


@pytest.mark.servers
def test_when_a_child_dies_too_often_the_rest_ends_and_the_log_says_why(started, home):
    for _ in range(1 + MAX_DEATHS):
        (store,) = wait_until(lambda: servers(started, "weed"), 60)
        store.kill()
        wait_until(lambda store=store: not store.is_running(), 60)
    wait_until(lambda: not left(home), 60)
    assert running(home) is None
    said = (home / "logs" / "supervisor.log").read_text()
    assert re.search(r"s3 ended with SIGKILL: .*\. That was the 6th time in 10 minutes\.", said)
    assert not (home / "services.json").exists()
    assert down(home) is False
    with pytest.raises(ValueError, match=r"lie in the S3 server of `slimline up`, which does not run"):
        tracking.report_figures(tracking.find_flow_run("served"))


@pytest.mark.servers
@pytest.mark.slow
def test_down_finds_what_a_killed_supervisor_left(home):
    down(home)
    found = up(home, database="postgres", deploy=deployed(home))
    assert ask_json(f"{found.prefect_api_url}/work_pools/cpu")["name"] == "cpu"
    assert tracking.experiment_ids() == []  # SQLite's runs stay with SQLite
    assert len(left(home)) >= 6  # the supervisor, the store, two servers, their database and the worker
    os.kill(found.pid, signal.SIGKILL)
    wait_until(lambda: running(home) is None, 60)
    assert left(home)
    assert down(home) is True
    assert left(home) == []
    wait_until(lambda: not [p for p in psutil.process_iter() if str(home) in " ".join(cmdline(p))], 10)
    assert down(home) is False


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.servers
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_up_leaves_nothing(number, tmp_path):
    code = "import sys; from pathlib import Path; from infra.services import up; up(Path(sys.argv[1]))"
    starting = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
    )
    wait_until(lambda: len(left(tmp_path)) >= 2, 60)
    starting.send_signal(number)
    assert starting.wait(30) != 0
    wait_until(lambda: not left(tmp_path), 60)
    assert running(tmp_path) is None


@pytest.mark.servers
def test_an_up_that_takes_too_long_says_what_did_not_answer_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=rf"was not ready after 1 s\. Logs: {tmp_path}/logs"):
        up(tmp_path, deploy=["never", "started"], timeout_s=1)
    assert left(tmp_path) == []
