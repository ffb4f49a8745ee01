"""How much memory of GPUs a process holds, by NVML. Not verified on hardware: tried against a stand-in of NVML only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.validation.conditions import NO_NVML, counted, gpus, load_nvml

PROC = Path("/proc")
CUDA = "libcuda.so"
"""Which every process that uses an NVIDIA GPU has mapped."""


class GpuMemory:
    """Of processes of this machine."""

    def __init__(self, nvml: Callable[[], Any | None] = load_nvml, proc: Path = PROC) -> None:
        self._nvml: Any = nvml()
        self._proc = proc
        self._gpus = gpus(self._nvml) if self._nvml else []
        self.says = f"NVML of {counted(len(self._gpus), 'GPU')}" if self._gpus else f"not measured: {NO_NVML}"

    @property
    def measures(self) -> bool:
        """Whether there is a GPU that can be asked."""
        return bool(self._gpus)

    def mib(self, pid: int) -> float | None:
        """What a process holds on all GPUs now; 0 of one that uses none.

        None: it is not known. NVML numbers processes as the host does, so in a container with numbers of its own it
        does not find them; and it does not tell of each process where GPUs are split (MIG) or it may not.
        """
        if not self._gpus:
            return None
        found = []
        for gpu in self._gpus:
            try:
                processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
            except self._nvml.NVMLError:
                return None
            found += [process.usedGpuMemory for process in processes if process.pid == pid]
        if None in found:
            return None
        if not found and self._uses_cuda(pid):
            return None
        return float(sum(found)) / 2**20

    def _uses_cuda(self, pid: int) -> bool:
        try:
            return CUDA in (self._proc / str(pid) / "maps").read_text()
        except OSError:  # it has ended
            return True
