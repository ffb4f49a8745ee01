"""Starts the services of a home, waits until each answers a real request, and starts again what dies.

`up` runs it as `python -m infra.services.supervisor PLAN`, in a session of its own.
"""

import contextlib
import ctypes
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import psutil

from infra.services import postgres, programs
from infra.services.addresses import Note, note_file, write_atomically
from infra.services.credentials import credentials
from infra.services.logs import SAYS, log_file, telling_line
from infra.services.processes import ProcessId, kill
from infra.services.programs import POOL, RELEASE_POOL, ROOT, STOPPED_IN_ORDER, Plan, Program
from infra.settings import environment

logger = logging.getLogger(__name__)

PR_SET_CHILD_SUBREAPER = 36
MAX_DEATHS = 5
"""Of one program within `DEATHS_WITHIN_S`; with one more the rest ends, so that somebody looks at it."""
DEATHS_WITHIN_S = 600.0


class Stop(Exception):
    """Why the supervisor ends."""


class Supervisor:
    """The children of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.programs: dict[str, Program] = {}
        self.deaths: dict[str, list[float]] = {}
        self.stopping: str | None = None
        self.deadline = time.monotonic() + plan.timeout_s
        self.awaited = "nothing"
        self.detached = False
        self.ready = False

    def note(self, state: Literal["starting", "running"]) -> None:
        """Say in services.json how far we are."""
        own = ProcessId.own()
        note = Note(supervisor=own, addresses=self.plan.addresses, database=self.plan.database, state=state)
        write_atomically(note_file(self.plan.home), note.model_dump_json(indent=1))

    def start_all(self) -> None:
        """Returns when everything answers."""
        plan = self.plan
        self.start(programs.store(plan))
        if plan.database == "postgres":
            password = credentials(plan.home).postgres_password.get_secret_value()
            postgres.create(plan.home / "postgres", password, environment())
            self.start(programs.database(plan))
            self.until_it_succeeds(programs.databases(plan))
            self.once(programs.prefect_migration(plan))
        self.start(programs.prefect(plan))
        self.once(programs.mlflow_migration(plan))
        self.start(programs.mlflow(plan))
        self.until_it_succeeds(programs.buckets(plan))
        api, tracking = plan.addresses.prefect_api_url, plan.addresses.mlflow_url
        self.wait_until(Probe("prefect", f"{api}/flows/paginate", {}))
        self.once(programs.deployments(plan))
        self.start(programs.worker(plan))
        self.start(programs.releaser(plan))
        self.wait_until(Probe("mlflow", f"{tracking}/api/2.0/mlflow/experiments/search", {"max_results": 1}))
        online = {"workers": {"status": {"any_": ["ONLINE"]}}}
        for name, pool in (("worker", POOL), ("releaser", RELEASE_POOL)):
            self.wait_until(Probe(name, f"{api}/work_pools/{pool}/workers/filter", online))

    def start(self, program: Program) -> None:
        """Start it; from now on its end is everybody's end, and once all are ready it is started again."""
        self.children[program.name] = self._popen(program)
        self.programs[program.name] = program

    def start_again(self, name: str, code: int) -> None:
        """In place of a program that has died.

        Raises:
            Stop: it dies too often.
        """
        why = self._why(name, code)
        now = time.monotonic()
        self.deaths[name] = [then for then in self.deaths.get(name, []) if now - then < DEATHS_WITHIN_S] + [now]
        if len(self.deaths[name]) > MAX_DEATHS:
            raise Stop(f"{why} That was the {len(self.deaths[name])}th time in {DEATHS_WITHIN_S / 60:.0f} minutes.")
        with contextlib.suppress(ProcessLookupError):  # its own children may hold its port
            os.killpg(self.children[name].pid, signal.SIGKILL)
        logger.info("%s It is started again.", why)
        self.children[name] = self._popen(self.programs[name], how="ab")

    def once(self, program: Program) -> None:
        """Returns when it has done its work.

        Raises:
            Stop: it failed.
        """
        if code := self._code_of(program):
            raise Stop(self._why(program.name, code))

    def until_it_succeeds(self, program: Program) -> None:
        """Returns when it has done its work, for which what it talks to has to be ready."""
        while self._code_of(program):
            time.sleep(0.2)

    def _code_of(self, program: Program) -> int:
        self.awaited = f"{program.name} (log: {log_file(self.plan.home, program.name)})"
        child = self._popen(program)
        while (code := child.poll()) is None:
            self.check()
            time.sleep(0.05)
        self.check()
        return code

    def _popen(self, program: Program, how: Literal["wb", "ab"] = "wb") -> "subprocess.Popen[bytes]":
        with log_file(self.plan.home, program.name).open(how) as log:
            return subprocess.Popen(
                list(program.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/" if program.user else ROOT,  # another user need not be let into the checkout
                env=environment(**program.variables),
                process_group=0,
                **program.user,
            )

    def check(self) -> None:
        """Starts again what has died; before all are ready that is an end, too.

        Raises:
            Stop: asked to, `up` went away before it was done, it is too late, or a program dies.
        """
        if self.stopping:
            raise Stop(self.stopping)
        if not self.detached and select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                raise Stop("whoever started the services went away before they were ready.")
            self.detached = True
        for name, child in [*self.children.items()]:
            if (code := child.poll()) is not None:
                if not self.ready:
                    raise Stop(self._why(name, code))
                self.start_again(name, code)
        if not self.ready and time.monotonic() > self.deadline:
            raise Stop(f"{self.awaited} was not ready after {self.plan.timeout_s:.0f} s.")

    def _why(self, name: str, code: int) -> str:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{name} ended with {how}: {telling_line(log_file(self.plan.home, name)).rstrip('.')}."

    def wait_until(self, probe: "Probe") -> None:
        """Returns when the probe is satisfied."""
        self.awaited = f"{probe.name} ({probe.url})"
        while not probe.satisfied():
            self.check()
            time.sleep(0.2)

    def watch(self) -> None:
        """Returns never; raises Stop when it is time to end."""
        while True:
            self.check()
            self._reap()
            time.sleep(0.5)

    def _reap(self) -> None:
        """Collect adopted children that have ended; our own are `check`'s."""
        own = {child.pid for child in self.children.values()}
        for process in psutil.Process().children():
            if process.pid not in own and process.status() == psutil.STATUS_ZOMBIE:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)

    def stop(self) -> None:
        """End the children in order, then whatever they left."""
        for names in STOPPED_IN_ORDER:
            if not self.ready:  # nothing runs there yet that would want to say goodbye
                break
            asked: list[psutil.Process] = []
            for name in names:
                if name in self.children:
                    asked += self._ask_to_end(self.programs[name])
            grace_s = max(program.grace_s for program in self.programs.values() if program.name in names)
            _, alive = psutil.wait_procs(asked, timeout=grace_s)
            logger.info("%s: asked to end%s", ", ".join(names), f", {len(alive)} have to be killed" if alive else "")
        kill(self.plan.home)
        for child in self.children.values():
            child.wait()
        note_file(self.plan.home).unlink(missing_ok=True)

    def _ask_to_end(self, program: Program) -> list[psutil.Process]:
        processes = []
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.children[program.name].pid)
            processes = [process, *(process.children(recursive=True) if program.tree else ())]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(program.asked_to_end_by)
        return processes


