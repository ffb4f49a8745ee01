"""Locks that go with whoever holds them: files on one machine, and keys in Redis between several.

The kernel unlocks a file when its holder ends, also by SIGKILL. A key in Redis (SLIMLINE_REDIS_URL) expires unless its
holder renews it, so that of a machine that went away is free again after `TTL_S`.
"""

import fcntl
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from infra.settings import settings

if TYPE_CHECKING:
    import redis
    from redis.lock import Lock

logger = logging.getLogger(__name__)

TTL_S = 30.0
"""Of a lock in Redis that is not renewed."""
PREFIX = "slimline:lock:"
Waiting = Callable[[str], None]
"""Is told once who holds the lock when it has to be waited for."""


@contextmanager
def held(path: Path, on_wait: Waiting | None = None) -> Iterator[Path]:
    """Within, the caller alone holds the file `path`, which is created empty where there is none; others wait.

    The holder may write into it or delete it; one who waited for a deleted file takes the next of its name.

    Args:
        path: of the file.
        on_wait: called with what the file says when another has it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait:
                    on_wait(os.pread(descriptor, 1000, 0).decode() or "another process")
                    on_wait = None
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, path):
                continue
            yield path
            return
        finally:
            os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether some process, this one included, holds `path` at the moment."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # of several who look, none takes another for a holder
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@contextmanager
def held_everywhere(name: str, on_wait: Waiting) -> Iterator[None]:
    """Within, the lock of this name is held here and nowhere else that shares this home, or this Redis.

    Work under it has to bear being done twice: a lock in Redis is lost when its holder cannot reach Redis for `TTL_S`.

    Args:
        name: of the lock.
        on_wait: called with the holder's name when another process has it.
    """
    if url := settings().redis_url:
        with held_in_redis(_redis(url.get_secret_value()), name, on_wait):
            yield
    else:
        with held_file(settings().home / "locks" / name, on_wait):
            yield


def holder_of(name: str) -> str | None:
    """Who holds the lock of this name at the moment; None: nobody."""
    if url := settings().redis_url:
        server = _redis(url.get_secret_value())
        return _holder(server, name) if server.exists(f"{PREFIX}{name}") else None
    path = settings().home / "locks" / name
    if not is_held(path):
        return None
    with suppress(FileNotFoundError):
        return path.read_text() or "another process"
    return None


@contextmanager
def held_file(path: Path, on_wait: Waiting) -> Iterator[None]:
    """Within, `path` is held and says by whom; afterwards it is gone."""
    with held(path, on_wait):
        try:
            path.write_text(_own_name())
            yield
        finally:
            path.unlink(missing_ok=True)


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@cache
def _redis(url: str) -> "redis.Redis":
    import redis
    from redis.backoff import ExponentialWithJitterBackoff
    from redis.retry import Retry

    again = Retry(ExponentialWithJitterBackoff(base=0.2, cap=5), retries=6)
    return redis.Redis.from_url(url, retry=again, socket_timeout=10, socket_connect_timeout=10)


@contextmanager
def held_in_redis(server: "redis.Redis", name: str, on_wait: Waiting, *, ttl_s: float = TTL_S) -> Iterator[None]:
    """Within, the key of this name is ours in Redis, and renewed three times in `ttl_s`."""
    lock = server.lock(f"{PREFIX}{name}", timeout=ttl_s, sleep=0.5, thread_local=False)
    token = f"{_own_name()} {uuid.uuid4().hex}"
    if not lock.acquire(blocking=False, token=token):
        on_wait(_holder(server, name))
        lock.acquire(blocking=True, token=token)
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=[lock, token, name, ttl_s / 3, ended], daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        _release(lock, name)


def _holder(server: "redis.Redis", name: str) -> str:
    value = server.get(f"{PREFIX}{name}")
    return value.decode().rpartition(" ")[0] if isinstance(value, bytes) else "another process"


def _renew(lock: "Lock", token: str, name: str, interval_s: float, ended: threading.Event) -> None:
    from redis.exceptions import LockError, RedisError

    while not ended.wait(interval_s):
        try:
            lock.reacquire()
        except LockError:
            if lock.acquire(blocking=False, token=token):  # it had expired, or Redis began anew; nobody took it
                continue
            logger.warning("the lock %s was lost; another process may do the same work beside this one", name)
            return
        except RedisError as error:
            logger.warning("the lock %s could not be renewed and is tried again: %s", name, error)


def _release(lock: "Lock", name: str) -> None:
    from redis.exceptions import LockError, RedisError

    try:
        lock.release()
    except LockError:
        logger.warning("the lock %s was another's at the end", name)
    except RedisError as error:  # the work is done; the key expires by itself
        logger.warning("the lock %s could not be given back and expires by itself: %s", name, error)
