"""Where the services of a home listen: ports chosen once and remembered, and a note of what runs there now."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from infra.locks import held
from infra.services.processes import ProcessId

HOST = "127.0.0.1"
# fmt: off
FIRST_PORTS = {
    "mlflow": 5000, "prefect": 4200, "s3": 8333, "worker": 8080, "postgres": 5432,
    **dict.fromkeys(("s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc"), 9333),
}
# fmt: on
"""Where the search for a free port begins: mostly the servers' own defaults, below what systems hand out by themselves.
`worker` answers whether the worker is healthy; those after `postgres` are SeaweedFS's own."""

Database = Literal["sqlite", "postgres"]
"""What MLflow and Prefect keep their records in."""


class Addresses(BaseModel, frozen=True):
    """Where the pages of a home are, or will be once they run."""

    mlflow_url: str
    prefect_url: str
    s3_url: str

    @property
    def prefect_api_url(self) -> str:
        """What PREFECT_API_URL is set to."""
        return f"{self.prefect_url}/api"

    @property
    def mlflow_page(self) -> str:
        """What to open in a browser: the runs of models rather than the traces of agents."""
        return f"{self.mlflow_url}/#/experiments?workflowType=machine_learning"


class Services(Addresses, frozen=True):
    """Running services. `pid` is their supervisor's, and of their session."""

    pid: int
    database: Database


class Note(BaseModel, frozen=True):
    """What the supervisor leaves in services.json while it runs."""

    supervisor: ProcessId
    addresses: Addresses
    database: Database
    state: Literal["starting", "running"]


def running(home: Path) -> Services | None:
    """The services of `home` if they run and are ready; stale notes of dead ones are ignored. Cheap."""
    note = read_note(home)
    if note is None or note.state != "running" or not note.supervisor.alive():
        return None
    return Services(**note.addresses.model_dump(), pid=note.supervisor.pid, database=note.database)


def for_clients(home: Path) -> dict[str, str]:
    """Variables of a process that talks to the services of `home`; none where they do not run."""
    found = running(home)
    if found is None:
        return {}
    variables = {"PREFECT_API_URL": found.prefect_api_url}
    if found.database != "sqlite":  # results name MLflow's runs, so each database has its own
        variables["PREFECT_LOCAL_STORAGE_PATH"] = str(home / "prefect" / f"storage-{found.database}")
    return variables


def addresses(home: Path) -> Addresses:
    """Where the pages of `home` run or will run: chosen once and remembered, so that links in old runs stay good."""
    note = read_note(home)
    if note is not None and note.supervisor.alive():
        return note.addresses
    with held(home / "ports.lock"):
        return at(_remembered(home) or _choose(home, {}))


def at(ports: dict[str, int]) -> Addresses:
    """The addresses of services that listen on `ports`."""
    return Addresses(**{f"{name}_url": f"http://{HOST}:{ports[name]}" for name in ("mlflow", "prefect", "s3")})


@contextlib.contextmanager
def free_ports(home: Path) -> Iterator[dict[str, int]]:
    """The remembered ports, replaced where somebody else listens there by now; within, no other home chooses them.

    A server takes its port many seconds after it was chosen. Until then a name stands for it that only one process of
    a machine can have, and that goes with the process.
    """
    with held(home / "ports.lock"), contextlib.ExitStack() as claims:
        known = _remembered(home) or {}
        chosen = _choose(home, {name: port for name, port in known.items() if _claimed(port, claims)}, claims)
        claims_of_start = claims.pop_all()
    with claims_of_start:
        yield chosen


def _choose(home: Path, keep: dict[str, int], claims: contextlib.ExitStack | None = None) -> dict[str, int]:
    chosen = dict(keep)
    with contextlib.ExitStack() as until_chosen:
        for name, first in FIRST_PORTS.items():
            if name not in chosen:
                ahead = (port for port in range(first, first + 500) if port not in chosen.values())
                chosen[name] = next(port for port in ahead if _claimed(port, claims or until_chosen))
    write_atomically(home / "ports.json", TypeAdapter(dict[str, int]).dump_json(chosen).decode())
    return chosen


def _remembered(home: Path) -> dict[str, int] | None:
    try:
        found = TypeAdapter(dict[str, int]).validate_json((home / "ports.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return found if found.keys() == FIRST_PORTS.keys() else None


def _claimed(port: int, claims: contextlib.ExitStack) -> bool:
    """Whether the port is free, and now ours until `claims` is closed."""
    claim = claims.enter_context(socket.socket(socket.AF_UNIX))
    try:
        claim.bind(f"\0slimline-port-{port}")  # a name without a file, Linux's own
    except OSError:
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do; TIME_WAIT is no obstacle
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def note_file(home: Path) -> Path:
    """Where the supervisor's note lies."""
    return home / "services.json"


def read_note(home: Path) -> Note | None:
    """What the supervisor noted, which may be dead by now."""
    try:
        return Note.model_validate_json(note_file(home).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Give `path` the contents `text`; readers see the old ones or the new ones."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    with open(draft, "x", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
        stream.write(text)
    draft.replace(path)
