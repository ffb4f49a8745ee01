"""The machine and the library versions, recorded beside every measured number."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
"""CPU features that decide which kernels the engines choose."""


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}


def _gpus() -> list[dict[str, str]]:
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode:
        return []
    names = ("name", "driver", "memory", "compute_capability")
    return [dict(zip(names, line.split(", "), strict=True)) for line in answer.stdout.strip().splitlines()]


@cache
def hardware() -> dict[str, Any]:
    """What decides speed on this machine: CPU model, ISA flags, usable cores, memory in MiB, GPUs."""
    cpu = _cpuinfo()
    flags = set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def differences(measured: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """By what two machines of `hardware()` are not alike in what decides speed, in words; empty: figures carry over."""
    tell: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "processor": lambda of: of.get("cpu"),
        "instructions": lambda of: " ".join(of.get("isa", [])),
        "cores": lambda of: of.get("cores"),
        "GPUs": lambda of: ", ".join(gpu["name"] for gpu in of.get("gpus", [])) or "none",
    }
    found = {name: (of(measured), of(here)) for name, of in tell.items()}
    return [f"{name}: {there} there, {ours} here" for name, (there, ours) in found.items() if there != ours]


def versions(*names: str) -> dict[str, str]:
    """Installed versions of the named distributions; absent ones are left out."""
    return {name: found for name in names if (found := _version(name)) is not None}


@cache
def _version(name: str) -> str | None:
    """Kept: reading it takes a millisecond or two, and every stage's key asks for several, several times."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
