"""Programs that do what they should not: each ends within its limit, is not passed, and leaves nothing behind."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.validation.benchmarks import sandbox, sandbox_child
from tasks.validation.benchmarks.sandbox import SandboxLimits, run_program

LIMITS = SandboxLimits(cpu_s=1, wall_s=2, memory_mib=512, file_mib=1)

pytestmark = pytest.mark.skipif(sandbox.missing() is not None, reason=str(sandbox.missing()))

MISBEHAVING = {
    "forks": ("import os\nfor _ in range(20): os.fork()", "Operation not permitted"),
    "starts a program": ("import subprocess; subprocess.run(['true'])", "Operation not permitted"),
    "becomes a program": ("import os; os.execv('/bin/true', ['true'])", "Operation not permitted"),
    "starts a process by multiprocessing": (
        "import multiprocessing as m\np = m.get_context('fork').Process(target=print); p.start()",
        "Operation not permitted",
    ),
    "fills memory": ("x = []\nwhile True: x.append(bytes(10**8))", "MemoryError"),
    "opens a socket": ("import socket; socket.socket()", "Operation not permitted"),
    "opens a socket of the machine": ("import socket; socket.socket(socket.AF_UNIX)", "Operation not permitted"),
    "kills its parent": ("import os; os.kill(os.getppid(), 9)", "Operation not permitted"),
    "kills everything": ("import os; os.kill(-1, 9)", "Operation not permitted"),
    "has others signalled": ("import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, 1)", "Operation not permitted"),
    "leaves its process group": ("import os; os.setsid()", "Operation not permitted"),
    "changes its limits": (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (9, 9))",
        "not allowed to raise maximum limit|Operation not permitted",
    ),
    "fills the disk": ("f = open('a', 'wb')\nwhile True: f.write(b'x' * 2**20)", "File too large"),
    "recurses": ("def f(): f()\nf()", "RecursionError"),
    "leaves early": ("import sys; sys.exit(0)", "SystemExit"),
    "leaves early by the back door": ("import os; os._exit(0)", "exit code 0 before its last line"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "answers for itself": (
        "import os, json; os.write(3, json.dumps({'passed': True, 'writes': 'nowhere'}).encode()); os._exit(0)",
        "exit code 0 before its last line",
    ),
    "answers without end": ("import os\nwhile True: os.write(3, b'x' * 1000)", "SIGKILL"),
    "computes without end": ("while True: pass", None),
    "waits without end": ("import time; time.sleep(100)", None),
    "prints without end": ("while True: print('x' * 1000)", None),
    "ignores signals": ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", None),
    "leaves a thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start(); 0/0", ""),
}  # fmt: skip


@pytest.mark.parametrize("behaviour", MISBEHAVING)
def test_misbehaving_programs_fail_in_time_and_leave_nothing(behaviour, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program, detail = MISBEHAVING[behaviour]
    started_at = time.monotonic()
    outcome = run_program(program, LIMITS)
    assert time.monotonic() - started_at < LIMITS.wall_s + 2
    assert not outcome.passed
    if detail is None:
        assert outcome.how in ("out of time", "killed"), outcome
    else:
        assert any(part in outcome.detail for part in detail.split("|")), outcome
    assert not [child for child in psutil.Process().children() if "sandbox_child" in " ".join(child.cmdline())]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "import os; os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.unlink({path!r})",
        "import os; os.rename({path!r}, 'mine')",
        "import os; os.rename('mine', {path!r})",
        "import os; os.link({path!r}, 'mine')",
        "import os; os.symlink({path!r}, 'mine'); open('mine', 'w')",
        "import os; os.chmod({path!r}, 0)",
        "import os; os.utime({path!r}, (0, 0))",
        "import os; os.mkdir({path!r} + '.d')",
    ],
)
@pytest.mark.parametrize("landlock", [True, False])
def test_nothing_outside_changes(attempt, landlock, tmp_path, monkeypatch):
    if not landlock:
        without_landlock(tmp_path, monkeypatch)
    theirs = tmp_path / "theirs"
    theirs.write_text("kept")
    before = theirs.stat()
    prepared = "open('mine', 'w').write('x')\n" if landlock and "rename('mine'" in attempt else ""
    outcome = run_program(prepared + attempt.format(path=str(theirs)), LIMITS)
    assert outcome.how == "raised", outcome
    assert "Permission denied" in outcome.detail or "not permitted" in outcome.detail, outcome
    assert theirs.read_text() == "kept"
    assert (theirs.stat().st_mode, theirs.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert not Path(f"{theirs}.d").exists()


def without_landlock(tmp_path, monkeypatch):
    """As on a kernel that has none."""
    source = Path(sandbox_child.__file__).read_text()
    assert "if version < 3:" in source
    child = tmp_path / "child.py"
    child.write_text(source.replace("if version < 3:", "if True:"))
    monkeypatch.setattr(sandbox, "CHILD", child)


def test_well_behaved_programs_pass_and_say_where_they_could_write(tmp_path, monkeypatch):
    computing = """
