"""The deployment `promote` on a real Prefect server, with a worker: asked for, suspended, answered, carried out."""

import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from infra.ledger import entries
from infra.settings import environment, settings
from infra.tracking import client, end_flow, start_flow
from tests.flows.released import ROOT, compiled, register
from tests.homes import home_at
from tests.infra.asking import ask_json, end_group, unused_port, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.real]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with home_at(tmp_path_factory.mktemp("home")) as where:
        yield where


@pytest.fixture(scope="module")
def api(home: Path) -> Iterator[str]:
    """The address of a Prefect server that has the deployments of the pool, and a worker."""
    port = unused_port()
    address = f"http://127.0.0.1:{port}/api"
    ours = environment(
        SLIMLINE_HOME=str(home),
        SLIMLINE_PREFECT_API_URL=address,
        PREFECT_API_URL=address,
        PREFECT_HOME=str(home / "prefect"),
        PREFECT_UI_STATIC_DIRECTORY=str(home / "ui"),
        PREFECT_WORKER_QUERY_SECONDS="2",
        PYTHONPATH=str(ROOT),
    )
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: str) -> None:
        with (home / f"{name}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command], cwd=ROOT, env=ours, stdout=log, stderr=log, start_new_session=True
                )
            )

    try:
        start("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
        wait_until(lambda: ask_json(f"{address}/flows/filter", {}) == [], 180, "Prefect")
        subprocess.run([sys.executable, "-m", "flows.deployments", "--pool", "release"], cwd=ROOT, env=ours, check=True)
        start("worker", "prefect", "worker", "start", "--pool", "release", "--install-policy", "never")
        yield address
    finally:
        for process in reversed(started):
            end_group(process)


def state(api: str, run: str) -> dict[str, Any]:
    return ask_json(f"{api}/flow_runs/{run}")["state"]


def waits(api: str, run: str, pause: str) -> dict[str, Any] | None:
    """The state of a run that waits for its answer number `pause`."""
    found = state(api, run)
    assert found["type"] not in ("FAILED", "CRASHED", "COMPLETED"), found
    return found if found["name"] == "Suspended" and found["state_details"]["pause_key"] == pause else None


def description(api: str, run: str, suspended: dict[str, Any]) -> str | None:
    """What the form of a run that waits shows above its fields; Prefect writes it a moment after the state."""
    key = suspended["state_details"]["run_input_keyset"]["description"]
    try:
        return ask_json(f"{api}/flow_runs/{run}/input/{key}")
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
    return None


def test_a_promotion_waits_for_somebody_else_s_approval_and_is_carried_out(api, home, tiny_checkpoint, tmp_path):
    parent = start_flow("tiny", recipe_json='{"seed": 0}', tags={})
    register("tiny", compiled(tiny_checkpoint, tmp_path), "first", parent, with_code=True)
    end_flow(parent, "FINISHED")
    deployment = ask_json(f"{api}/deployments/name/promote/promote")["id"]
    parameters = {"model": "tiny", "who": "ada", "why": "smaller"}
    run = ask_json(f"{api}/deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]

    suspended = wait_until(lambda: waits(api, run, "1"), 300, "the suspended run")
    described = wait_until(lambda: description(api, run, suspended))
    assert "**ada** asks to promote version 1 of tiny: smaller" in described
    own = {"decision": "approve", "who": "Ada", "why": "I am sure"}
    assert wait_until(lambda: ask_json(f"{api}/flow_runs/{run}/resume", {"run_input": own}))["status"] == "ACCEPT"
    suspended = wait_until(lambda: waits(api, run, "2"), 300, "the run, which waits again")
    described = wait_until(lambda: description(api, run, suspended))
    assert described.startswith("**Ada asked to promote version 1 of tiny, so somebody else must approve it.**")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", api)
        patch.setenv("SLIMLINE_PREFECT_API_URL", api)
        settings.cache_clear()
        said = CliRunner().invoke(app, ["approve", "tiny", "1", "--who", "ben", "--why", "fine"])
    settings.cache_clear()
    assert said.exit_code == 0, said.output
    assert run in said.stdout
    wait_until(lambda: state(api, run)["type"] in ("COMPLETED", "FAILED", "CRASHED"), 300, "the end of the run")
    assert state(api, run)["type"] == "COMPLETED", state(api, run)
    assert str(client().get_model_version_by_alias("tiny", "champion").version) == "1"
    assert [(entry.what, entry.who) for entry in entries("tiny")] == [
        ("requested", "ada"),
        ("refused", "Ada"),
        ("approved", "ben"),
        ("started", "ada"),
        ("promoted", "ada"),
    ]
