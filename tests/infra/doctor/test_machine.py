"""What `slimline doctor` says of the machine, each time with the fault really there."""

import json
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.doctor import machine
from infra.doctor.examination import CHECKS, examine
from infra.doctor.finding import Finding, ok, problem
from infra.services.processes import RUN_MARK
from infra.settings import settings

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLIMLINE_", "PREFECT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield tmp_path / "home"
    settings.cache_clear()


def doctor(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", "doctor", "--json", *arguments]


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Finding]:
    return {item["name"]: Finding(**item) for item in json.loads(done.stdout)}


def test_problem_without_a_remedy_is_no_finding():
    with pytest.raises(ValidationError, match="have a remedy"):
        problem("disk", "it is full", "")
    with pytest.raises(ValidationError, match="have a remedy"):
        Finding(name="disk", state="ok", says="room", remedy="none is needed")


def test_this_interpreter_and_its_libraries_are_what_is_tested():
    assert [finding.state for finding in (*machine.python(), *machine.libraries())] == ["ok", "ok"]


def test_other_version_than_the_tested_one_is_named(monkeypatch):
    has = machine._version("rich")
    monkeypatch.setattr(machine, "pins", lambda: {"rich": "0.1"})
    (found,) = machine.libraries()
    assert found.state == "warning"
    assert f"rich {has} (tested: 0.1)" in found.says


def test_version_outside_of_the_bounds_is_a_problem(monkeypatch):
    installed = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: {"rich": "1.0", "typer": None}.get(name, installed(name)))
    (found,) = machine.libraries()
    assert found.state == "problem"
    assert "rich 1.0 is not <16,>=14" in found.says
    assert "typer is absent" in found.says
    assert "make install" in found.remedy


def test_engine_that_crashes_is_named_with_its_signal():
    found = machine.loads("engine broken", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert found.state == "problem"
    assert "SIGSEGV" in found.says
    assert "faulthandler" in found.remedy


def test_engine_that_does_not_load_says_why():
    found = machine.loads("engine absent", "import libabsent")
    assert (found.state, found.says) == ("problem", "does not load: ModuleNotFoundError: No module named 'libabsent'")


def test_engine_that_is_not_installed_is_not_a_problem():
    (found,) = machine.engine("tensorrt")
    if found.state == "skipped":
        assert "slimline[tensorrt]" in found.says
    else:
        assert found.state == "ok"


def test_home_that_can_be_written_is_left_as_it_was(home):
    (found,) = machine.home()
    assert found.state == "ok"
    assert list(home.iterdir()) == []


def test_read_only_home_is_a_problem(small_disk, tmp_path):
    where = tmp_path / "mounted"
    where.mkdir()
    done = small_disk(where, "8m,ro", *doctor("home"), SLIMLINE_HOME=str(where))
    found = told(done)["home"]
    assert done.returncode == 1
    assert found.state == "problem"
    assert "Read-only file system" in found.says
    assert "SLIMLINE_HOME" in found.remedy


def test_full_disk_is_a_problem(small_disk, tmp_path):
    where = tmp_path / "mounted"
    where.mkdir()
    fill = f"head -c 4m /dev/zero > {where}/filled; exec {' '.join(doctor('disk'))}"
    done = small_disk(where, "8m", "sh", "-c", fill, SLIMLINE_HOME=str(where))
    found = told(done)[f"disk {where}"]
    assert done.returncode == 1
    assert found.state == "problem"
    assert found.says.startswith("4.0 MiB are free")
    assert "slimline check" in found.remedy


def test_disk_without_inodes_is_a_problem(small_disk, tmp_path):
    where = tmp_path / "mounted"
    where.mkdir()
    fill = f"touch {where}/1 {where}/2 {where}/3; exec {' '.join(doctor('disk'))}"
    done = small_disk(where, "64m,nr_inodes=4", "sh", "-c", fill, SLIMLINE_HOME=str(where))
    assert "no inode left" in told(done)[f"disk {where}"].says


def test_container_with_less_memory_than_its_machine_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{2 * machine.GIB}\n")
    (tmp_path / "memory.current").write_text(f"{1.5 * machine.GIB:.0f}\n")
    found = machine._cgroup_memory(tmp_path)
    assert found == (2 * machine.GIB, 1.5 * machine.GIB)
    monkeypatch.setattr(machine, "_cgroup_memory", lambda: found)
    said = next(iter(machine.memory()))
    assert said.state == "problem"
    assert said.says.startswith("0.5 of 2.0 GiB are free (the limit of this container")


def test_memory_without_a_limit_is_the_machine_s(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._cgroup_memory(tmp_path) == (None, 0)
    assert next(iter(machine.memory())).name == "memory"


class Nvml(types.ModuleType):
    """The module pynvml, as far as it is called: one GPU of compute capability 9.0, whose driver offers CUDA 12.4."""

    class NVMLError(Exception):
        """Its class of errors."""

    def __init__(self, answers: bool = True, users: tuple[int, ...] = ()) -> None:
        super().__init__("pynvml")
        self.answers, self.users = answers, users

    def nvmlInit(self):
        if not self.answers:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self):
        return b"550.54"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 12040

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetCudaComputeCapability(self, device):
        return 9, 0

    def nvmlDeviceGetMemoryInfo(self, device):
        return types.SimpleNamespace(free=70 * machine.GIB, total=80 * machine.GIB)

    def nvmlDeviceGetName(self, device):
        return "H100"

    def nvmlDeviceGetComputeRunningProcesses(self, device):
        return [types.SimpleNamespace(pid=pid) for pid in self.users]


def test_driver_too_old_for_the_installed_engine_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "MIN_CUDA", {"json": (13, 0)})
    driver, gpu = machine.gpu(Nvml)
    assert driver.state == "problem"
    assert "550.54 offers CUDA 12.4; json here needs 13.0" in driver.says
    assert (gpu.state, gpu.says) == ("ok", "H100, sm 90, 70.0 of 80.0 GiB free")


