"""Who may run beside whom, between real processes; and slots of GPUs, on a real Prefect server."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.settings import settings
from infra.slots import Needs, slots

ROOT = Path(__file__).parents[2]
STAGE = """
import sys, time
from pathlib import Path
from infra.settings import prepare_environment
prepare_environment()
from infra.slots import Needs, slots

name, needs, hold_s, log = sys.argv[1], Needs.model_validate_json(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])

def say(what):
    with log.open("a") as stream:
        stream.write(f"{what} {name} {time.monotonic()}\\n")

with slots(needs, lambda what: say(f"waits for {what}:")):
    say("begin")
    time.sleep(hold_s)
    say("end")
"""


class Stages:
    """Processes that take slots, and what they said: (words, time)."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        self.environment = {"SLIMLINE_HOME": str(home), "SLIMLINE_MACHINE_LOCK": str(home / "machine"), **environment}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, name: str, hold_s: float, **needs: bool) -> subprocess.Popen[str]:
        wanted = Needs(cores=1, **needs).model_dump_json()
        command = [sys.executable, "-c", STAGE, name, wanted, str(hold_s), str(self.home / "log")]
        self.started.append(
            subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **self.environment}, stderr=subprocess.PIPE, text=True
            )
        )
        return self.started[-1]

    def said(self) -> dict[str, float]:
        if not (self.home / "log").exists():
            return {}
        lines = (line.rpartition(" ") for line in (self.home / "log").read_text().splitlines())
        return {words: float(at) for words, _, at in lines}

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 60
        while not any(words in said for said in self.said()):
            assert time.monotonic() < deadline, f"{words!r} was never said: {self.said()}"
            time.sleep(0.02)


@pytest.fixture
def stages(tmp_path):
    found = Stages(tmp_path)
    yield found
    for process in found.started:
        process.kill()
        process.communicate()


def test_stages_run_beside_each_other_but_not_beside_one_that_is_timed(stages):
    first, second = stages.start("a", 3), stages.start("b", 3)
    stages.wait_for("begin a")
    stages.wait_for("begin b")
    timed = stages.start("timed", 1, alone=True)
    stages.wait_for("waits for the other stages on this machine to end")
    later = stages.start("later", 0)  # it does not overtake the one that waits
    for process in (first, second, timed, later):
        assert process.wait(60) == 0
    said = stages.said()
    assert max(said["begin a"], said["begin b"]) < min(said["end a"], said["end b"])
    assert said["begin timed"] > max(said["end a"], said["end b"])
    assert said["begin later"] >= said["end timed"]


def test_a_killed_process_holds_the_machine_no_longer(stages):
    timed = stages.start("timed", 600, alone=True)
    stages.wait_for("begin timed")
    other = stages.start("other", 0)
    stages.wait_for("waits for a stage that is timed")
    timed.kill()
    assert other.wait(60) == 0


@pytest.mark.servers
def test_stages_on_gpus_take_the_slots_of_the_fleet_s_limit(tmp_path):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        with get_client(sync_client=True) as client:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="gpu:90", limit=1, active=True))
        found = Stages(tmp_path, SLIMLINE_GPU_LIMIT="gpu:90", PREFECT_API_URL=PREFECT_API_URL.value())
        first, second, cpu = (
            found.start("a", 2, gpu=True),
            found.start("b", 2, gpu=True),
            found.start("cpu", 0),
        )
        for process in (first, second, cpu):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        said = found.said()
        assert said["begin b"] >= said["end a"] or said["begin a"] >= said["end b"]
        with get_client(sync_client=True) as client:
            assert client.read_global_concurrency_limit_by_name("gpu:90").active_slots == 0

        missing = Stages(tmp_path, SLIMLINE_GPU_LIMIT="gpu:120", PREFECT_API_URL=PREFECT_API_URL.value())
        _, errors = missing.start("x", 0, gpu=True).communicate(timeout=120)
        assert "ValueError: SLIMLINE_GPU_LIMIT=gpu:120 needs a concurrency limit of that name" in errors
        assert "prefect gcl create gpu:120" in errors


def test_without_a_limit_a_gpu_is_not_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIMLINE_MACHINE_LOCK", str(tmp_path / "machine"))
    settings.cache_clear()
    with slots(Needs(cores=1, gpu=True), pytest.fail):
        pass
    settings.cache_clear()
