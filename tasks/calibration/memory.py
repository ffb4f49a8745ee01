"""Memory that is held for nothing, given back to the system."""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MADV_DONTNEED = 4
DROP_EVERY_S = 0.05


def trim() -> None:
    """Make the C library return what it holds of freed memory.

    glibc keeps freed pieces of up to 32 MiB, which activations are cut into: a third of a GiB after one block of 1.1B
    parameters in 22. Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # musl has none
            libc.malloc_trim(0)


@contextmanager
def dropping_pages(file: Path) -> Iterator[None]:
    """Inside, what is read of a file through a read-only mapping does not stay in this process's memory for long.

    For a library that maps a model's weights and copies them, whose process would otherwise hold both. A page that is
    touched again is mapped again, out of the system's cache as a rule. Elsewhere than on Linux nothing happens.
    The caller keeps what maps the file alive meanwhile: addresses that were given back may hold other memory.
    """
    ended = threading.Event()

    def drop_until_the_end() -> None:
        while not ended.wait(DROP_EVERY_S):
            drop_pages(file)

    thread = threading.Thread(target=drop_until_the_end, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        drop_pages(file)


def drop_pages(file: Path) -> None:
    """Takes a file's pages out of this process's memory where they are mapped read-only; on Linux."""
    if sys.platform != "linux":
        return
    libc, name = ctypes.CDLL(None), str(file.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, *_, path = line.split(maxsplit=5)
        if path == name and "w" not in rights:  # a page that was written to would be lost
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
