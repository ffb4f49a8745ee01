"""Zip files that hold a checkpoint, as some Python packages bring one."""

import zipfile
from pathlib import Path, PurePosixPath


def is_archive(path: Path) -> bool:
    """Whether `path` is a zip file."""
    return path.is_file() and zipfile.is_zipfile(path)


def read_member(archive: Path, name: str, num_bytes: int = -1) -> bytes:
    """The first `num_bytes` of a file in an archive; -1: all.

    Raises:
        ValueError: there is no such file in it.
    """
    with zipfile.ZipFile(archive) as opened:
        if name not in opened.namelist():
            raise ValueError(f"The archive of a checkpoint must have {name} at its top; {archive} has none.")
        with opened.open(name) as member:
            return member.read(num_bytes)


def extract(archive: Path, folder: Path) -> Path:
    """`folder`, with all files of the archive in it.

    Raises:
        ValueError: a name would lie outside of it.
    """
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"The files of an archive must lie in it; {archive} has {name!r}. Do not use it.")
        opened.extractall(folder)
    return folder
