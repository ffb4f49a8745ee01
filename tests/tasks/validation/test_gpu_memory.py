import os

import pytest

from tasks.validation.gpu_memory import GpuMemory
from tests.tasks.validation.nvml import Nvml, install


def test_what_a_process_holds_is_summed_over_gpus(monkeypatch):
    install(monkeypatch)
    memory = GpuMemory()
    assert memory.measures
    assert memory.says == "NVML of 2 GPUs"
    assert memory.mib(os.getpid()) == pytest.approx(64 + 32)


def test_a_process_that_uses_no_gpu_holds_none_and_one_that_is_not_found_is_not_known(tmp_path):
    memory = GpuMemory(Nvml, tmp_path)
    for pid, libraries in ((7, "/usr/lib/libc.so.6"), (8, "/usr/lib/libcuda.so.1")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "maps").write_text(f"7f0 r-xp 0 08:01 1 {libraries}\n")
    assert memory.mib(7) == 0
    assert memory.mib(8) is None  # the host calls it by another number
    assert memory.mib(9) is None  # it ended


def test_memory_that_nvml_does_not_tell_is_not_known():
    assert GpuMemory(lambda: Nvml(tells_memory=False)).mib(os.getpid()) is None


def test_without_a_gpu_the_reason_is_said():
    memory = GpuMemory(lambda: None)
    assert not memory.measures
    assert memory.says.startswith("not measured: no GPU answers through NVML")
    assert memory.mib(os.getpid()) is None
