"""A proxy before an HTTP server that loses, damages and counts: real TCP, so that clients meet what networks do."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

BLOCK_BYTES = 2**16


@dataclass
class Exchange:
    """A request and what came of it. Sizes are of bodies, as far as they were passed on."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    sent_bytes: int = 0
    status: int = 0
    received_bytes: int = 0


@dataclass(frozen=True)
class Answer:
    """Answer with this status instead of asking the server."""

    status: int


@dataclass(frozen=True)
class Truncate:
    """End the connection after so many bytes of the answer's body."""

    after_bytes: int


@dataclass(frozen=True)
class Corrupt:
    """Flip the bits of one byte of the body that is sent, or of the answer's."""

    at: int
    of: str = "answer"


@dataclass(frozen=True)
class Cut:
    """End all connections when so many bytes of the body were sent, or of the answer's, and refuse new ones."""

    for_s: float
    after_bytes: int = 0
    of: str = "answer"


@dataclass(frozen=True)
class Slow:
    """Wait before the server is asked."""

    for_s: float


@dataclass(frozen=True)
class LoseAnswer:
    """End the connection when the server has answered, before any of it is passed on."""


Fault = Answer | Truncate | Corrupt | Cut | Slow | LoseAnswer | None


class _Lost(Exception):
    """The connection is to end."""


@dataclass
class FaultProxy:
    """Passes HTTP on to `upstream`. `plan` says what is to happen to a request; `log` is what happened, in order."""

    upstream: str
    plan: Callable[[Exchange], Fault] = lambda _: None
    log: list[Exchange] = field(default_factory=list)
    down_until: float = 0.0

    def __post_init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def cut(self, for_s: float) -> None:
        """End all connections at once and refuse new ones for so long."""
        self.down_until = time.monotonic() + for_s
        with self._lock:
            going, self._open = self._open, set()
        for each in going:
            _reset(each)

    def recover(self) -> None:
        """Pass everything on from now."""
        self.down_until, self.plan = 0.0, lambda _: None

    def close(self) -> None:
        self.down_until = float("inf")
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut(float("inf"))

    def sent_bytes(self, method: str = "PUT") -> int:
        """Of bodies, all together."""
        return sum(each.sent_bytes for each in self.log if each.method == method)

    def received_bytes(self, path: str) -> int:
        """Of answers to GET of what has this in its path, all together."""
        return sum(each.received_bytes for each in self.log if each.method == "GET" and path in each.path)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            if time.monotonic() < self.down_until:
                _reset(client)
                continue
            threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        host = urlsplit(self.upstream)
        try:
            server = socket.create_connection((host.hostname, host.port))
        except OSError:
            _reset(client)
            return
        with self._lock:
            self._open |= {client, server}
        try:
            reader, answers = client.makefile("rb"), server.makefile("rb")
            while self._exchange(client, reader, server, answers):
                pass
        except (OSError, _Lost, ValueError):
            pass
        finally:
            with self._lock:
                self._open -= {client, server}
            _reset(client)
            _reset(server)

    def _exchange(self, client, reader, server, answers) -> bool:  # type: ignore[no-untyped-def]
        """Pass one request and its answer on; whether the connection can take another."""
        first, headers, raw = _head(reader)
        method, target, _ = first.split(" ", 2)
        path, _, query = target.partition("?")
        exchange = Exchange(method, path, query, headers)
        fault = self.plan(exchange)
        self.log.append(exchange)
        if isinstance(fault, Slow):
            time.sleep(fault.for_s)
        if headers.get("expect"):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = int(headers.get("content-length", 0))
        if isinstance(fault, Answer):
            for _ in _blocks(reader, size):
                pass
            exchange.status = fault.status
            client.sendall(f"HTTP/1.1 {fault.status} Fault\r\nContent-Length: 0\r\n\r\n".encode())
            return True
        server.sendall(b"".join(line for line in raw if not line.lower().startswith(b"expect:")))
        for block in self._spoilt(fault, "body", _blocks(reader, size)):
            server.sendall(block)
            exchange.sent_bytes += len(block)
        status, headers, raw = _head(answers)
        exchange.status = int(status.split(" ")[1])
        if isinstance(fault, LoseAnswer):
            raise _Lost
        client.sendall(b"".join(raw))
        bodiless = method == "HEAD" or exchange.status in (204, 304)
        chunked = "chunked" in headers.get("transfer-encoding", "")
        body = _chunks(answers) if chunked else _blocks(answers, int(headers.get("content-length", 0)))
        for block in () if bodiless else self._spoilt(fault, "answer", body):
            client.sendall(block)
            exchange.received_bytes += len(block)
        return True

    def _spoilt(self, fault: Fault, side: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
        passed = 0
        for block in blocks:
            end = passed + len(block)
            if isinstance(fault, Truncate) and side == "answer" and end > fault.after_bytes:
                yield block[: fault.after_bytes - passed]
                raise _Lost
            if isinstance(fault, Cut) and side == fault.of and end > fault.after_bytes:
                self.cut(fault.for_s)
                raise _Lost
            if isinstance(fault, Corrupt) and side == fault.of and passed <= fault.at < end:
                at = fault.at - passed
                block = block[:at] + bytes([block[at] ^ 0xFF]) + block[at + 1 :]
            yield block
            passed = end


def _head(stream) -> tuple[str, dict[str, str], list[bytes]]:  # type: ignore[no-untyped-def]
    raw = []
    while (line := stream.readline()) not in (b"\r\n", b""):
        raw.append(line)
    if not line:
        raise _Lost
    pairs = (text.decode("latin-1").partition(":") for text in raw[1:])
    return raw[0].decode("latin-1").strip(), {k.strip().lower(): v.strip() for k, _, v in pairs}, [*raw, line]


def _blocks(stream, size: int) -> Iterator[bytes]:  # type: ignore[no-untyped-def]
    while size:
        block = stream.read1(min(size, BLOCK_BYTES))
        if not block:
            raise _Lost
        size -= len(block)
        yield block


def _chunks(stream) -> Iterator[bytes]:  # type: ignore[no-untyped-def]
    """A chunked body, as it is on the wire."""
    while True:
        line = stream.readline()
        yield line
        size = int(line.split(b";")[0], 16)
        yield from _blocks(stream, size + 2)
        if not size:
            return


def _reset(connection: socket.socket) -> None:
    """End a connection as a lost network or a killed server does, not politely."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy before the server at `upstream`, until the end of the block."""
    proxy = FaultProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
