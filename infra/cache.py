"""Copies of a remote store's artifacts on this machine, up to a size. What a running process uses stays.

* artifacts/<sha256>/: manifest.json and files/, which are hard links to
* blobs/<sha256>: files by their content, so that artifacts that share files hold them once
* partial/<sha256>: files on their way, with the list of their parts
* users/: what each process uses; its file is held while it runs
"""

import fcntl
import functools
import itertools
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

from infra.locks import held, is_held

logger = logging.getLogger(__name__)

COMPARED_BYTES = 2**20
"""Smaller files are hashed in less time than it takes to look for one that is the same."""
BLOCK_BYTES = 2**18
"""Two of these stay in a core's cache while they are compared."""
NUM_LOOKS = 32


@dataclass(frozen=True)
class Cache:
    """A directory of copies. Artifacts and blobs go by their SHA-256."""

    root: Path
    limit_bytes: float

    def artifact(self, sha256: str) -> Path:
        """Where the copy of an artifact is, or would be."""
        return self.root / "artifacts" / sha256

    def blob(self, sha256: str) -> Path:
        """Where a file of this content is, or would be."""
        return self.root / "blobs" / sha256

    def partial(self, sha256: str) -> Path:
        """Where a file of this content is while it is not whole."""
        return self.root / "partial" / sha256

    def use(self, *names: str) -> None:
        """Keep artifacts and blobs of these names, there already or not, until this process ends."""
        with held(self.root / "lock"):
            user = _user(self.root, os.getpid())
            user.write("".join(f"{name}\n" for name in names))
            user.flush()

    def digest_of(self, file: Path) -> str | None:
        """The SHA-256 of a large `file`, if a blob here has the very same bytes: comparing them is faster than hashing.

        A blob was compared with its name when it came here.
        """
        size = file.stat().st_size
        if size < COMPARED_BYTES:
            return None
        blobs = [(facts.st_mtime, blob) for blob in _entries(self.root / "blobs") if (facts := _facts(blob, size))]
        # Models of one shape have one size; a look at a few places tells nearly all of them apart.
        places = range(0, size, max(1, size // NUM_LOOKS))
        alike = (blob for _, blob in sorted(blobs, reverse=True)[:NUM_LOOKS] if _are_same(file, blob, places, 4096))
        for blob in itertools.islice(alike, 2):
            if _are_same(file, blob, range(0, size, BLOCK_BYTES), BLOCK_BYTES):
                return blob.name
        return None

    def keep(
        self, directory: Path, sha256: str, manifest: bytes, files: Mapping[str, str], whole: Callable[[], bool]
    ) -> None:
        """Move a published `directory` here.

        Args:
            files: the digests of its files by their paths.
            whole: whether the artifact is here already, every file of it.
        """
        self.use(sha256, *files.values())
        for path, digest in files.items():
            file, blob = directory / path, self.blob(digest)
            file.chmod(0o444)
            blob.parent.mkdir(parents=True, exist_ok=True)
            try:
                blob.hardlink_to(file)
            except FileExistsError:
                draft = file.with_name(f"{file.name}.link")
                draft.hardlink_to(blob)
                replaced = file.open("rb", buffering=0)
                draft.replace(file)
                # The room of a large file is given back when it is closed, which takes a while: nobody waits for that.
                threading.Thread(target=replaced.close).start()
                draft.unlink(missing_ok=True)  # a rename onto another link to the same file does nothing
        self._place(directory, sha256, manifest, whole)

    def assemble(
        self, scratch: Path, sha256: str, manifest: bytes, files: Mapping[str, str], whole: Callable[[], bool]
    ) -> None:
        """Make an artifact of blobs that are here; `scratch` is an empty directory on the same disk."""
        for path, digest in files.items():
            file = scratch / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.hardlink_to(self.blob(digest))
        self._place(scratch, sha256, manifest, whole)

    def _place(self, directory: Path, sha256: str, manifest: bytes, whole: Callable[[], bool]) -> None:
        """Let an artifact appear with all of its files; of two who make the same one, the first wins."""
        place = self.artifact(sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        staged, earlier = (directory.with_name(f"{directory.name}.{name}") for name in ("staged", "earlier"))
        staged.mkdir()
        try:
            (staged / "manifest.json").write_bytes(manifest)
            directory.rename(staged / "files")
            with held(self.root / "lock"):
                if not whole():
                    if place.exists():  # a copy that lost files
                        place.rename(earlier)
                    staged.rename(place)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            shutil.rmtree(earlier, ignore_errors=True)

    def evict(self) -> int:
        """Remove what was used longest ago, until the limit holds; the bytes that gave."""
        with held(self.root / "lock"):
            used = self._used()
            size = total = sum(file.stat().st_size for file in self._files())
            if size <= self.limit_bytes:
                return 0
            size -= self._drop(used, size - self.limit_bytes)  # what killed downloads left goes first
            for place in sorted(_entries(self.root / "artifacts"), key=lambda place: place.stat().st_mtime):
                if size <= self.limit_bytes:
                    break
                if place.name not in used:
                    going = self.root / f"going-{uuid.uuid4().hex}"
                    place.rename(going)
                    shutil.rmtree(going)
                    size -= self._drop(used, size - self.limit_bytes)
        if size > self.limit_bytes:
            logger.warning(
                "running processes use %.1f GiB of copies in %s; SLIMLINE_CACHE_GIB allows %.1f",
                size / 2**30,
                self.root,
                self.limit_bytes / 2**30,
            )
        return total - size

    def _drop(self, used: set[str], wanted_bytes: float) -> int:
        """Remove files that no artifact links to and nobody uses, oldest first; the bytes that gave."""
        given = 0
        for file in sorted(self._files(), key=lambda file: file.stat().st_mtime):
            if given >= wanted_bytes:
                break
            facts = file.stat()
            if facts.st_nlink == 1 and file.name.removesuffix(".parts") not in used:
                file.unlink()
                given += facts.st_size
        return given

    def _files(self) -> list[Path]:
        return [*_entries(self.root / "blobs"), *_entries(self.root / "partial")]

    def _used(self) -> set[str]:
        used: set[str] = set()
        for user in _entries(self.root / "users"):
            if is_held(user):
                used.update(user.read_text().splitlines())
            else:
                user.unlink()
        return used


@functools.cache
def _user(root: Path, pid: int) -> TextIOWrapper:
    """Where this process notes what it uses. Called under the cache's lock, so that none takes it for a dead one's."""
    (root / "users").mkdir(exist_ok=True)
    user = (root / "users" / f"{pid}-{uuid.uuid4().hex}").open("w")
    fcntl.flock(user, fcntl.LOCK_EX)
    return user


def _facts(blob: Path, size: int) -> os.stat_result | None:
    """What is known of a blob if it has this size."""
    try:
        facts = blob.stat()
    except FileNotFoundError:  # evicted a moment ago
        return None
    return facts if facts.st_size == size else None


def _are_same(one: Path, other: Path, places: Iterable[int], length: int) -> bool:
    """Whether two files have the same bytes at these places, `length` each or up to the end."""
    first, second = bytearray(length), bytearray(length)
    try:
        with one.open("rb", buffering=0) as a, other.open("rb", buffering=0) as b:
            return all(
                os.preadv(a.fileno(), [first], at) == os.preadv(b.fileno(), [second], at) and first == second
                for at in places
            )
    except FileNotFoundError:  # evicted a moment ago
        return False


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.exists() else []
