import os
import socket
import subprocess
import sys

import psutil
import pytest

from infra.services import addresses, down, running
from infra.services.addresses import FIRST_PORTS, HOST, Note, at, free_ports
from infra.services.credentials import credentials
from infra.services.processes import ProcessId


@pytest.mark.parametrize("what", ["dead", "reused"])
def test_a_stale_note_is_recognised(what, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    pid = child.pid if what == "dead" else os.getpid()
    note = Note(
        supervisor=ProcessId(pid=pid, started_at=ProcessId.own().started_at - 100),
        addresses=addresses(tmp_path),
        database="sqlite",
        state="running",
    )
    (tmp_path / "services.json").write_text(note.model_dump_json())
    assert running(tmp_path) is None
    assert down(tmp_path) is False
    assert not (tmp_path / "services.json").exists()


def test_addresses_are_chosen_once_and_change_only_when_somebody_else_took_them(tmp_path):
    first = addresses(tmp_path)
    assert addresses(tmp_path) == first
    with free_ports(tmp_path) as ports:
        assert at(ports) == first
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((HOST, ports["mlflow"]))
        other.listen()
        with free_ports(tmp_path) as changed:
            assert changed["mlflow"] != ports["mlflow"]
    assert {**changed, "mlflow": 0} == {**ports, "mlflow": 0}
    assert addresses(tmp_path).prefect_url == first.prefect_url


def test_two_homes_that_start_at_once_choose_different_ports(tmp_path):
    with free_ports(tmp_path / "a") as ours, free_ports(tmp_path / "b") as theirs:
        assert len({*ours.values(), *theirs.values()}) == 2 * len(FIRST_PORTS)


def test_a_process_is_told_from_a_later_one_with_its_number():
    own = ProcessId.own()
    assert own.alive()
    assert not own.model_copy(update={"started_at": own.started_at - 10}).alive()
    assert not ProcessId(pid=max(psutil.pids()) + 100_000, started_at=0).alive()


def test_credentials_are_made_once_per_home(tmp_path):
    made = credentials(tmp_path)
    assert credentials(tmp_path) == made
    assert (tmp_path / "credentials.json").stat().st_mode & 0o777 == 0o600
    assert credentials(tmp_path / "other").s3_secret_key != made.s3_secret_key
