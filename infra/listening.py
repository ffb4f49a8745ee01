"""The socket that a server of ours listens on."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on which clients wait, rather than be refused, from here on; closed afterwards.

    Raises:
        OSError: the port is taken.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; name another with --port", f"{host}:{port}") from error
        listener.listen()
        yield listener
