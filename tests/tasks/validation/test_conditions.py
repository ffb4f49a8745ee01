import os
import subprocess
import sys

import pytest

from tasks.validation.conditions import Conditions, Snapshot, conditions, gpu_states, snapshot, throttled_s

QUIET = Conditions(
    cores=(0, 1),
    versions={},
    governor=None,
    mhz=(2000, 2050),
    celsius=(None, None),
    load_average=(0.1, 1.9),
    busy_elsewhere_percent=1.2,
    steal_percent=0.0,
    throttled_s=0.0,
)


def test_what_a_waited_for_child_uses_is_ours_and_the_rest_is_not():
    cores = os.cpu_count()
    before = Snapshot(0, 0.5, None, None, busy_s=100, ours_s=10, steal_s=1, throttled_s=None)
    after = Snapshot(10, 1.5, None, None, busy_s=100 + 10 * cores, ours_s=10 + 7 * cores, steal_s=1, throttled_s=None)
    found = conditions(before, after, threads=1)
    assert found.busy_elsewhere_percent == pytest.approx(30)
    assert found.steal_percent == 0
    assert found.throttled_s is None
    assert found.load_average == (0.5, 1.5)
    assert "torch" in found.versions
    assert set(found.cores) <= os.sched_getaffinity(0)
    assert len(found.cores) >= 1


def test_this_machine_is_described():
    before = snapshot()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    after = snapshot()
    assert after.ours_s > before.ours_s
    assert after.busy_s >= before.busy_s
    found = conditions(before, after, threads=1)
    assert 0 <= found.busy_elsewhere_percent <= 100
    assert "other processes used" in found.sentence.lower()


def test_a_quota_is_read_from_either_version_of_cgroups(tmp_path):
    assert throttled_s(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.stat").write_text("nr_periods 5\nnr_throttled 2\nthrottled_time 1500000000\n")
    assert throttled_s(tmp_path) == 1.5
    (tmp_path / "cpu.stat").write_text("usage_usec 9\nnr_throttled 2\nthrottled_usec 250000\n")
    assert throttled_s(tmp_path) == 0.25


def test_what_stands_out_is_said():
    assert "quota" not in QUIET.sentence
    assert "clock" not in QUIET.sentence
    loud = QUIET.model_copy(update={"throttled_s": 3.0, "steal_percent": 12.0, "mhz": (3000.0, 2000.0)})
    for words in ("CPU quota held processes back for 3.0 s", "host took 12 %", "clock went from 3000 to 2000 MHz"):
        assert words in loud.sentence


def test_gpus_are_described_by_nvml(monkeypatch):
    class Nvml:
        NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
        nvmlDeviceGetCount = staticmethod(lambda: 1)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
        nvmlDeviceGetClockInfo = staticmethod(lambda device, kind: 1980)
        nvmlDeviceGetTemperature = staticmethod(lambda device, kind: 41)
        nvmlDeviceGetPowerUsage = staticmethod(lambda device: 71_500)
        nvmlDeviceGetName = staticmethod(lambda device: "H200")

    monkeypatch.setattr("tasks.validation.conditions.load_nvml", Nvml)
    assert gpu_states() == ("H200: 1980 MHz, 41 °C, 72 W",)
    monkeypatch.setattr("tasks.validation.conditions.load_nvml", lambda: None)
    assert gpu_states() == ()
