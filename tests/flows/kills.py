"""Random SIGKILLs over many short flow runs, and what is left afterwards, counted.

    python -m tests.flows.kills --kills 200 --on-stack 60 --seed 0

Every run is a real one of the tiny model. Some are started by the command line, as without any server; in the lane "on
the stack" they are asked for by Prefect's API and run by the worker of `slimline up`, with files in its S3 server. At
random moments, most of them while a stage runs, random processes are killed: the flow, a stage, a training, the fork
server that stages come from, a server, the store, the worker, the supervisor, or all at once, as when the power goes.
What no supervisor starts again is started again as a person would, until the run completes. Moments and victims are
drawn with the seed; which line of code they hit is the machine's affair.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil
import yaml

from infra.services import addresses, running
from infra.services.programs import Plan, artifact_store
from tests.flows.command_line import ROOT
from tests.flows.recipes import RTN_8, data, short
from tests.infra.asking import ask_json, wait_until

KILLS_PER_RUN = (10, 24)
"""So many, drawn anew for each run; one that is faster than its kills completes with fewer."""
MAX_STARTS = 15
BETWEEN_KILLS_S = 3.0
DURING_STAGES = 0.9
"""Of the kills; the others may hit imports, or what lies between stages."""
LOST_S = 300.0
"""After which a run that nobody runs, and that nobody says so of, is stuck: three times what docs promise of one that
had begun. One that its worker never began is crashed after half an hour; a person does not wait for that."""
OF_RUNS = {"flow": 4, "stage": 16, "trainer": 8, "fork server": 4, "Prefect server in the run": 1, "everything": 1}
"""What is killed, where it is there, and how often relative to each other."""


def recipe(source: Path, number: int) -> dict:
    """A training among short stages, and a registration; another number makes most of them again, and not the data."""
    training = {"max_steps": 40, "batch_size": 4, "gradient_accumulation_steps": 1, "save_every_steps": 4}
    training["learning_rate"] = 1e-4 * (1 + number / 1000)
    student = {"distillation": {"student": {"layers": 2}, "training": training}, "quantization": RTN_8}
    content = short(
        "kills",
        source,
        data=data(training_tokens=20_000),
        candidates={"int8": {"quantization": RTN_8}, "student": student},
        # Killed more often than anybody would go on by default
        execution={"retries": {"first_delay_s": 0.1, "crash": 10, "out_of_memory": 10}},
    )
    content["validation"]["quality"]["greedy_tokens"] = 2 + number
    return content


@dataclass
class Found:
    """What happened, and what was found afterwards. All but the first four should be empty."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    starts: int = 0
    stages: int = 0
    incomplete: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    registered_twice: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    slots: list[str] = field(default_factory=list)
    run_again: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        """Add what another lane found."""
        self.kills.update(other.kills)
        for name in ("runs", "starts", "stages"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, faults in self.faults().items():
            faults += getattr(other, name)

    def faults(self) -> dict[str, list[str]]:
        """What must not be."""
        names = ("incomplete", "corrupt", "registered_twice", "orphans", "slots", "run_again", "left")
        return {name: getattr(self, name) for name in names}

    def said(self) -> str:
        """The counts, a line each."""
        kills = ", ".join(f"{count} {victim}" for victim, count in self.kills.most_common())
        titles = {
            "incomplete": "runs that did not complete",
            "corrupt": "corrupt artifacts",
            "registered_twice": "registered twice",
            "orphans": "orphan processes",
            "slots": "locks and slots not given back",
            "run_again": "finished stages run again",
            "left": "other remains",
        }
        lines = [f"{self.kills.total()} SIGKILLs ({kills})", f"{self.runs} runs, started {self.starts} times"]
        lines += [f"{self.stages} stages computed"]
        lines += [f"{titles[name]}: {len(faults)}" for name, faults in self.faults().items()]
        return "\n".join(lines)


class Lane:
    """Runs one after the other in a home of their own, disturbed by kills; by the command line, without servers."""

    victims: ClassVar = OF_RUNS

    def __init__(self, home: Path, source: Path, seed: int) -> None:
        self.home, self.source = home.resolve(), source
        self.random = random.Random(seed)
        self.found = Found()
        self.until = math.inf
        self.home.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    def disturb(self, kills: int) -> Found:
        """As many kills, over as many runs as that takes, or none `until` then any more; then what is left."""
        while (missing := kills - self.found.kills.total()) > 0 and time.monotonic() < self.until:
            self.one_run(min(self.random.randint(*KILLS_PER_RUN), missing))
        self.look()
        return self.found

    def one_run(self, kills: int) -> None:
        """A run that is killed `kills` times at most, and completes."""
        self.found.runs += 1
        number = self.found.runs
        content = recipe(self.source, number)
        for attempt in range(MAX_STARTS):
            self.found.starts += 1
            self.start(number, content, again=attempt > 0)
            while (completed := self.completed()) is None:
                if kills and time.monotonic() < self.until and self.waited_for_a_moment():
                    kills -= self.kill()
                else:
                    time.sleep(0.3)
            say(f"{self.home.name}: run {number} {'completed' if completed else 'ended'}, start {attempt + 1}")
            if completed:
                break
        else:
            self.found.incomplete.append(f"run {number} after {MAX_STARTS} starts")
        self.found.orphans += [f"run {number}: {process}" for process in self.orphans()]

    def start(self, number: int, content: dict, *, again: bool) -> None:
        """Start the run, or go on with it."""
        file = self.home / f"recipe-{number}.yaml"
        file.write_text(yaml.safe_dump(content))
        self.process = self.slimline("run", str(file))

    def completed(self) -> bool | None:
        """Whether the run completed; None while it runs."""
        assert self.process
        code = self.process.poll()
        return None if code is None else code == 0

    def waited_for_a_moment(self) -> bool:
        """Wait for the moment of the next kill; whether there is still a run to disturb then."""
        during_a_stage = self.random.random() < DURING_STAGES
        time.sleep(self.random.uniform(0.2, BETWEEN_KILLS_S))
        while during_a_stage and self.completed() is None and not {"stage", "trainer"} & self.present().keys():
            time.sleep(0.3)
        return self.completed() is None

    def slimline(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """A command, started; what it says is in the home."""
        with (self.home / "said.txt").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.cli", *arguments],
                cwd=ROOT,
                env=self.environment(),
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def environment(self) -> dict[str, str]:
        """Of the runs."""
        own = {"SLIMLINE_HOME": str(self.home), "SLIMLINE_MACHINE_LOCK": str(self.home / "machine")}
        return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **own}

    def processes(self) -> list[psutil.Process]:
        """All that runs with this home in its environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLIMLINE_HOME") == str(self.home):
                    found.append(process)
        return found

    def present(self) -> dict[str, list[psutil.Process]]:
        """What runs, by its role."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.processes():
            if name := role(process):
                if name == "stage" and any((self.home / "work").glob("distill-*")):
                    name = "trainer"
                found.setdefault(name, []).append(process)
        return found

    def orphans(self) -> list[str]:
        """What still runs after a run that completed; Python's own helpers need a moment to notice."""
        deadline = time.monotonic() + 15
        while (left := self.of_runs()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [str(process) for process in left]

    def of_runs(self) -> list[psutil.Process]:
        """Processes that belong to runs."""
        return self.processes()

    def kill(self) -> bool:
        """Kill one victim, or all; whether there was one to kill."""
        present = self.present()
        if not present:
            return False
        weights = {name: weight for name, weight in self.victims.items() if name in (*present, "everything")}
        victim = self.random.choices(list(weights), list(weights.values()))[0]
        for process in self.processes() if victim == "everything" else present[victim]:
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGKILL)
        self.found.kills[victim] += 1
        say(f"{self.home.name}: kill {self.found.kills.total()}, {victim}, in run {self.found.runs}")
        return True

    def look(self) -> None:
        """Read everything that is left in the home."""
        report = subprocess.run(
            [sys.executable, "-m", "tests.flows.kills", "--look"],
            cwd=ROOT,
            env={**self.environment(), **self.store()},
            capture_output=True,
            text=True,
        )
        assert report.returncode == 0, report.stderr
        for name, found in json.loads(report.stdout.splitlines()[-1]).items():
            setattr(self.found, name, getattr(self.found, name) + found)

    def store(self) -> dict[str, str]:
        """Variables that say where artifacts are."""
        return {}


class Stack(Lane):
    """Runs by the worker of `slimline up`."""

    victims: ClassVar = OF_RUNS | {"S3": 5, "MLflow": 5, "Prefect": 4, "worker": 3, "supervisor": 1}

    def __init__(self, home: Path, source: Path, seed: int) -> None:
        super().__init__(home, source, seed)
        self.run: str | None = None
        self.silent_since: float | None = None

    def disturb(self, kills: int) -> Found:
        try:
            self.up()
            super().disturb(kills)
            self.found.slots += self.slots()
        finally:
            self.slimline("down").wait()
        self.found.orphans += [f"after down: {process}" for process in self.processes()]
        return self.found

    def up(self) -> None:
        """As a person would, until it runs."""
        while not running(self.home):
            assert self.slimline("up").wait() == 0, (self.home / "said.txt").read_text()[-2000:]
            self.api = addresses(self.home).prefect_api_url

    def ask(self, path: str, body: object = None) -> Any:
        return wait_until(lambda: ask_json(f"{self.api}/{path}", body), what=path)

    def start(self, number: int, content: dict, *, again: bool) -> None:
        self.silent_since = None
        if again:  # the page's Retry, by somebody who has looked why. At once it ends a worker that still cleans up
            time.sleep(self.random.uniform(2, 10))
            state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
            self.ask(f"flow_runs/{self.run}/set_state", {"state": state, "force": True})
            return
        deployment = self.ask("deployments/name/optimize/optimize")["id"]
        asked = {"parameters": {"recipe": content}, "idempotency_key": str(number)}
        self.run = self.ask(f"deployments/{deployment}/create_flow_run", asked)["id"]

    def completed(self) -> bool | None:
        if not running(self.home):
            self.up()
        try:
            name = ask_json(f"{self.api}/flow_runs/{self.run}")["state"]["name"]
        except (OSError, ValueError):  # it is being started again
            return None
        if name == "Completed":
            return True
        if name in ("Failed", "Crashed", "TimedOut"):
            return False
        if self.present().keys() & OF_RUNS.keys():
            self.silent_since = None
        elif self.silent_since is None:
            self.silent_since = time.monotonic()
        elif time.monotonic() - self.silent_since > LOST_S:
            if name == "Running":
                self.found.incomplete.append(f"run {self.found.runs} stays {name}, and nothing of it runs")
            return False
        return None

    def of_runs(self) -> list[psutil.Process]:
        servers = [process for name, found in self.present().items() if name not in OF_RUNS for process in found]
        theirs = {*servers}
        for process in servers:
            with contextlib.suppress(psutil.NoSuchProcess):
                if role(process) != "supervisor":
                    theirs |= {each for each in process.children(recursive=True) if role(each) not in OF_RUNS}
        return [process for process in self.processes() if process not in theirs]

    def slots(self) -> list[str]:
        """Concurrency slots that nobody holds any more; leases last for a minute."""

        def taken() -> list[str]:
            limits = self.ask("v2/concurrency_limits/filter", {}) or []
            return [f"{limit['name']}: {limit['active_slots']:g}" for limit in limits if limit["active_slots"]]

        deadline = time.monotonic() + 90
        while (found := taken()) and time.monotonic() < deadline:
            time.sleep(1)
        return found

    def store(self) -> dict[str, str]:
        ports = json.loads((self.home / "ports.json").read_text())
        variables = artifact_store(Plan(home=self.home, ports=ports, timeout_s=1))
        return {name: value for name, value in variables.items() if value}


def role(process: psutil.Process) -> str | None:
    """What a process is, by its command and its parent's."""
    told = {
        "infra.services.supervisor": "supervisor",
        "weed server": "S3",
        "-m mlflow server": "MLflow",
        "-m prefect server start": "Prefect",
        "-m prefect worker start": "worker",
        "prefect.server.api.server": "Prefect server in the run",
        "flows.cli run": "flow",
        "-m prefect.engine": "flow",
    }
    with contextlib.suppress(psutil.Error):
        words = " ".join(process.cmdline())
        if "multiprocessing.forkserver" in words:
            parent = process.parent()
            is_stage = parent is not None and "multiprocessing.forkserver" in " ".join(parent.cmdline())
            return "stage" if is_stage else "fork server"
        return next((name for part, name in told.items() if part in words), None)
    return None


def look() -> dict[str, object]:
    """What is left in the home of this process: by the names of `Found`."""
    from infra import s3
    from infra.artifacts import Artifact, CorruptArtifact, verify
    from infra.settings import settings
    from infra.tracking import client, experiment_id

    home, store = settings().home, settings().store
    places = [place.as_uri() for place in (home / "artifacts").glob("*")]
    if store:
        manifests = [name for name, _ in s3._objects(f"{store}/artifacts")]
        assert manifests
        places = [f"{store}/artifacts/{name}" for name in manifests]
    corrupt = []
    for place in places:
        try:
            sha256 = place.rpartition("/")[2].removesuffix(".json")
            verify(Artifact(uri=place, sha256=sha256, size_bytes=0))
        except CorruptArtifact as error:
            corrupt.append(str(error))
    versions = client().search_model_versions("name = 'kills'")
    by_content = Counter(version.tags["sha256"] for version in versions)
    runs, page = [], None
    while page != "":
        found = client().search_runs(
            [experiment_id()], "tags.`slimline.role` = 'stage'", max_results=1000, page_token=page
        )
        runs += found
        page = found.token or ""
    run_again, stages = [], 0
    by_key: dict[str, list] = {}
    for run in runs:
        if key := run.data.tags.get("slimline.key"):
            by_key.setdefault(key, []).append(run)
    for key, attempts in by_key.items():
        ended = [run.info.end_time for run in attempts if run.info.status == "FINISHED"]
        computing = [run for run in attempts if (home / "logs" / f"{run.info.run_id}.log").exists()]
        stages += len(computing)
        run_again += [f"{key}: {run.info.run_name}" for run in computing if ended and run.info.start_time >= min(ended)]
    still = client().search_runs([experiment_id()], "attributes.status = 'RUNNING'")
    left = [f"{run.info.run_name} ({run.info.run_id}) is RUNNING in MLflow" for run in still]
    left += [str(path) for name in ("work", "computed", "scratch") for path in (home / name).glob("*")]
    return {
        "corrupt": corrupt,
        "registered_twice": [sha256 for sha256, count in by_content.items() if count > 1],
        "run_again": run_again,
        "stages": stages,
        "slots": [str(path) for path in [*(home / "locks").iterdir(), home / "machine"] if is_locked(path)],
        "left": left,
    }


def is_locked(file: Path) -> bool:
    """Whether any process holds the lock on `file`."""
    with file.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def say(line: str) -> None:
    """A line, with the time, for who waits."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def disturb(source: Path, home: Path, kills: int, on_stack: int, seed: int, lanes: int, minutes: float) -> Found:
    """`kills` in all: `on_stack` of them there, the others over `lanes` lanes beside it; each has a home of its own."""
    alone = kills - on_stack
    shares = [alone // lanes + (lane < alone % lanes) for lane in range(lanes)]
    at_work: list[tuple[Lane, int]] = []
    if on_stack:
        at_work.append((Stack(home / "stack", source, seed * (lanes + 1) + lanes), on_stack))
    for lane, share in enumerate(shares):
        if share:
            at_work.append((Lane(home / f"lane-{lane}", source, seed * (lanes + 1) + lane), share))
    failed: list[BaseException] = []

    def work(lane: Lane, share: int) -> None:
        lane.until = time.monotonic() + 60 * minutes
        try:
            lane.disturb(share)
        except BaseException as error:  # noqa: BLE001  the others go on, and then it is raised
            failed.append(error)

    threads = [threading.Thread(target=work, args=each) for each in at_work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Found()
    for lane, _ in at_work:
        found.add(lane.found)
    if failed:
        say(found.said())
        raise failed[0]
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--on-stack", type=int, default=60, help="of them on the stack of `slimline up`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="runs without servers side by side, each in its own home")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which nothing is killed any more")
    parser.add_argument("--keep", action="store_true", help="the homes, to look at")
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look:
        sys.stdout.write(json.dumps(look()) + "\n")
        return
    if not 0 <= options.on_stack <= options.kills:
        parser.error(f"--on-stack must be from 0 to --kills ({options.kills}); got {options.on_stack}")
    from tests.conftest import write_tiny_checkpoint

    home = Path(tempfile.mkdtemp(prefix="slimline-kills-"))
    source = home / "tiny"
    write_tiny_checkpoint(source)
    started_at = time.monotonic()
    found = disturb(source, home, options.kills, options.on_stack, options.seed, options.lanes, options.minutes)
    bad = {name: faults for name, faults in found.faults().items() if faults}
    lines = [found.said(), f"{time.monotonic() - started_at:.0f} s, seed {options.seed}, {options.lanes} lanes"]
    lines.append(json.dumps(bad, indent=1) if bad else "nothing amiss")
    if options.keep or bad:
        lines.append(f"kept: {home}")
    else:
        shutil.rmtree(home)
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