import asyncio, collections, datetime, decimal, functools, hashlib, heapq, itertools, json, math, random, re, threading
thread = threading.Thread(target=lambda: results.append(1)); results = []
thread.start(); thread.join()
assert results == [1] and math.gcd(12, 18) == 6 and __name__ == "__main__"
print("seen by nobody")
assert open(hashlib.__file__).read(1)
"""
    outcome = run_program(computing, LIMITS)
    assert outcome.passed, outcome
    assert run_program(
        "open('a', 'w').write('x'); import os; assert os.listdir() == ['a']; os.unlink('a')", LIMITS
    ).passed
    without_landlock(tmp_path, monkeypatch)
    outcome = run_program(computing, LIMITS)
    assert (outcome.passed, outcome.writes) == (True, "nowhere")
    assert "not permitted" in run_program("open('a', 'w')", LIMITS).detail


def test_the_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert run_program("import os; assert 'secret' not in os.environ.values()", LIMITS).passed
    assert run_program("import os; assert os.getcwd() == os.environ['HOME'] and not os.listdir()", LIMITS).passed


def test_the_program_ends_with_whoever_runs_it(tmp_path):
    mark = tmp_path / "sandboxed"
    mark.mkdir()
    code = (
        "import tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from tasks.validation.benchmarks.sandbox import SandboxLimits, run_program\n"
        "run_program('import time; time.sleep(60)', SandboxLimits(wall_s=60))\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", "import sys\n" + code, str(mark)])

    def confined() -> list[psutil.Process]:
        return [
            child for child in psutil.process_iter(["cmdline", "environ"]) if str(mark) in str(child.info["environ"])
        ]

    deadline = time.monotonic() + 60
    while not confined() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # until it has confined itself
    child = confined()[0]
    runner.kill()
    runner.wait()
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert gone
    assert not alive


def test_a_machine_that_cannot_confine_is_refused(tmp_path, monkeypatch):
    source = Path(sandbox_child.__file__).read_text()
    child = tmp_path / "child.py"
    child.write_text(source.replace("PR_SET_SECCOMP, SECCOMP_MODE_FILTER,", "PR_SET_SECCOMP, 99,"))
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(ValueError, match=r"only where it can be confined; here that failed: .* argument"):
        run_program("", LIMITS)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(ValueError, match="Linux on x86_64 or aarch64; this is Linux on riscv64"):
        run_program("", LIMITS)


@pytest.mark.parametrize("machine", sandbox_child.ALLOWED)
def test_every_machine_has_a_filter_that_ends_in_refusal(machine):
    import struct

    for may_write in (True, False):
        code = sandbox_child.build_filter(machine, may_write=may_write)
        instructions = list(struct.iter_unpack("HBBI", code))
        assert len(instructions) < 4096  # the kernel's limit
        assert instructions[-1] == (sandbox_child.RETURN, 0, 0, sandbox_child.REFUSED)
        for place, (kind, if_true, if_false, _) in enumerate(instructions):
            if kind in (sandbox_child.EQUAL, sandbox_child.ANY_BIT, sandbox_child.GREATER_OR_EQUAL):
                assert place + 1 + max(if_true, if_false) < len(instructions)


def test_it_takes_no_privileges():
    code = (
        "import ctypes, struct\n"
        "version, nobody = struct.pack('Ii', 0x20080522, 0), bytes(24)\n"
        "assert ctypes.CDLL(None).capset(version, nobody) == 0\n"  # root from here on without any capability
        "from tasks.validation.benchmarks.sandbox import run_program\n"
        "assert run_program('assert 1 + 1 == 2').passed\n"
        "assert 'not permitted' in run_program('import socket; socket.socket()').detail\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
