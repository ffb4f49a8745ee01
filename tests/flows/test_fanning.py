"""Candidates made on the nodes of a real Ray cluster: two nodes as processes of this machine, one of which dies."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.flows.command_line import ROOT, slimline
from tests.flows.recipes import short

RAY = Path(sysconfig.get_path("scripts")) / "ray"


class Cluster:
    """Nodes started as `ray start` does on machines of their own; each in a process group of its own."""

    def __init__(self, home: Path, tmp: Path) -> None:
        self.environment = {
            **os.environ,
            "SLIMLINE_HOME": str(home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(tmp),
            "PYTHONPATH": str(ROOT),
        }
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.log = tmp / "nodes.txt"
        self.address = ""

    def add(self) -> subprocess.Popen[bytes]:
        """A node that has started; Ray gives up after 30 s, which a loaded machine may exceed."""
        for _ in range(4):
            if node := self._started():
                self.nodes.append(node)
                self.address = self.address or re.search(r"--address='([^']+)'", self.log.read_text())[1]
                return node
        raise AssertionError(self.log.read_text())

    def _started(self) -> subprocess.Popen[bytes] | None:
        size = ["--num-cpus=1", "--num-gpus=0", "--object-store-memory=100000000", "--block"]
        place = [f"--address={self.address}"] if self.address else ["--head", "--port=0", "--include-dashboard=false"]
        before = self.log.read_text().count("Ray runtime started") if self.log.exists() else 0
        with self.log.open("ab") as log:
            node = subprocess.Popen(
                [RAY, "start", *place, *size], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        while self.log.read_text().count("Ray runtime started") == before:
            if node.poll() is not None:
                return None
            time.sleep(0.1)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """As when its machine goes: everything of it at once."""
        if node.poll() is not None:
            return
        its = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in its:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        node.wait(30)


@pytest.fixture
def cluster(tmp_path):
    short = Path("/tmp") / f"ray-{os.getpid()}"  # sockets have short names
    short.mkdir()
    found = Cluster(tmp_path / "home", short)
    yield found
    for node in reversed(found.nodes):
        found.kill(node)
    shutil.rmtree(short, ignore_errors=True)


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.parametrize("num_candidates", [3, pytest.param(8, marks=pytest.mark.real)])
def test_a_sweep_completes_though_one_of_its_two_nodes_dies(tiny_checkpoint, tmp_path, cluster, num_candidates):
    home = tmp_path / "home"
    home.mkdir()
    sweep = short("sweep", tiny_checkpoint)
    sweep["candidates"] = {
        f"int{bits}-{group}": {
            "quantization": {"method": "rtn", "weights": {"bits": bits, **({"group_size": group} if group else {})}}
        }
        for bits, group in [(8, 0), (4, 32), (8, 32), (4, 16), (8, 16), (4, 64), (8, 64), (4, 0)][:num_candidates]
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(sweep))
    cluster.add()
    doomed = cluster.add()
    flow = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run", str(home / "recipe.yaml")],
        cwd=ROOT,
        env={**os.environ, "SLIMLINE_HOME": str(home), "SLIMLINE_FAN_OUT": f"ray:{cluster.address}",
             "SLIMLINE_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    worked = started_on(doomed, timeout_s=900)
    cluster.kill(doomed)
    said, told = flow.communicate(timeout=1800)
    assert worked, told
    assert flow.returncode == 0, told
    assert told.count("  made  ") == 1 + num_candidates, told
    figures = json.loads(Path(re.search(r"figures\s+(/\S+\.json)", said)[1]).read_text())
    measured = [row["name"] for row in figures["rows"] if row["quality"]]
    assert len(measured) == 1 + num_candidates
    with sqlite3.connect(home / "mlflow.db") as database:
        statuses = dict(database.execute("select status, count(*) from runs group by status").fetchall())
    assert "RUNNING" not in statuses
    after = told.rpartition("  made  ")[2]
    own = [line for line in after.splitlines() if re.search(r"done .*int\d", line)]
    assert own
    assert all(line.endswith("cached") for line in own), told


def started_on(node: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Whether a stage runs on the node: Python's fork server, in the middle of a candidate."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for process in psutil.Process(node.pid).children(recursive=True):
            try:
                if "forkserver" in " ".join(process.cmdline()):
                    return True
            except psutil.Error:
                continue
        time.sleep(0.1)
    return False


def test_a_cluster_that_does_not_answer_is_said(tiny_checkpoint, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(short("sweep", tiny_checkpoint)))
    said = slimline("run", str(tmp_path / "recipe.yaml"), home=tmp_path, SLIMLINE_FAN_OUT="ray:127.0.0.1:1")
    assert said.returncode == 1
    assert "No Ray cluster answers at SLIMLINE_FAN_OUT=ray:127.0.0.1:1" in said.stderr
