import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tasks.validation import latency
from tasks.validation.latency import Speed, Subject, measure_speed
from tasks.validation.latency_worker import LatencyWorker
from tasks.validation.worker import FAILURES, Worker, choose_cores

OPTIONS = Speed(prompt_tokens=8, new_tokens=3, batch_sizes=(1,), num_blocks=4, num_batch_blocks=1, timeout_s=120)
AFTER_TWO = """
import tasks.validation.latency_worker as worker
inner, calls = worker.generate_timed, []
def generate_timed(*arguments):
    calls.append(0)
    if len(calls) > 2:
        {misdeed}
    return inner(*arguments)
worker.generate_timed = generate_timed
worker.main({{answers_fd}})
"""


def test_a_child_answers_and_says_how_long_it_waited():
    worker = Worker("echo", threads=1, timeout_s=60)
    try:
        assert worker.ask(hello=1) == {}
        assert worker.idle_s > 0
        assert worker.memory_mib().peak >= worker.memory_mib().now > 1
    finally:
        worker.close()


def test_a_child_that_does_not_answer_is_ended_with_its_whole_group():
    worker = Worker("hung", threads=1, timeout_s=0.5)
    try:
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError, match=r"'hung' did not answer within 0.5 s"):
            worker.ask(hello=1)
        assert not psutil.pid_exists(worker.pid)
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("end", "how"), [("os._exit(7)", "exit code 7"), ("os.abort()", "SIGABRT"), ("os.kill(os.getpid(), 9)", "SIGKILL")]
)
def test_how_a_child_died_is_told(end, how):
    class Ending(Worker):
        program = f"import os; input(); {end}  # {{answers_fd}}"

    worker = Ending("short", threads=1, timeout_s=60)
    try:
        with pytest.raises(ChildProcessError, match=f"'short' .*{how}"):
            worker.ask(hello=1)
    finally:
        worker.close()


@pytest.mark.parametrize(("number", "raised"), [("EIO", OSError), ("EMFILE", OSError), ("ENOENT", ValueError)])
def test_a_disk_that_fails_is_not_laid_at_the_subjects_door(number, raised):
    class Reading(Worker):
        program = (
            "import errno\nfrom tasks.validation.worker import answer_commands\n"
            "def answer(command):\n"
            f"    raise OSError(errno.{number}, 'no', 'model.onnx')\n"
            "answer_commands({answers_fd}, answer)"
        )

    worker = Reading("int8", threads=1, timeout_s=60)
    try:
        with pytest.raises(raised, match=r"model\.onnx") as found:
            worker.ask(hello=1)
        assert isinstance(found.value, FAILURES) == (raised is ValueError)
    finally:
        worker.close()


class Parent(Worker):
    """Its child starts a process of its own, and then does not answer."""

    program = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); "
        "print(p.pid, file=open('{answers_fd}.pid', 'w'), flush=True); time.sleep(60)"
    )


def test_what_a_child_started_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worker = Parent("parent", threads=1, timeout_s=5)
    while not (found := list(tmp_path.glob("*.pid"))) or not found[0].read_text().strip():
        time.sleep(0.05)
    grandchild = int(found[0].read_text())
    assert psutil.pid_exists(grandchild)
    worker.close()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(grandchild) and psutil.Process(grandchild).status() != "zombie":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stopped_child_ends_with_its_parent(tmp_path):
    program = (
        "import os, signal; from tasks.validation.worker import Worker; worker = Worker('x', threads=1); "
        "worker.ask(); os.kill(worker.pid, signal.SIGSTOP); print(worker.pid, flush=True); signal.pause()"
    )
    parent = subprocess.Popen(
        [os.sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_subjects_run_on_as_many_cores_as_they_have_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 4, 5})
    pairs = {2: {2, 3}, 3: {2, 3}, 4: {4, 5}, 5: {4, 5}}
    monkeypatch.setattr("tasks.validation.worker._siblings", pairs.__getitem__)
    assert choose_cores(1) == [2]
    assert choose_cores(2) == [2, 4]
    assert choose_cores(3) == [2, 3, 4]
    assert choose_cores(4) == []


def misbehaving(names: dict[str, str]) -> type[LatencyWorker]:
    """A worker whose subjects of these names do something bad in their third request, warming up included."""

    class Misbehaving(LatencyWorker):
        def __init__(self, name: str, **options: object) -> None:
            if name in names:
                self.program = AFTER_TWO.format(misdeed=names[name])
            super().__init__(name, **options)

        def generate(self, input_ids: np.ndarray, new_tokens: int) -> list[float]:
            if self.name == "hangs":
                self._timeout_s = 10.0
            return super().generate(input_ids, new_tokens)

    return Misbehaving


@pytest.mark.slow
def test_subjects_that_crash_or_hang_are_named_and_the_others_are_measured_on(
    tiny_checkpoint, tiny_bundle, small_data, tmp_path, monkeypatch
):
    misdeeds = {
        "killed": "import os; os.kill(os.getpid(), 9)",
        "hangs": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "no memory": (
            "import numpy, resource; resource.setrlimit(resource.RLIMIT_AS, (2**20, 2**20)); numpy.ones(2**28)"
        ),
    }
    monkeypatch.setattr(latency, "LatencyWorker", misbehaving(misdeeds))
    summary = measure_speed(
        subjects=[Subject(name=name, bundle=tiny_bundle) for name in ("good", *misdeeds)],
        original=tiny_checkpoint,
        data=small_data,
        options=OPTIONS,
        threads=1,
        out=tmp_path,
    )
    assert set(summary.subjects) == {"original", "good"}
    assert set(summary.failed) == set(misdeeds)
    assert "SIGKILL" in summary.failed["killed"]
    assert "did not answer within 10 s" in summary.failed["hangs"]
    assert "MemoryError" in summary.failed["no memory"]
    assert summary.subjects["good"].tpot_ms.num == 4
    assert summary.num_blocks == 4


def test_without_the_original_there_is_nothing_to_compare_with():
    worker = Worker("original", threads=1)
    failed = {}
    with latency._noting_failure(worker, failed, is_needed=False):
        raise ChildProcessError("died")
    assert failed == {"original": "died"}
    with pytest.raises(TimeoutError, match="late"), latency._noting_failure(worker, {}, is_needed=True):
        raise TimeoutError("late")
    with pytest.raises(KeyError), latency._noting_failure(worker, {}, is_needed=False):  # our own mistake
        raise KeyError
