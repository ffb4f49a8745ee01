"""Memory that was freed, given back to the system."""

import ctypes
import sys


def trim() -> None:
    """Make the C library return what it holds of freed memory.

    glibc keeps freed pieces of up to 32 MiB, which activations are cut into: a third of a GiB after one block of 1.1B
    parameters in 22. Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # musl has none
            libc.malloc_trim(0)
