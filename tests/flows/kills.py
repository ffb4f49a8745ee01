"""Random SIGKILLs over many short flow runs, and what is left afterwards, counted.

    python -m tests.flows.kills --kills 200 --seed 0

Every run is a real one of the tiny model through the command line. At random moments random processes of it are
killed: the flow, a stage, the fork server that stages come from, Prefect's server, or all of them at once, as when the
power goes. What was killed is started again until the run completes. Moments and victims are drawn with the seed; which
line of code they hit is the machine's affair.
"""

import argparse
import contextlib
import fcntl
import json
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

import psutil
import yaml

ROOT = Path(__file__).parents[2]
VICTIMS = {"flow": 4, "stage": 4, "fork server": 1, "Prefect server": 2, "everything": 2}
"""What is killed, and how often relative to each other."""
MAX_KILLS_PER_RUN = 3
MAX_STARTS = 12
STDLIB = {"corpus": "stdlib", "content": "documentation"}


def recipe(source: Path, seed: int) -> dict:
    """Eight short stages and a registration; another seed makes all but the first again."""
    return {
        "name": "kills",
        "source": str(source),
        "seed": seed,
        "data": {
            **dict.fromkeys(("training", "calibration", "evaluation"), STDLIB),
            "sequence_length": 64,
            "evaluation_window": 64,
            "num_training_tokens": 0,
            "num_calibration_sequences": 4,
            "num_evaluation_windows": 8,
        },
        "candidates": {"int8": {"quantization": {"method": "rtn", "weights": {"bits": 8}}}},
        "engines": [{"engine": "onnxruntime", "precision": "float32"}],
        "validation": {
            "quality": {"num_greedy_prompts": 2, "greedy_tokens": 4},
            "speed": None,
            "limits": {"perplexity": {"max_degradation_percent": 1000}},
            "if_inconclusive": {"max_rounds": 0},
        },
        "execution": {"retries": {"first_delay_s": 0.1}},
        "register_as": "kills",
    }


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
    locks: list[str] = field(default_factory=list)
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
        names = ("incomplete", "corrupt", "registered_twice", "orphans", "locks", "run_again", "left")
        return {name: getattr(self, name) for name in names}

    def said(self) -> str:
        """The counts, a line each."""
        kills = ", ".join(f"{count} {victim}" for victim, count in self.kills.most_common())
        lines = [f"{self.kills.total()} SIGKILLs ({kills})", f"{self.runs} runs, started {self.starts} times"]
        lines += [f"{self.stages} stages computed"]
        lines += [f"{name.replace('_', ' ')}: {len(faults)}" for name, faults in self.faults().items()]
        return "\n".join(lines)


class Lane:
    """Runs one after the other in a home of their own, disturbed by kills."""

    def __init__(self, home: Path, source: Path, seed: int) -> None:
        self.home, self.source = home.resolve(), source
        self.random = random.Random(seed)
        self.found = Found()
        self.first_seed = 1000 * seed
        self.home.mkdir(parents=True, exist_ok=True)
        self.run_s = 20.0  # that the last start took until it completed: in which kills fall

    def disturb(self, kills: int) -> Found:
        """As many kills, over as many runs as that takes; then what is left."""
        while self.found.kills.total() < kills:
            self.one_run(min(self.random.randint(1, MAX_KILLS_PER_RUN), kills - self.found.kills.total()))
        self.look()
        return self.found

    def one_run(self, kills: int) -> None:
        """A run that is killed `kills` times at most, and completes."""
        self.found.runs += 1
        file = self.home / f"recipe-{self.found.runs}.yaml"
        file.write_text(yaml.safe_dump(recipe(self.source, self.first_seed + self.found.runs)))
        for _ in range(MAX_STARTS):
            self.found.starts += 1
            with (self.home / "said.txt").open("ab") as said:
                process = subprocess.Popen(
                    [sys.executable, "-m", "flows.cli", "run", str(file)],
                    cwd=ROOT,
                    env=self.environment(),
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                )
            started_at = time.monotonic()
            while kills and process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self.random.uniform(0.2, self.run_s))
                if process.poll() is None and self.kill(process.pid):
                    kills -= 1
            if process.wait() == 0:
                self.run_s = time.monotonic() - started_at
                break
        else:
            self.found.incomplete.append(f"{file} after {MAX_STARTS} starts")
        self.found.orphans += [f"{file}: {process}" for process in self.orphans()]

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

    def orphans(self) -> list[str]:
        """What still runs after a run that completed; Python's own helpers need a moment to notice."""
        deadline = time.monotonic() + 15
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [str(process) for process in left]

    def kill(self, flow: int) -> bool:
        """Kill one victim, or all; whether there was one to kill."""
        victim = self.random.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        chosen = [process for process in self.processes() if victim in ("everything", role(process, flow))]
        if not chosen:
            return False
        for process in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGKILL)
        self.found.kills[victim] += 1
        return True

    def look(self) -> None:
        """Read everything that is left in the home."""
        report = subprocess.run(
            [sys.executable, "-m", "tests.flows.kills", "--look"],
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
        )
        assert report.returncode == 0, report.stderr
        for name, found in json.loads(report.stdout.splitlines()[-1]).items():
            setattr(self.found, name, found)


def role(process: psutil.Process, flow: int) -> str | None:
    """What a process of a run is, by its place in the tree."""
    try:
        words, parent = " ".join(process.cmdline()), process.ppid()
        if process.pid == flow:
            return "flow"
        if "prefect.server" in words:
            return "Prefect server"
        if "forkserver" in words:
            return "fork server" if parent == flow else "stage"
    except psutil.Error:
        pass
    return None


def look() -> dict[str, object]:
    """What is left in the home of this process: by the names of `Found`."""
    from infra.artifacts import Artifact, CorruptArtifact, verify
    from infra.settings import settings
    from infra.tracking import client, experiment_id

    home = settings().home
    corrupt = []
    for place in (home / "artifacts").iterdir():
        try:
            verify(Artifact(uri=place.as_uri(), sha256=place.name, size_bytes=0))
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
    running = client().search_runs([experiment_id()], "attributes.status = 'RUNNING'")
    left = [f"{run.info.run_name} is RUNNING in MLflow" for run in running]
    left += [str(path) for name in ("work", "computed", "scratch") for path in (home / name).glob("*")]
    return {
        "corrupt": corrupt,
        "registered_twice": [sha256 for sha256, count in by_content.items() if count > 1],
        "run_again": run_again,
        "stages": stages,
        "locks": [str(path) for path in [*(home / "locks").iterdir(), home / "machine"] if is_locked(path)],
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


def disturb(source: Path, home: Path, kills: int, seed: int, lanes: int) -> Found:
    """`kills` of them over `lanes` lanes side by side, each with a home below `home`."""
    share = [kills // lanes + (lane < kills % lanes) for lane in range(lanes)]
    running = [Lane(home / f"lane-{lane}", source, seed * lanes + lane) for lane in range(lanes)]
    threads = [threading.Thread(target=lane.disturb, args=[n]) for lane, n in zip(running, share, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Found()
    for lane in running:
        found.add(lane.found)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="runs side by side, each in a home of its own")
    parser.add_argument("--keep", action="store_true", help="the homes, to look at")
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look:
        sys.stdout.write(json.dumps(look()) + "\n")
        return
    from tests.conftest import write_tiny_checkpoint

    home = Path(tempfile.mkdtemp(prefix="slimline-kills-"))
    source = home / "tiny"
    write_tiny_checkpoint(source)
    started_at = time.monotonic()
    found = disturb(source, home, options.kills, options.seed, options.lanes)
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
