"""Starting the services of a home and ending them: `slimline up` and `slimline down`."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from infra.locks import held
from infra.services.addresses import Database, Services, free_ports, note_file, read_note, running
from infra.services.logs import SAYS, log_file
from infra.services.processes import kill, marked
from infra.services.programs import DEPLOY, ROOT, Plan, inherited
from infra.settings import environment

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
"""Of all services together; more than the supervisor gives them one after the other."""


def up(
    home: Path,
    *,
    database: Database = "sqlite",
    deploy: Sequence[str] = DEPLOY,
    timeout_s: float = START_TIMEOUT_S,
) -> Services:
    """Start the services of `home` and return when every one answers; if they run already, say where.

    Args:
        home: Slimline's directory; the pages show what runs without servers recorded there.
        database: of MLflow and Prefect. PostgreSQL begins empty: what SQLite holds stays there and is shown with it.
        deploy: the command that creates the deployments, run from the project's root.
        timeout_s: for the start; afterwards nothing is left of it.

    Raises:
        ValueError: a service did not start; the message says which, why, and where its log is. Or they run already,
            on another database.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    with held(home / "services.lock"):
        if found := running(home):
            if found.database != database:
                raise ValueError(
                    f"The services must be stopped to run on {database}; they run on {found.database} at "
                    f"{found.prefect_url}. Run: slimline down"
                )
            return found
        _end(home)  # what a killed supervisor left
        with free_ports(home) as ports:
            plan = Plan(home=home, ports=ports, database=database, deploy=tuple(deploy), timeout_s=timeout_s)
            return _start(plan)


def _start(plan: Plan) -> Services:
    """The services, when the supervisor says that they run."""
    log = log_file(plan.home, "supervisor")
    with log.open("wb") as stream:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "infra.services.supervisor", plan.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            cwd=ROOT,
            env=environment(**inherited(plan.home)),
        )
    assert supervisor.stdin is not None
    try:
        while not (found := running(plan.home)):
            if supervisor.poll() is not None:
                raise ValueError(_why(plan.home, log))
            time.sleep(0.1)
        supervisor.stdin.write(b"ready\n")  # without this word, our end is the supervisor's end
        supervisor.stdin.close()
    except BaseException:
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.close()
        _end(plan.home)
        supervisor.wait()
        raise
    supervisor.returncode = 0  # it lives on; silences the ResourceWarning about a running child
    return found


def down(home: Path) -> bool:
    """End the services of `home` and everything they started; whether there was anything to end."""
    home = home.resolve()
    if not home.exists():
        return False
    with held(home / "services.lock"):
        return _end(home)


def _end(home: Path) -> bool:
    """SIGTERM, wait, SIGKILL, until no marked process is left."""
    note = read_note(home)
    left = marked(home)
    found = bool(left)
    supervisor = [p for p in left if note and p.pid == note.supervisor.pid]
    for process in supervisor or left:  # the supervisor ends the others in order
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := marked(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    kill(home)
    note_file(home).unlink(missing_ok=True)
    return found


def _why(home: Path, log: Path) -> str:
    """The last thing the supervisor said."""
    said = log.read_text(errors="replace").rpartition(SAYS)[2].strip() or "the supervisor said nothing."
    return f"The services did not start: {said} Logs: {home / 'logs'}."
