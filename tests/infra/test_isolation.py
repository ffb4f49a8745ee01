import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

from infra.failures import InfrastructureError
from infra.isolation import StageCrashed, StageFailed, run_isolated

STAGES = """
import ctypes, os, time
from pathlib import Path
from pydantic import BaseModel

class Doubled(BaseModel):
    value: int

def double(*, value: int, path: Path, report=None) -> Doubled:
    assert isinstance(path, Path)
    for step in range(3):
        report(step + 1, 3, {"loss": 1.0 / (step + 1)})
    print("noise on standard output")
    return Doubled(value=2 * value)

def refuse(*, value: int) -> None:
    raise ValueError(f"value must be even; got {value}. Add one.")

def surprise() -> None:
    raise KeyError("oops")

def segfault() -> None:
    ctypes.string_at(0)

def full() -> None:
    raise OSError(28, "No space left on device", "/data/model.safetensors")

def too_large(*, out: Path) -> None:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    (out / "weights").write_bytes(bytes(10_000))

def save(*, out: Path) -> None:
    import numpy
    from safetensors.numpy import save_file
    save_file({"weight": numpy.ones(4_000_000, numpy.float32)}, out / "model.safetensors")

def map_more_than_there_is(*, out: Path) -> None:
    import numpy
    numpy.memmap(out / "weights", dtype="uint8", mode="w+", shape=16_000_000)[:] = 1

def hang(*, pidfile: Path) -> None:
    import subprocess
    grandchild = subprocess.Popen(["sleep", "600"])
    pidfile.write_text(f"{os.getpid()} {grandchild.pid}")
    time.sleep(600)
"""


class Doubled(BaseModel):
    value: int


@pytest.fixture(autouse=True)
def _stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_stages.py").write_text(STAGES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def call(name: str, tmp_path: Path, result=None, **kwargs):
    arguments = kwargs.pop("arguments", {})
    return run_isolated(
        f"some_stages:{name}", arguments, result=result or type(None), log_path=tmp_path / "log", **kwargs
    )


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_soon(*pids: int) -> bool:
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def test_returns_the_typed_result_and_tells_the_progress(tmp_path):
    seen = []
    value, finished = call(
        "double",
        tmp_path,
        Doubled,
        arguments={"value": 21, "path": tmp_path},
        on_progress=lambda *progress: seen.append(progress),
    )
    assert value == Doubled(value=42)
    assert [step for step, *_ in seen] == [1, 2, 3]
    assert finished.peak_memory_mib > 1
    assert "noise" in (tmp_path / "log").read_text()


def test_a_refusal_arrives_as_its_own_sentence(tmp_path):
    with pytest.raises(StageFailed, match=r"^value must be even; got 3\. Add one\.$"):
        call("refuse", tmp_path, arguments={"value": 3})


def test_an_argument_of_the_wrong_type_is_refused_before_the_work(tmp_path):
    with pytest.raises(StageFailed, match="valid integer"):
        call("refuse", tmp_path, arguments={"value": "three"})


def test_a_surprise_names_the_log_with_the_traceback(tmp_path):
    with pytest.raises(StageCrashed, match=r"KeyError.*log"):
        call("surprise", tmp_path)
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_native_crash_is_one_clear_error(tmp_path):
    with pytest.raises(StageCrashed, match="SIGSEGV"):
        call("segfault", tmp_path)


def test_a_full_disk_says_which_file_and_what_to_do_and_is_no_failure_of_the_stage(tmp_path):
    with pytest.raises(InfrastructureError, match=r"disk is full.*/data/model\.safetensors.*[Ff]ree"):
        call("full", tmp_path)


def test_a_limit_on_the_size_of_files_is_no_failure_of_the_stage(tmp_path):
    with pytest.raises(InfrastructureError, match=r"may not grow any further.*ulimit -f"):
        call("too_large", tmp_path, arguments={"out": str(tmp_path)})


@pytest.mark.parametrize("stage", ["save", "map_more_than_there_is"])
def test_a_disk_that_really_is_full_is_told_from_how_the_stage_ended(tmp_path, small_disk, stage):
    """safetensors says it in words of its own, and mapped memory ends the process with SIGBUS."""
    (tmp_path / "on_small_disk.py").write_text(
        "from infra.isolation import run_isolated\nfrom pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    disk = Path({str(tmp_path / 'disk')!r})\n"
        f"    run_isolated('some_stages:{stage}', {{'out': disk}}, result=type(None), log_path=disk / 'log')\n"
    )
    (tmp_path / "disk").mkdir()
    run = small_disk(tmp_path / "disk", "2m", sys.executable, "-m", "on_small_disk")
    assert "InfrastructureError: The disk is full" in run.stderr, run.stderr
    assert f"free at {tmp_path / 'disk'}" in run.stderr


def test_a_hanging_stage_ends_at_its_limit_with_its_children(tmp_path):
    pidfile = tmp_path / "pids"
    with pytest.raises(StageCrashed, match="limit of 3 s"):
        call("hang", tmp_path, arguments={"pidfile": pidfile}, timeout_s=3)
    assert gone_soon(*map(int, pidfile.read_text().split()))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stage_ends_when_its_parent_does(tmp_path, how):
    pidfile = tmp_path / "pids"
    log = tmp_path / "log"
    (tmp_path / "flow.py").write_text(
        "from infra.isolation import run_isolated\nfrom pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    arguments = {{'pidfile': {str(pidfile)!r}}}\n"
        f"    run_isolated('some_stages:hang', arguments, result=type(None), log_path=Path({str(log)!r}))\n"
    )
    parent = subprocess.Popen([sys.executable, "-m", "flow"], stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.monotonic() + 60
    while not (pidfile.exists() and pidfile.read_text().count(" ")) and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(pid) for pid in pidfile.read_text().split()]
    assert all(map(is_alive, pids))
    parent.send_signal(how)
    parent.wait()
    assert gone_soon(*pids)
