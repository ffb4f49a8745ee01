import uuid

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from infra import progress


@task
def stage() -> None:
    with progress.page_progress("int8 quantize") as show:
        show(1, 4)
        show(3, 4)


@flow
def staged() -> None:
    stage()


def test_without_a_page_nothing_is_told():
    with progress.page_progress("int8 quantize") as show:
        show(1, 2)


@pytest.fixture(scope="module")
def page():
    without_heartbeats = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
    with prefect_test_harness(server_startup_timeout=120), without_heartbeats:
        yield


def test_a_stage_that_takes_long_ends_at_100_percent_on_its_page(page, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    staged()
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json={}).json()
    assert [(a["key"], a["type"], a["data"]) for a in found] == [("progress-int8-quantize", "progress", 100)]
    assert found[0]["task_run_id"]


def test_a_server_that_does_not_take_it_disturbs_no_stage(page, monkeypatch, caplog):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)

    @task
    def disturbed() -> str:
        with progress.page_progress(str(uuid.uuid4())) as show:
            show(1, 2)
        return "done"

    def refuse(*_: object, **__: object) -> None:
        raise OSError("away")

    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", refuse)

    @flow
    def run() -> str:
        return disturbed()

    assert run() == "done"
    assert "away" in caplog.text
