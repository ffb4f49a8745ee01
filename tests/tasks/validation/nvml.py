"""A stand-in of NVML at the boundary of its Python binding: two GPUs that this process and its children share."""

import sys
import types
from types import SimpleNamespace

import psutil
import pytest


class Nvml(types.ModuleType):
    """The module pynvml, as far as it is called; every look at a GPU's counter finds one more joule on it."""

    NVML_CLOCK_SM = NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        """Of any of its calls."""

    def __init__(self, *, counts_energy: bool = True, tells_memory: bool = True) -> None:
        super().__init__("pynvml")
        self.millijoules = 5000
        self.bytes_held = 64 * 2**20
        self._counts_energy, self._tells_memory = counts_energy, tells_memory

    def nvmlInit(self):
        """Nothing to do."""

    def nvmlDeviceGetCount(self):
        """The number of GPUs."""
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        """A GPU goes by its number."""
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        """Millijoules."""
        if not self._counts_energy:
            raise self.NVMLError("Not Supported")
        self.millijoules += 1000
        return self.millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        """This process and its children, half as much on the second GPU."""
        own = psutil.Process()
        held = self.bytes_held // (gpu + 1) if self._tells_memory else None
        return [SimpleNamespace(pid=p.pid, usedGpuMemory=held) for p in (own, *own.children(recursive=True))]

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        """MHz."""
        return 1980

    def nvmlDeviceGetTemperature(self, gpu, kind):
        """Degrees."""
        return 40

    def nvmlDeviceGetPowerUsage(self, gpu):
        """Milliwatts."""
        return 75_000

    def nvmlDeviceGetName(self, gpu):
        """Of the product."""
        return f"GPU {gpu}"


def install(monkeypatch: pytest.MonkeyPatch, **how: bool) -> Nvml:
    """Puts the stand-in where the binding is imported from."""
    nvml = Nvml(**how)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml
