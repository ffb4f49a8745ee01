"""The Prefect server inside a flow's process, where no other runs: it neither ends before the flow nor outlives it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from infra.locks import held
from infra.settings import settings

STOP_TIMEOUT_S = 15.0


def begin_inner_server() -> Callable[[], None]:
    """Begin to start the Prefect server inside this process's flows, if they use one. Call the result before the first.

    It takes as long as the imports that a flow needs, and may do so beside them.

    Raises:
        RuntimeError: from the result: the server did not start.
    """
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return lambda: None
    failures: list[Exception] = []

    def start() -> None:
        try:
            _start()
        except Exception as error:  # noqa: BLE001  raised where it is waited for
            failures.append(error)

    starting = threading.Thread(target=start, daemon=True)
    starting.start()

    def wait() -> None:
        starting.join()
        if failures:
            raise failures[0]

    return wait


def start_inner_server() -> None:
    """The same, and wait for it."""
    begin_inner_server()()


def _start() -> None:
    """Start it so that Ctrl-C does not reach it.

    A terminal sends SIGINT to all processes in the foreground. Without its server the flow cannot record how it ended:
    Prefect then waits for a minute and prints what it could not send. A blocked signal stays blocked in a child; the
    server ends by SIGTERM, which Prefect sends when this process exits.
    """
    from prefect.server.api.server import SubprocessASGIServer

    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    server = SubprocessASGIServer()
    try:
        with held(settings().home / "prefect.lock"):  # two at once would both create the tables of a new database
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
