"""The machine and what is installed on it: Python, libraries, engines, the home, disk, memory, GPUs, processes."""

import contextlib
import fcntl
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.doctor.finding import Finding, ok, problem, skipped, warning
from infra.failures import START_BYTES
from infra.services.processes import orphans
from infra.settings import environment, settings

ROOT = Path(__file__).parents[2]
GIB = 2**30
MIB = 2**20
MIN_OPEN_FILES = 1024
LOW_DISK_BYTES = 5 * GIB
"""What the default recipe writes, with room for a second model of its size."""
LOW_MEMORY_BYTES = GIB
"""A stage's process takes 0.6 GiB before any weight."""
LOW_SHARED_BYTES = GIB
"""Containers get 64 MiB where nothing is said; several GPUs exchange more than that."""
ENGINES = {
    "torch": "import torch; print(torch.__version__, 'with', torch.get_num_threads(), 'threads')",
    "onnxruntime": "import onnxruntime as o; print(o.__version__, 'for', ', '.join(o.get_available_providers()))",
    "openvino": "import openvino as o; print(o.__version__, 'for', ', '.join(o.Core().available_devices))",
    "tensorrt": "import tensorrt as t; print(t.__version__, 'logs', type(t.Logger()).__name__)",
    "tensorrt_rtx": "import tensorrt_rtx as t; print(t.__version__, 'logs', type(t.Logger()).__name__)",
}
"""What shows that an engine's native libraries load: its version, and an object of its own."""
OFFERED_BY = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
}
"""Our extras."""
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "lustre", "ceph")
MIN_CUDA = {"tensorrt_rtx": (13, 0)}
"""What the driver has to offer to libraries that are built for one CUDA."""


def python() -> Iterator[Finding]:
    """Whether this interpreter is one that Slimline is published for."""
    found = ".".join(map(str, sys.version_info[:3]))
    where = "in a virtual environment" if sys.prefix != sys.base_prefix else "the system's own"
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        yield ok("python", f"{found}, {where}: {sys.executable}")
    else:
        yield problem(
            "python", f"3.11 or 3.12 is needed; this is {found}", "Install one and make .venv anew: make PYTHON=..."
        )


def libraries() -> Iterator[Finding]:
    """Whether what is installed is what is needed, and what is tested."""
    try:
        required = distribution("slimline").requires or []
    except PackageNotFoundError:
        yield problem("libraries", "slimline itself is not installed here", "Install it: make install")
        return
    needed = [requirement for requirement in map(Requirement, required) if _applies(requirement)]
    unmet = []
    for requirement in needed:
        installed = _version(requirement.name)
        if installed is None:
            unmet.append(f"{requirement.name} is absent")
        elif not requirement.specifier.contains(installed, prereleases=True):
            unmet.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if unmet:
        yield problem("libraries", "; ".join(unmet), _reinstall())
        return
    pinned = pins()
    if pinned is None:
        yield ok("libraries", f"the {len(needed)} required are there; which versions are tested is not known here")
        return
    compared = {name: (installed, pin) for name, pin in pinned.items() if (installed := _version(name))}
    different = [f"{name} {has} (tested: {pin})" for name, (has, pin) in compared.items() if has != pin]
    if different:
        yield warning("libraries", f"not the tested versions: {_some(different)}", _reinstall())
    else:
        yield ok("libraries", f"{len(compared)} installed, all in the tested version")


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _reinstall() -> str:
    return "Install the tested set: make install (in an image: pip install -c constraints.txt slimline)"


def _version(name: str) -> str | None:
    try:
        return version(name).split("+")[0]  # torch 2.13.0+cpu is 2.13.0
    except PackageNotFoundError:
        return None


