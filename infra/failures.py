"""What a flow stands on: its disk, its servers. Their failures say nothing about a candidate, so they end the flow."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from infra.settings import settings, shown

FULL = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EFBIG: "A file may not grow any further (`ulimit -f` shows the limit)",
}
BROKEN = {
    errno.EIO: "The disk fails; the system's log says more.",
    errno.ESTALE: "The disk went away; mount it again.",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`).",
    errno.ENFILE: "Raise the system's limit of open files, or end what holds them.",
}
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Below the home they are our surroundings' fault; of any other file, that of what was asked for."""
MIN_FREE_BYTES = 2**20
"""Less than this left counts as full where a library does not say why it could not write."""
START_BYTES = 8 * 2**20
"""Of the databases of a home; without room for them their libraries try again for minutes."""
# What libraries without Python's errors say: Rust's and SQLite's words.
SAID = {
    "No space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "attempt to write a readonly database": errno.EROFS,
    "unable to open database file": errno.EACCES,
    "disk I/O error": errno.EIO,
}
SILENT = ("ConnectionError", "Timeout", "TimeoutError", "RetryError", "ConnectError", "ConnectTimeout", "ReadTimeout")
SERVERS = {
    "requests": "The tracking server (MLflow)",
    "httpx": "The Prefect server",
    "botocore": "The object store",
    "redis": "The lock server (Redis)",
}
"""Whom Slimline's own process talks to through these libraries."""
LOCKED = "database is locked"
"""SQLite's word for a database that another process has been writing for longer than it waits."""
AGAIN = "Run the same command again then: finished stages are kept."


class InfrastructureError(Exception):
    """The disk or a server failed; the message says which and what to do. Not a `StageError`: it ends the flow."""


def explain(error: BaseException, near: Path, *, servers: bool = True) -> str | None:
    """What of the surroundings an error comes from, and what to do, in sentences; None: from something else.

    Args:
        error: with all that led to it.
        near: where was written, for errors that name no file.
        servers: whether the failing process talks to any.
    """
    for each in _chain(error):
        if isinstance(each, InfrastructureError) or type(each) is ConnectionError:  # it says all already
            return str(each)
        number, file = _errno_of(each)
        if number in FULL:
            return _full(number, file, near)
        if number in BROKEN:
            return f"{os.strerror(number)}: {file or near}. {BROKEN[number]} {AGAIN}"
        home = settings().home
        in_words = not isinstance(each, OSError)  # of a database, and those lie in the home
        if number in REFUSED and (in_words if file is None else file.is_relative_to(home)):
            where = f" ({file})" if file else ""
            return (
                f"{home} cannot be used: {os.strerror(number)}{where}. Let this user write there, or set SLIMLINE_HOME "
                f"to another directory. {AGAIN}"
            )
    if servers and (said := silent_server(error) or refusal(error)):
        return said
    if not isinstance(error, ValueError) and is_full(near):
        return _full(errno.ENOSPC, None, near)
    return None


def is_full(near: Path) -> bool:
    """Whether nothing of use can be written any more on the disk that holds `near`, or would."""
    return _free_bytes(near) < MIN_FREE_BYTES


def require_room(home: Path) -> None:
    """Refuses to begin where not even the databases have room.

    Raises:
        InfrastructureError: the disk is full.
    """
    if _free_bytes(home) < START_BYTES:
        raise InfrastructureError(_full(errno.ENOSPC, None, home))


def _full(number: int, file: Path | None, near: Path) -> str:
    home = settings().home
    place = file.parent if file else min((near, Path(tempfile.gettempdir())), key=_free_bytes)
    place = home if place.is_relative_to(home) else _existing(place)
    where = f" at {file}" if file else ""
    left = f"{_free_bytes(place) / 2**20:,.1f} MiB are free at {place}"
    more = ", and more was to be written" if number == errno.ENOSPC else ""  # what was half of it may be gone by now
    return (
        f"{FULL[number]}{where}; {left}{more}. Free some, or set SLIMLINE_HOME to a larger disk "
        f"(`slimline check` says how much a recipe needs). {AGAIN}"
    )


def _free_bytes(place: Path) -> int:
    return shutil.disk_usage(_existing(place)).free


def _existing(place: Path) -> Path:
    return next((path for path in (place, *place.parents) if path.exists()), Path("/"))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, the last first."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _errno_of(error: BaseException) -> tuple[int | None, Path | None]:
    """The system's number of an error, also where a library only says it in words, and the file where one is named."""
    if isinstance(error, OSError) and error.errno is not None:
        named = isinstance(error.filename, str | os.PathLike)
        return error.errno, Path(error.filename).absolute() if named else None
    said = str(error)
    return next((number for words, number in SAID.items() if words in said), None), None


def refusal(error: BaseException) -> str | None:
    """That MLflow does not let this process in, if an error comes from that, in sentences."""
    for each in _chain(error):
        if not type(each).__module__.startswith("mlflow."):
            continue
        said = str(each)
        if "Invalid Host header" in said:
            return (
                f"{SERVERS['requests']} at {settings().tracking_uri} does not answer to that name. Name it, with its "
                "port, in the server's MLFLOW_SERVER_ALLOWED_HOSTS, or use another address. `slimline doctor` tries it."
            )
        if "error code 401" in said or "not authenticated" in said:
            return (
                f"{SERVERS['requests']} at {settings().tracking_uri} does not know this user and password. Set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account's. `slimline doctor` tries them."
            )
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same may go well a little later: a server or store did not answer, a database was in use."""
    return any(type(each) is ConnectionError for each in _chain(error)) or silent_server(error) is not None


def silent_server(error: BaseException) -> str | None:
    """That a server, or a database, does not answer, if an error comes from that, in sentences."""
    chain = list(_chain(error))
    packages = {type(each).__module__.partition(".")[0] for each in chain}
    if "huggingface_hub" in packages:  # it speaks httpx too, and says itself what is wrong
        return None
    if any(LOCKED in str(each) for each in chain):
        return (
            f"The database of {settings().home} was in use by other processes for too long. Where many run at once, "
            f"let them talk to servers: `slimline up`. {AGAIN}"
        )
    for each in chain:
        for kind in type(each).__mro__:
            package = kind.__module__.partition(".")[0]
            if package in SERVERS and kind.__name__ in (*SILENT, "EndpointConnectionError", "ConnectTimeoutError"):
                address = re.search(r"https?://[^/\s'\"]+", " ".join(map(str, chain)))
                where = f" {shown(address[0])}" if address else ""
                return f"{SERVERS[package]}{where} does not answer. Start it again, or check its address. {AGAIN}"
    return None
