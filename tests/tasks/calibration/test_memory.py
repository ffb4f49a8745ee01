"""Pages of mapped files leave the process and come back, and nothing that was written is lost."""

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks.calibration.memory import drop_pages, dropping_pages

MIB = 2**20
SIZE = 64 * MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Mapped files are read from /proc.")


def resident_file_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


def mapped(file: Path, access: int) -> np.ndarray:
    with file.open("r+b") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=access), np.uint8)


def test_what_is_read_of_a_mapped_file_does_not_stay_in_memory_and_can_be_read_again(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes([7]) * SIZE)
    weights = mapped(file, mmap.ACCESS_READ)
    before = resident_file_bytes()

    with dropping_pages(file):
        assert weights.sum(dtype=np.int64) == 7 * SIZE
    after = resident_file_bytes()

    assert after - before < 8 * MIB
    assert weights.sum(dtype=np.int64) == 7 * SIZE
    assert resident_file_bytes() - before > SIZE - 8 * MIB


def test_a_page_that_was_written_to_stays(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    with file.open("r+b") as stream:
        private = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    private[:4] = b"kept"

    drop_pages(file)

    assert private[:4] == b"kept"
