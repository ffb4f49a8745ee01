"""What a machine was doing while it was measured: what else ran, how fast its cores were, what held them back.

A figure of speed is of a machine in a state. Where Linux does not tell (a virtual machine has no governor and no
thermometer), the field is empty, not guessed.
"""

import importlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from tasks.calibration.packages import installed_versions
from tasks.validation.worker import choose_cores

LIBRARIES = ("onnxruntime", "openvino", "openvino-genai", "torch", "tensorrt")
CGROUP_STATS = ("cpu.stat", "cpu/cpu.stat", "cpu,cpuacct/cpu.stat")
"""Below the root of cgroups: version 2's, and two places of version 1's."""
NO_NVML = "no GPU answers through NVML (it takes a driver and nvidia-ml-py)"


class Conditions(BaseModel, frozen=True, extra="forbid"):
    """From the first subject to the last."""

    cores: tuple[int, ...] = Field(description="That every subject ran on; its threads may change places among them.")
    versions: dict[str, str]
    governor: str | None = Field(description="Of the first core's frequency.")
    mhz: tuple[float | None, float | None] = Field(description="Mean of all cores, before and after.")
    celsius: tuple[float | None, float | None] = Field(description="Hottest sensor, before and after.")
    load_average: tuple[float, float] = Field(description="Of one minute, before and after; one per busy core.")
    busy_elsewhere_percent: float = Field(description="CPU time of all cores that other processes used.")
    steal_percent: float = Field(description="CPU time of all cores that the host of a virtual machine took.")
    throttled_s: float | None = Field(description="That a quota of the cgroup held processes back.")
    gpus: tuple[str, ...] = Field((), description="State of each by NVML, afterwards.")

    @property
    def sentence(self) -> str:
        """What stands out, in words."""
        before, after = self.load_average
        said = [f"other processes used {self.busy_elsewhere_percent:.0f} % of the CPU time"]
        said.append(f"load average {before:.1f} before and {after:.1f} after")
        if self.steal_percent >= 1:
            said.append(f"the virtual machine's host took {self.steal_percent:.0f} %")
        if self.throttled_s:
            said.append(f"a CPU quota held processes back for {self.throttled_s:.1f} s")
        mhz_before, mhz_after = self.mhz
        if mhz_before and mhz_after and abs(mhz_after / mhz_before - 1) > 0.1:
            said.append(f"the clock went from {mhz_before:.0f} to {mhz_after:.0f} MHz")
        sentence = "; ".join(said)
        return f"{sentence[0].upper()}{sentence[1:]}."


class Snapshot(NamedTuple):
    """The machine at one moment; `conditions` compares two."""

    at_s: float
    load_average: float
    mhz: float | None
    celsius: float | None
    busy_s: float
    ours_s: float
    steal_s: float
    throttled_s: float | None


def snapshot() -> Snapshot:
    """The machine now."""
    import psutil

    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    steal = getattr(times, "steal", 0.0)
    counted = sum(getattr(times, name) for name in times._fields if not name.startswith("guest"))
    frequency = psutil.cpu_freq()
    temperatures = [sensor.current for found in psutil.sensors_temperatures().values() for sensor in found]
    return Snapshot(
        at_s=time.monotonic(),
        load_average=os.getloadavg()[0],
        mhz=float(frequency.current) if frequency and frequency.current else None,
        celsius=max(temperatures, default=None),
        busy_s=counted - idle - steal,
        ours_s=_our_cpu_s(),
        steal_s=steal,
        throttled_s=throttled_s(Path("/sys/fs/cgroup")),
    )


def conditions(before: Snapshot, after: Snapshot, *, threads: int) -> Conditions:
    """What the machine did between two snapshots of this process, which started and waited for its subjects.

    Args:
        before: of a moment without subjects.
        after: of a later one, all of them ended.
        threads: of each subject.
    """
    all_s = max((after.at_s - before.at_s) * (os.cpu_count() or 1), 1e-9)
    elsewhere_s = (after.busy_s - before.busy_s) - (after.ours_s - before.ours_s)
    held = None
    if before.throttled_s is not None and after.throttled_s is not None:
        held = after.throttled_s - before.throttled_s
    return Conditions(
        cores=tuple(choose_cores(threads) or sorted(os.sched_getaffinity(0))),
        versions=installed_versions(LIBRARIES),
        governor=_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        mhz=(before.mhz, after.mhz),
        celsius=(before.celsius, after.celsius),
        load_average=(before.load_average, after.load_average),
        busy_elsewhere_percent=min(100.0, max(0.0, 100 * elsewhere_s / all_s)),
        steal_percent=max(0.0, 100 * (after.steal_s - before.steal_s) / all_s),
        throttled_s=held,
        gpus=gpu_states(),
    )


def throttled_s(root: Path) -> float | None:
    """Seconds so far that a quota held back processes of the cgroups mounted at `root`; None: it does not tell."""
    for name in CGROUP_STATS:
        text = _text(root / name)
        pairs = dict(line.split(maxsplit=1) for line in (text or "").splitlines())
        if "throttled_usec" in pairs:
            return int(pairs["throttled_usec"]) / 1e6
        if "throttled_time" in pairs:
            return int(pairs["throttled_time"]) / 1e9
    return None


def gpu_states() -> tuple[str, ...]:
    """Each GPU's name, clock, temperature and power; empty without NVML's Python binding (nvidia-ml-py) or a GPU."""
    nvml = load_nvml()
    if nvml is None:
        return ()
    states = []
    for device in gpus(nvml):
        mhz = nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)
        celsius = nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)
        watts = nvml.nvmlDeviceGetPowerUsage(device) / 1000
        states.append(f"{nvml.nvmlDeviceGetName(device)}: {mhz} MHz, {celsius} °C, {watts:.0f} W")
    return tuple(states)


def counted(num: int, what: str) -> str:
    """'1 GPU', '2 GPUs'."""
    return f"{num} {what}{'' if num == 1 else 's'}"


def gpus(nvml: Any) -> list[Any]:
    """Handles of all GPUs."""
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def load_nvml() -> Any | None:
    """The module pynvml, initialized; None where it or a GPU's driver is missing."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _our_cpu_s() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