def test_gpu_that_somebody_else_uses_is_named():
    _, gpu = machine.gpu(lambda: Nvml(users=(7, 8)))
    assert gpu.state == "warning"
    assert "used by 2 processes (7, 8)" in gpu.says


def test_driver_that_does_not_answer_is_a_problem_only_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "_devices", list)
    assert [finding.state for finding in machine.gpu(lambda: Nvml(answers=False))] == ["skipped"]
    monkeypatch.setattr(machine, "_devices", lambda: ["nvidia0"])
    (found,) = machine.gpu(lambda: Nvml(answers=False))
    assert found.state == "problem"
    assert "NVIDIA_DRIVER_CAPABILITIES" in found.remedy


def test_process_of_a_killed_run_is_found(home):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = subprocess.Popen(["sleep", "60"], env={**os.environ, RUN_MARK: f"{gone.pid} 1.0 {home}"})
    try:
        found = next(iter(machine.processes()))
        assert found.state == "warning"
        assert str(left.pid) in found.says
    finally:
        left.kill()
        left.wait()
    assert next(iter(machine.processes())).state == "ok"


def test_limit_of_open_files_is_told():
    code = "import json, sys; from infra.doctor.machine import limits; print([f.says for f in limits()])"
    limited = ["sh", "-c", f"ulimit -n 256; exec {shlex.join([sys.executable, '-c', code])}"]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "a process may open 256" in done.stdout
    assert next(machine.limits()).name == "open files"


def test_misspelt_setting_is_a_problem_and_the_rest_waits(monkeypatch):
    monkeypatch.setenv("SLIMLINE_HOEM", "elsewhere")
    settings.cache_clear()
    broken, *others = examine()
    assert broken == problem("settings", broken.says, broken.remedy)
    assert "Did you mean SLIMLINE_HOME?" in broken.says
    assert {finding.state for finding in others} == {"skipped"}


def test_check_that_takes_too_long_is_ended():
    (found,) = examine(["python"], timeout_s=0.01)
    assert found.state == "problem"
    assert "not done after 0 s" in found.says


def test_systemd_s_worker_asks_for_checks_that_exist():
    unit = (ROOT / "infra" / "systemd" / "slimline-worker@.service").read_text()
    (asked,) = (line.split(" doctor ")[1].split() for line in unit.splitlines() if " doctor " in line)
    assert set(asked) <= CHECKS.keys()
    assert "prefect" not in asked, "its pool has no worker before this one has started"


def test_unknown_check_is_refused():
    with pytest.raises(ValueError, match="got disc"):
        examine(["disc"])


def test_library_that_refuses_its_own_settings_does_not_end_the_examination(monkeypatch):
    monkeypatch.setenv("PREFECT_CLIENT_REQUEST_TIMEOUT", "soon")
    fine, broken = examine(["python", "prefect"])
    assert fine.state == ok("python", "").state
    assert broken.state in ("problem", "skipped")
