"""Failed stages tried again, by what ended them: through Prefect and MLflow, in a process as users run it."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.retrying import Attempts, Retries, kind_of
from infra.isolation import NativeCrash, OutOfMemory, StageCrashed, StageFailed, TookTooLong
from tests.flows.command_line import ROOT

STAGES = """
import ctypes, subprocess, sys, time
from pathlib import Path
from pydantic import BaseModel

class Done(BaseModel):
    calls: int

def called(log: Path) -> int:
    with log.open("a") as stream:
        stream.write(".")
    return len(log.read_text())

def crash_once(*, log: Path, out: Path) -> Done:
    if called(log) == 1:
        ctypes.string_at(0)
    (out / "file").write_text("made")
    return Done(calls=called(log))

def crash_always(*, log: Path, out: Path) -> Done:
    called(log)
    ctypes.string_at(0)

def refuse(*, log: Path, out: Path) -> Done:
    called(log)
    raise ValueError("never with this input")

def hang(*, log: Path, out: Path) -> Done:
    called(log)
    time.sleep(600)

HOLD = '''
import sqlite3, sys, time
held = sqlite3.connect(sys.argv[1], timeout=30)
held.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
'''

def lock_the_database(*, log: Path, out: Path, database: Path, hold_s: float) -> Done:
    calls = called(log)
    (out / "file").write_text("computed once")
    # It outlives this stage, which is recorded while the database is locked.
    holder = subprocess.Popen([sys.executable, "-c", HOLD, database, str(hold_s)], stdout=-1, start_new_session=True)
    holder.stdout.readline()
    return Done(calls=calls)
"""
FLOW = """
import json, sys
from pathlib import Path
from infra.settings import prepare_environment
prepare_environment()
from prefect import flow, task
from prefect.cache_policies import CacheKeyFnPolicy
from flows.retrying import Retries
from flows.running import Runner
from infra.failures import InfrastructureError
from infra.isolation import StageError
from infra.stage import run_stage
from infra.tracking import Parent, StageResult, client, flow_run
from mlflow.store.db import utils
from some_stages import Done
from sqlalchemy import text

class Impatient:  # MLflow waits 20 s for a locked database, which is long for a test
    def __getattr__(self, name):
        import sqlalchemy
        return getattr(sqlalchemy, name)
    def text(self, words):
        return text(words.replace("20000", "300"))

utils.sql = Impatient()
home = Path(sys.argv[1])
policy = CacheKeyFnPolicy(cache_key_fn=lambda context, parameters: f"{parameters['function']}-1")

@task(cache_policy=policy, persist_result=True, result_serializer="json")
def stage(function: str, more: dict, *, parent: Parent, label: str = "") -> StageResult:
    return run_stage(
        function, f"some_stages:{function}", parent=parent, inputs=[], params={}, result=Done, kind="test", label=label,
        arguments={"log": home / f"{function}.log", **more},
    )

@flow
def try_all() -> None:
    with flow_run("try all", recipe_json="{}", tags={}) as parent:
        run = Runner(parent, Retries(transient=5, first_delay_s=0.2))
        ended = {}
        database = {"database": home / "mlflow.db", "hold_s": 4}
        for function, more in {"crash_once": {}, "crash_always": {}, "refuse": {}, "hang": {},
                               "lock_the_database": database}.items():
            run.parent = parent.model_copy(update={"stage_timeout_s": 5.0 if function == "hang" else None})
            try:
                ended[function] = run(stage, "some", function=function, more=more).metrics["calls"]
            except (StageError, InfrastructureError) as error:
                ended[function] = type(error).__name__
    runs = client().search_runs([parent.experiment], "tags.`slimline.role` = 'stage'")
    recorded = [(r.info.run_name, r.info.status, r.data.tags["slimline.attempt"]) for r in runs]
    failures = [record.failures for record in run.records]
    print(json.dumps({"ended": ended, "recorded": sorted(recorded), "failures": failures}))

if __name__ == "__main__":
    try_all()
"""


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> tuple[dict, str, Path]:
    home = tmp_path_factory.mktemp("home")
    (home / "some_stages.py").write_text(STAGES)
    (home / "try_all.py").write_text(FLOW)
    done = subprocess.run(
        [sys.executable, str(home / "try_all.py"), str(home)],
        cwd=home,
        env={
            **os.environ,
            "SLIMLINE_HOME": str(home),
            "PYTHONPATH": f"{ROOT}:{home}",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr, home


def calls(home: Path, function: str) -> int:
    return len((home / f"{function}.log").read_text())


def test_a_native_crash_is_tried_again_once(tried):
    found, said, home = tried
    assert found["ended"]["crash_once"] == 3  # twice in the second attempt
    assert found["ended"]["crash_always"] == "NativeCrash"
    assert calls(home, "crash_always") == 2
    assert len(found["failures"][0]) == 1
    assert "died with SIGSEGV" in found["failures"][0][0]
    assert "again  some stage: attempt 2, after: some_stages:crash_once died with SIGSEGV" in said


def test_a_wrong_input_and_a_time_limit_are_not(tried):
    found, _, home = tried
    assert (found["ended"]["refuse"], calls(home, "refuse")) == ("StageFailed", 1)
    assert found["ended"]["hang"] == "TookTooLong"
    assert [attempt for name, _, attempt in found["recorded"] if "hang" in name] == ["1"]


def test_what_was_computed_before_the_database_was_gone_is_only_recorded_again(tried):
    found, said, home = tried
    assert found["ended"]["lock_the_database"] == 1
    assert calls(home, "lock_the_database") == 1
    assert "database is locked" in said
    assert not list((home / "computed").iterdir())


def test_each_attempt_is_a_run_of_its_own_with_its_number(tried):
    found, *_ = tried
    recorded = Counter(map(tuple, found["recorded"]))
    assert recorded["some crash_once", "FAILED", "1"] == 1
    assert recorded["some crash_once, attempt 2", "FINISHED", "2"] == 1
    assert recorded["some refuse", "FAILED", "1"] == 1
    assert not [name for name, _, attempt in recorded if "refuse" in name and attempt != "1"]


def test_kinds_of_failures():
    assert kind_of(NativeCrash("SIGSEGV")) == "crash"
    assert kind_of(OutOfMemory("killed", 100.0)) == "out_of_memory"
    assert kind_of(ConnectionError("s3://bucket does not answer")) == "transient"
    for lasting in (StageFailed("4 bits of what?"), StageCrashed("KeyError"), TookTooLong("limit"), KeyError("x")):
        assert kind_of(lasting) is None


def test_a_stage_that_had_nearly_all_memory_is_not_tried_again(monkeypatch):
    from types import SimpleNamespace

    import psutil

    memory = SimpleNamespace(total=1000 * 2**20, available=900 * 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    attempts = Attempts("int8 quantize", Retries(wait_for_memory_minutes=0))
    assert not attempts.is_worth_another(OutOfMemory("killed", 850.0))  # 1.25 times that is more than there is
    assert attempts.is_worth_another(OutOfMemory("killed", 300.0))  # others have given some back
    assert not attempts.is_worth_another(OutOfMemory("killed", 300.0))  # once
    memory.available = 310 * 2**20
    assert not Attempts("x", Retries(wait_for_memory_minutes=0)).is_worth_another(OutOfMemory("killed", 300.0))


def test_delays_double_and_retries_are_bounded():
    assert Retries(transient=2, crash=1, out_of_memory=0, first_delay_s=3).delays_s() == [3, 6, 12]
    with pytest.raises(ValidationError, match="less than or equal to 10"):
        Retries(transient=11)
