"""The pages of a home directory: MLflow and Prefect servers and the served deployments, under one supervisor.

`up` starts the supervisor in a session of its own; it starts the servers, waits until each answers a real request and
ends all of them when one dies. Everything it starts carries MARK in its environment, so `down` finds what is left of
it even when the supervisor was killed, and cannot mistake a stranger with a reused process id for it.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ValidationError

from infra.settings import QUIET, environment

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
MARK = "SLIMLINE_SERVICES_OF"
"""Environment variable of every process started here; its value is the home directory."""

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
FIRST_PORTS = {"mlflow": 5000, "prefect": 4200}
"""Where the search for a free port begins: the servers' own defaults, below what systems hand out by themselves."""

PR_SET_CHILD_SUBREAPER = 36
DEPLOYMENTS = (sys.executable, "-m", "flows.deployments")
ROOT = Path(__file__).parents[1]
SAYS = "supervisor: "
RUN_MARK = "SLIMLINE_RUN"


class ProcessId(BaseModel, frozen=True):
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    started_at: float

    @classmethod
    def own(cls) -> "ProcessId":
        """Of the calling process."""
        return cls(pid=os.getpid(), started_at=psutil.Process().create_time())

    def alive(self) -> bool:
        """Whether that very process still runs."""
        try:
            process = psutil.Process(self.pid)
            # The system computes start times from the boot time, which moves a little when the clock is set.
            same = abs(process.create_time() - self.started_at) < 2
            return bool(same and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


class Addresses(BaseModel, frozen=True):
    """Where the pages of a home are, or will be once they run."""

    mlflow_url: str
    prefect_url: str

    @property
    def prefect_api_url(self) -> str:
        """What PREFECT_API_URL is set to."""
        return f"{self.prefect_url}/api"

    @property
    def mlflow_page(self) -> str:
        """What to open in a browser: the runs of models rather than the traces of agents."""
        return f"{self.mlflow_url}/#/experiments?workflowType=machine_learning"


class Services(Addresses, frozen=True):
    """Running pages. `pid` is their supervisor's, and of its process group and session."""

    pid: int


class _State(BaseModel, frozen=True):
    supervisor: ProcessId
    addresses: Addresses
    state: Literal["starting", "running"]


def running(home: Path) -> Services | None:
    """The services of `home` if they run and are ready; stale notes of dead ones are ignored. Cheap."""
    state = _read_state(home)
    if state is None or state.state != "running" or not state.supervisor.alive():
        return None
    return Services(**state.addresses.model_dump(), pid=state.supervisor.pid)


def addresses(home: Path) -> Addresses:
    """Where the pages of `home` run or will run: chosen once and remembered, so that links in old runs stay good."""
    state = _read_state(home)
    if state is not None and state.supervisor.alive():
        return state.addresses
    with _lock(home, "ports"):
        return _remembered(home) or _choose(home, {})


def up(home: Path, *, deployments: Sequence[str] = DEPLOYMENTS, timeout_s: float = START_TIMEOUT_S) -> Services:
    """Start the services of `home` and return when every one answers; if they run already, say where.

    Args:
        home: Slimline's directory; the pages show what runs without servers recorded there.
        deployments: the command that serves the deployments, run from the project's root.
        timeout_s: for the start; afterwards nothing is left of it.

    Raises:
        ValueError: a service did not start; the message says which, why, and where its log is.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    with _lock(home, "services"):
        if found := running(home):
            return found
        _end(home)  # what a killed supervisor left
        ports = _free_ports(home)
        log = _log(home, "supervisor")
        command = [sys.executable, "-m", "infra.services", "supervise", str(home), "--timeout", str(timeout_s)]
        command += ["--mlflow", str(ports["mlflow"]), "--prefect", str(ports["prefect"]), "--", *deployments]
        with log.open("wb") as stream:
            supervisor = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                cwd=ROOT,
                env=environment(**_variables(home)),
            )
        assert supervisor.stdin is not None
        try:
            while not (found := running(home)):
                if supervisor.poll() is not None:
                    raise ValueError(_why(home, log))
                time.sleep(0.1)
            supervisor.stdin.write(b"ready\n")  # without this word, our end is the supervisor's end
            supervisor.stdin.close()
        except BaseException:
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.close()
            _end(home)
            supervisor.wait()
            raise
        supervisor.returncode = 0  # it lives on; silences the ResourceWarning about a running child
        return found


def down(home: Path) -> bool:
    """End the services of `home` and everything they started; whether there was anything to end."""
    home = home.resolve()
    if not home.exists():
        return False
    with _lock(home, "services"):
        return _end(home)


def _end(home: Path) -> bool:
    """SIGTERM, wait, SIGKILL, until no marked process is left."""
    state = _read_state(home)
    left = _marked(home)
    found = bool(left)
    supervisor = [p for p in left if state and p.pid == state.supervisor.pid]
    for process in supervisor or left:  # the supervisor ends the others in order
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := _marked(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    _kill(home)
    _state_file(home).unlink(missing_ok=True)
    return found


def _kill(home: Path) -> None:
    """SIGKILL every marked process but the caller, until none is left."""
    while left := _marked(home):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def run_mark(home: Path) -> dict[str, str]:
    """A variable by which the processes that a flow run starts can be found when the run itself was killed."""
    own = ProcessId.own()
    return {RUN_MARK: f"{own.pid} {own.started_at} {home}"}


def start_inner_server() -> None:
    """Start the Prefect server inside this process's flows, if they use one, so that Ctrl-C does not reach it.

    A terminal sends SIGINT to all processes in the foreground. Without its server the flow cannot record how it ended:
    Prefect then waits for a minute and prints what it could not send. A blocked signal stays blocked in a child; the
    server ends by SIGTERM, which Prefect sends when this process exits.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    server = SubprocessASGIServer()
    try:
        server.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
    assert server.server_process
    threading.Thread(target=_end_after, args=[server.server_process], daemon=True).start()


def _end_after(server: "subprocess.Popen[Any]") -> None:
    """End this process when its server has ended and it does not notice by itself.

    A service manager ends all processes at once. Prefect then tries for minutes to tell its server how the run ended.
    """
    while server.poll() is None:
        time.sleep(0.5)
    time.sleep(STOP_TIMEOUT_S)  # a process that is about to exit is gone by then
    print(  # noqa: T201  the console may be held by what hangs
        "error The Prefect server inside this run was ended. Finished stages are kept; the same command goes on from "
        "there.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def end_orphans(home: Path) -> int:
    """End what killed runs of `home` left behind, and say how many processes that were.

    Prefect's server inside a flow is one: it ends with the flow unless the flow gets a SIGKILL.
    """
    orphans = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            pid, started_at, of = (process.environ().get(RUN_MARK) or "0 0 ").split(" ", 2)
            if of == str(home) and not ProcessId(pid=int(pid), started_at=float(started_at)).alive():
                process.kill()
                orphans.append(process)
    psutil.wait_procs(orphans, timeout=10)
    return len(orphans)


def _marked(home: Path) -> list[psutil.Process]:
    """Living processes started by the services of `home`, the caller excepted."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == str(home):
                found.append(process)
    return found


def _why(home: Path, log: Path) -> str:
    """The last thing the supervisor said."""
    return f"The services did not start: {_last_line(log).rpartition(SAYS)[2]} Logs: {home / 'logs'}."


def _state_file(home: Path) -> Path:
    return home / "services.json"


def _log(home: Path, name: str) -> Path:
    path = home / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _read_state(home: Path) -> _State | None:
    try:
        return _State.model_validate_json(_state_file(home).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _write_atomically(path: Path, text: str) -> None:
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(text)
    draft.replace(path)


@contextlib.contextmanager
def _lock(home: Path, name: str) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    with (home / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remembered(home: Path) -> Addresses | None:
    try:
        return Addresses.model_validate_json((home / "ports.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do; TIME_WAIT is no obstacle
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _choose(home: Path, keep: dict[str, int]) -> Addresses:
    ports = {
        name: keep.get(name) or next(port for port in range(first, first + 500) if _free(port))
        for name, first in FIRST_PORTS.items()
    }
    chosen = Addresses(mlflow_url=f"http://{HOST}:{ports['mlflow']}", prefect_url=f"http://{HOST}:{ports['prefect']}")
    _write_atomically(home / "ports.json", chosen.model_dump_json())
    return chosen


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def _free_ports(home: Path) -> dict[str, int]:
    """The remembered ports, replaced where somebody else listens there by now."""
    with _lock(home, "ports"):
        before = _remembered(home)
        known = {"mlflow": _port(before.mlflow_url), "prefect": _port(before.prefect_url)} if before else {}
        chosen = _choose(home, {name: port for name, port in known.items() if _free(port)})
    return {"mlflow": _port(chosen.mlflow_url), "prefect": _port(chosen.prefect_url)}


def _variables(home: Path) -> dict[str, str | None]:
    """What the supervisor and everything below it inherits."""
    return {
        **QUIET,
        MARK: str(home),
        "SLIMLINE_HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": None,
        "MLFLOW_TRACKING_URI": None,
        "PYTHONUNBUFFERED": "1",
    }


# From here on: the supervisor's side.


class _Supervisor:
    def __init__(
        self, home: Path, mlflow_port: int, prefect_port: int, timeout_s: float, deployments: Sequence[str]
    ) -> None:
        self.home = home
        self.addresses = Addresses(
            mlflow_url=f"http://{HOST}:{mlflow_port}", prefect_url=f"http://{HOST}:{prefect_port}"
        )
        self.deployments = list(deployments)
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.stopping: str | None = None
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + timeout_s
        self.awaited = "MLflow's database"
        self.detached = False
        self.ready = False

    def note(self, state: Literal["starting", "running"]) -> None:
        found = _State(supervisor=ProcessId.own(), addresses=self.addresses, state=state)
        _write_atomically(_state_file(self.home), found.model_dump_json(indent=1))

    def start(self, name: str, command: Sequence[str], **variables: str) -> None:
        with _log(self.home, name).open("wb") as log:
            self.children[name] = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment(**variables)
            )

    def start_servers(self) -> None:
        prefect = ["-m", "prefect", "server", "start", "--host", HOST, "--port", str(_port(self.addresses.prefect_url))]
        self.start(
            "prefect",
            [sys.executable, *prefect],
            PREFECT_LOGGING_LEVEL="INFO",
            PREFECT_UI_STATIC_DIRECTORY=str(self.home / "prefect" / "ui"),  # else it writes into site-packages
        )
        mlflow = ["-m", "mlflow", "server", "--host", HOST, "--port", str(_port(self.addresses.mlflow_url))]
        files = ["--default-artifact-root", (self.home / "mlruns").as_uri(), "--no-serve-artifacts"]
        database = f"sqlite:///{self.home / 'mlflow.db'}"
        self.prepare_database()
        self.start(
            "mlflow",
            [sys.executable, *mlflow, "--workers", "1", "--backend-store-uri", database, *files],
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # a quarter of a GiB for jobs that nobody here starts
        )

    def prepare_database(self) -> None:
        """In a process of its own: whoever imports MLflow's database code keeps 200 MiB of it."""
        code = (
            "from infra.settings import settings; from infra.tracking import prepare_database as p; p(settings().home)"
        )
        self.start("database", [sys.executable, "-c", code])
        child = self.children["database"]
        while child.poll() is None:
            self.check()
            time.sleep(0.1)
        self.check()
        del self.children["database"]

    def start_deployments(self) -> None:
        self.start(
            "deployments",
            self.deployments,
            PREFECT_API_URL=self.addresses.prefect_api_url,
            PREFECT_LOGGING_LEVEL="INFO",
        )

    def check(self) -> None:
        """Raises _Stop when asked to, when `up` went away before it was done, too late, or when a child has died."""
        if self.stopping:
            raise _Stop(self.stopping)
        if not self.detached and select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                raise _Stop("whoever started the services went away before they were ready.")
            self.detached = True
        for name, child in self.children.items():
            if (code := child.poll()) is not None and not (code == 0 and name == "database"):
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise _Stop(f"{name} ended with {how}: {_last_line(_log(self.home, name))}")
        if not self.ready and time.monotonic() > self.deadline:
            raise _Stop(f"{self.awaited} was not ready after {self.timeout_s:.0f} s.")

    def wait_until(self, probe: "_Probe") -> None:
        """Returns when the probe is satisfied."""
        self.awaited = f"{probe.name} ({probe.url})"
        while not probe.satisfied():
            self.check()
            time.sleep(0.2)

    def stop(self) -> None:
        """End the children, flows before the servers they report to, then whatever they left."""
        for names in (("deployments",), ("mlflow", "prefect")):
            if not self.ready:  # nothing runs there yet that would want to say goodbye
                break
            processes = []
            for name in names:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(self.children[name].pid)
                    processes += [process, *process.children(recursive=True)]
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
            _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S / 3)
            logger.info("%s: asked to end%s", ", ".join(names), f", {len(alive)} have to be killed" if alive else "")
        _kill(self.home)
        for child in self.children.values():
            child.wait()
        _state_file(self.home).unlink(missing_ok=True)


class _Stop(Exception):
    """Why the supervisor ends."""


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing."


@dataclass(frozen=True)
class _Probe:
    """A real request to an API, and what its answer must be like."""

    name: str
    url: str
    body: dict[str, Any]
    good: Callable[[Any], bool] = bool

    def satisfied(self) -> bool:
        request = urllib.request.Request(self.url, json.dumps(self.body).encode(), {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback
        try:
            with direct.open(request, timeout=10) as answer:
                return self.good(json.loads(answer.read()))
        except (OSError, ValueError):
            return False


def _supervise(home: Path, mlflow_port: int, prefect_port: int, timeout_s: float, deployments: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {SAYS}%(message)s")
    supervisor = _Supervisor(home, mlflow_port, prefect_port, timeout_s, deployments)

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        supervisor.stopping = f"asked to stop ({signal.Signals(number).name})."

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask_to_stop)
    if sys.platform == "linux":  # children of dead children become ours, so that waiting for them is possible
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)

    started_at = datetime.now(UTC)
    api, mlflow = supervisor.addresses.prefect_api_url, supervisor.addresses.mlflow_url

    def polled(deployments: list[dict[str, Any]]) -> bool:
        polls = [datetime.fromisoformat(d["last_polled"]) for d in deployments if d["last_polled"]]
        return any(poll > started_at for poll in polls)

    try:
        supervisor.note("starting")
        supervisor.start_servers()
        experiments = f"{mlflow}/api/2.0/mlflow/experiments/search"
        supervisor.wait_until(_Probe("prefect", f"{api}/flows/paginate", {}))
        supervisor.start_deployments()
        supervisor.wait_until(_Probe("mlflow", experiments, {"max_results": 1}))
        supervisor.wait_until(_Probe("deployments", f"{api}/deployments/filter", {}, polled))
        supervisor.ready = True
        supervisor.note("running")
        logger.info("running: %s %s", mlflow, supervisor.addresses.prefect_url)
        while True:
            supervisor.check()
            _reap(supervisor)
            time.sleep(0.5)
    except _Stop as why:
        logger.info("%s", why)
        return 0 if supervisor.stopping else 1
    except Exception:
        logger.exception("the supervisor failed")
        return 1
    finally:
        supervisor.stop()


def _reap(supervisor: _Supervisor) -> None:
    """Collect adopted children that have ended; our own are `check`'s."""
    own = {child.pid for child in supervisor.children.values()}
    for process in psutil.Process().children():
        if process.pid not in own and process.status() == psutil.STATUS_ZOMBIE:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.services")
    parser.add_argument("command", choices=["supervise"])
    parser.add_argument("home", type=Path)
    parser.add_argument("--mlflow", type=int, required=True)
    parser.add_argument("--prefect", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("deployments", nargs="+")
    given = parser.parse_args()
    return _supervise(given.home, given.mlflow, given.prefect, given.timeout, given.deployments)


if __name__ == "__main__":
    sys.exit(_main())