def pins() -> dict[str, str] | None:
    """The tested versions by name, from the checkout or from the installed package; None where there are neither."""
    places = (ROOT / "constraints.txt", ROOT / "infra" / "_constraints.txt")
    file = next((place for place in places if place.exists()), None)
    if file is None:
        return None
    lines = (re.match(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in file.read_text().splitlines())
    return {canonicalize_name(line[1]): line[2] for line in lines if line}


def engine(module: str) -> Iterator[Finding]:
    """Whether an engine loads: in a process of its own, because native libraries crash."""
    name = f"engine {module}"
    if importlib.util.find_spec(module) is None:
        if extra := OFFERED_BY.get(module):
            yield skipped(name, f"not installed; where it is wanted: pip install 'slimline[{extra}]'")
        else:
            yield problem(name, "is not installed", _reinstall())
    else:
        yield loads(name, ENGINES[module])


def loads(name: str, code: str) -> Finding:
    """Whether a process that runs `code` ends well; the last line it prints is what the finding says."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment(), check=False)
    if done.returncode < 0:
        traced = [sys.executable, "-X", "faulthandler", "-c", code]
        return problem(
            name,
            f"crashes with {signal.Signals(-done.returncode).name} when it is loaded",
            f"Its wheel may not fit this processor or driver; this says where: {shlex.join(traced)}",
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return problem(name, f"does not load: {last[:300]}", _reinstall())
    return ok(name, (done.stdout.strip().splitlines() or ["loads"])[-1])


def home() -> Iterator[Finding]:
    """Whether the home can be written, kept and locked, as runs do."""
    where = settings().home
    name = "home"
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=where, prefix=".doctor-") as made:
            draft, final = Path(made, "draft"), Path(made, "final")
            with draft.open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(b"probe" * 1024)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(final)
            if final.read_bytes() != b"probe" * 1024:
                yield problem(name, f"{where} gives back other bytes than were written", "Check this disk: dmesg, fsck")
                return
    except OSError as error:
        yield problem(
            name,
            f"{where} cannot be used: {os.strerror(error.errno or 0)}",
            f"Let the user {_user()} write there, or set SLIMLINE_HOME to a directory of its own",
        )
        return
    others = [path.name for path in where.iterdir() if path.stat().st_uid != os.getuid()] if os.getuid() else []
    if others:
        yield warning(
            name,
            f"{_some(others)} in {where} belong to another user",
            f"Give them to {_user()}: chown -R {_user()} {where}",
        )
        return
    kind = _file_system(where)
    if kind in NETWORK_FILE_SYSTEMS and not (settings().tracking_uri and settings().prefect_api_url):
        yield warning(
            name,
            f"{where} lies on {kind}, and databases are to be kept there",
            "SQLite needs a local disk: set SLIMLINE_HOME to one, or use servers (SLIMLINE_TRACKING_URI, "
            "SLIMLINE_PREFECT_API_URL)",
        )
        return
    yield ok(name, f"{where} can be written and locked ({kind or 'unknown file system'}, as {_user()})")


def _user() -> str:
    try:
        return str(psutil.Process().username())
    except (psutil.Error, KeyError):  # a container's user need not have a name
        return str(os.getuid())


def _file_system(where: Path) -> str | None:
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    return next((mounts[path] for path in (where, *where.parents) if path in mounts), None)


def disk() -> Iterator[Finding]:
    """What is free where runs write: the home, and the folder for temporary files."""
    places = {settings().home: "SLIMLINE_HOME", Path(tempfile.gettempdir()): "TMPDIR"}
    for where, variable in places.items():
        name = f"disk {where}"
        existing = next(path for path in (where, *where.parents) if path.exists())
        free, inodes = shutil.disk_usage(existing).free, os.statvfs(existing)
        remedy = f"Free some, or set {variable} to a larger disk; `slimline check RECIPE` says how much a recipe needs"
        if free < START_BYTES:
            yield problem(name, f"{free / MIB:,.1f} MiB are free; a run does not begin with so little", remedy)
        elif inodes.f_files and not inodes.f_favail:
            yield problem(name, "no more files can be made: the file system has no inode left", remedy)
        elif free < LOW_DISK_BYTES and variable == "SLIMLINE_HOME":
            yield warning(name, f"{free / GIB:,.1f} GiB are free", remedy)
        else:
            yield ok(name, f"{free / GIB:,.1f} GiB are free")


def memory() -> Iterator[Finding]:
    """What this process may use: of the machine, or of what its container was given."""
    machine = psutil.virtual_memory()
    limit, used = _cgroup_memory()
    free = min(machine.available, limit - used) if limit is not None else machine.available
    says = f"{free / GIB:,.1f} of {min(machine.total, limit or machine.total) / GIB:,.1f} GiB are free"
    if limit is not None and limit < machine.total:
        says += f" (the limit of this container; the machine has {machine.total / GIB:,.1f})"
    if free < LOW_MEMORY_BYTES:
        yield problem("memory", says, "End what holds it, or give the container more; `slimline check` estimates peaks")
    else:
        yield ok("memory", says)
    shared = Path("/dev/shm")  # noqa: S108 only looked at
    if not shared.is_dir():
        yield skipped("shared memory", f"{shared} does not exist here")
    elif (size := shutil.disk_usage(shared).total) < LOW_SHARED_BYTES and _devices():
        yield warning(
            "shared memory",
            f"{shared} has {size / MIB:,.0f} MiB; processes of several GPUs exchange data through it",
            "Give the container more: --shm-size 1g, shm_size in compose.yaml, an emptyDir of medium Memory",
        )
    else:
        yield ok("shared memory", f"{shared} has {size / MIB:,.0f} MiB")


def _cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """Limit and use in bytes of the control group that this process sees as its own; None: there is no limit."""
    files = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit, used in files:  # of version 2 and of version 1
        with contextlib.suppress(OSError, ValueError):
            found = int((root / limit).read_text())  # "max" is no number
            return (found, int((root / used).read_text())) if found < 2**60 else (None, 0)
    return None, 0


def _devices(dev: Path = Path("/dev")) -> list[str]:
    return sorted(path.name for path in dev.glob("nvidia[0-9]*"))


def gpu(nvml: Callable[[], ModuleType] | None = None) -> Iterator[Finding]:
    """GPUs, as the driver lists them."""
    name = "gpu"
    devices = _devices()
    try:
        library: Any = (nvml or _nvml)()
    except ImportError:
        if devices:
            yield problem(
                name,
                f"{', '.join(devices)} exist and cannot be asked: nvidia-ml-py is not installed",
                "Install it: pip install 'slimline[tensorrt]'",
            )
        else:
            yield skipped(name, "this machine has no NVIDIA GPU (no /dev/nvidia0)")
        return
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        if devices:
            yield problem(
                name,
                f"{', '.join(devices)} exist and the driver's library does not answer: {error}",
                "In a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility. Elsewhere: nvidia-smi; after an update of "
                "the driver, restart the machine",
            )
        else:
            yield skipped(name, f"this machine has no NVIDIA GPU (no /dev/nvidia0; NVML: {error})")
        return
    try:
        yield from _gpus(library)
    except library.NVMLError as error:
        yield problem(name, f"the driver's library fails: {error}", "Run nvidia-smi; it says more")


def _nvml() -> ModuleType:
    return importlib.import_module("pynvml")


def _gpus(nvml: Any) -> Iterator[Finding]:
    driver = _text(nvml.nvmlSystemGetDriverVersion())
    number = nvml.nvmlSystemGetCudaDriverVersion_v2()
    cuda = (number // 1000, number % 1000 // 10)
    for module, least in MIN_CUDA.items():
        if importlib.util.find_spec(module) and cuda < least:
            yield problem(
                "driver",
                f"{driver} offers CUDA {cuda[0]}.{cuda[1]}; {module} here needs {least[0]}.{least[1]}",
                "Update the driver of this machine; containers use the machine's",
            )
            break
    else:
        yield ok("driver", f"{driver}, CUDA {cuda[0]}.{cuda[1]}")
    for index in range(nvml.nvmlDeviceGetCount()):
        device = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device)
        held = nvml.nvmlDeviceGetMemoryInfo(device)
        says = (
            f"{_text(nvml.nvmlDeviceGetName(device))}, sm {major}{minor}, "
            f"{held.free / GIB:,.1f} of {held.total / GIB:,.1f} GiB free"
        )
        users = [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(device)]
        if users:
            yield warning(
                f"gpu {index}",
                f"{says}; used by {len(users)} process{'es' * (len(users) > 1)} ({_some([str(pid) for pid in users])})",
                "Times measured beside another user of the GPU are not to be trusted: give it to one worker only",
            )
        else:
            yield ok(f"gpu {index}", says)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def processes() -> Iterator[Finding]:
    """What killed runs left behind."""
    left = [str(process.pid) for process in orphans(settings().home)]
    if left:
        yield warning(
            "processes", f"{len(left)} of killed runs still run ({_some(left)})", "The next `slimline run` ends them"
        )
    else:
        yield ok("processes", "none is left of an earlier run")


def limits() -> Iterator[Finding]:
    """What the system lets one process have."""
    soft = _open_files()
    if soft is None:
        yield skipped("open files", "this system does not tell")
    elif soft < MIN_OPEN_FILES:
        yield warning("open files", f"a process may open {soft}", "Raise it: ulimit -n 4096, LimitNOFILE= of systemd")
    else:
        yield ok("open files", f"a process may open {soft}")


def _open_files() -> int | None:
    with contextlib.suppress(ImportError, OSError):
        import resource

        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None


def _some(items: list[str], most: int = 4) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