@dataclass(frozen=True)
class Probe:
    """A real request to an API, whose answer must not be empty."""

    name: str
    url: str
    body: dict[str, Any]

    def satisfied(self) -> bool:
        """Whether it is answered, and not with nothing."""
        request = urllib.request.Request(self.url, json.dumps(self.body).encode(), {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback
        try:
            with direct.open(request, timeout=10) as answer:
                return bool(json.loads(answer.read()))
        except (OSError, ValueError):
            return False


def supervise(plan: Plan) -> int:
    """The exit code: 0 when asked to end, 1 when something failed."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {SAYS}%(message)s")
    supervisor = Supervisor(plan)

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        supervisor.stopping = f"asked to stop ({signal.Signals(number).name})."

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask_to_stop)
    if sys.platform == "linux":  # children of dead children become ours, so that waiting for them is possible
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        supervisor.note("starting")
        supervisor.start_all()
        supervisor.ready = True
        supervisor.note("running")
        logger.info("running: %s %s", plan.addresses.mlflow_url, plan.addresses.prefect_url)
        supervisor.watch()
    except (Stop, ValueError) as why:
        logger.info("%s", why)
        return 0 if supervisor.stopping else 1
    except Exception:
        logger.exception("the supervisor failed")
        return 1
    finally:
        supervisor.stop()
    return 0


if __name__ == "__main__":
    sys.exit(supervise(Plan.model_validate_json(sys.argv[1])))
