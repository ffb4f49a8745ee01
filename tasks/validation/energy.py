"""Joules that the machine used, by the counters of the processor (RAPL) or of the GPUs (NVML).

RAPL counts whole packages, so that what else ran on the machine is in it. Where there is no counter that may be read, a
meter says why, and nothing is estimated.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.validation.conditions import NO_NVML, counted, gpus, load_nvml

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Joules from an origin that does not matter, by all counters that may be read."""

    def __init__(self, root: Path = POWERCAP, nvml: Callable[[], Any | None] = load_nvml) -> None:
        self._packages, problem = rapl_packages(root)
        self._last = [_microjoules(package) for package in self._packages]
        self._wrapped = [0] * len(self._packages)
        self._nvml: Any = nvml()
        self._gpus, why_no_gpu = gpu_counters(self._nvml)
        kinds = [f"RAPL of {counted(len(self._packages), 'package')}"] if self._packages else []
        kinds += [f"NVML of {counted(len(self._gpus), 'GPU')}"] if self._gpus else []
        self.says = " and ".join(kinds) or f"not measured: {problem}, and {why_no_gpu}"

    @property
    def measures(self) -> bool:
        """Whether there is a counter."""
        return bool(self._packages or self._gpus)

    def joules(self) -> float:
        """The sum of all counters; differences are what was used. Called at least once per wrap of RAPL's (minutes)."""
        total = 0.0
        for index, package in enumerate(self._packages):
            now = _microjoules(package)
            if now < self._last[index]:
                self._wrapped[index] += int((package / "max_energy_range_uj").read_text())
            self._last[index] = now
            total += (now + self._wrapped[index]) / 1e6
        for gpu in self._gpus:
            total += self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3
        return total


def gpu_counters(nvml: Any | None) -> tuple[list[Any], str]:
    """The GPUs that count energy, and, where there is none, why. Before Volta they do not."""
    if nvml is None:
        return [], NO_NVML
    found = []
    for gpu in gpus(nvml):
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        except nvml.NVMLError:
            continue
        found.append(gpu)
    return found, "no GPU counts energy"


def rapl_packages(root: Path) -> tuple[Sequence[Path], str]:
    """The counters of whole packages, and, where there is none that may be read, why."""
    if not root.is_dir():
        return (), f"there is no {root} (virtual machines have none)"
    packages = sorted(path for path in root.glob("*-rapl:*") if path.name.count(":") == 1)
    if not packages:
        return (), f"{root} holds no RAPL package"
    try:
        for package in packages:
            _microjoules(package)
    except OSError:
        return (), f"{packages[0] / 'energy_uj'} may be read by root alone"
    return packages, ""


def _microjoules(package: Path) -> int:
    return int((package / "energy_uj").read_text())
