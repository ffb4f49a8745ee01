"""Immutable directories, named by what they contain: what stages pass to each other instead of models.

They are kept in a store: the home, or a bucket that several machines share (SLIMLINE_STORE). `publish` puts one in;
`fetch` makes its files be on this machine.

* in a home: <home>/artifacts/<sha256>/ with manifest.json and files/
* in a bucket: the manifest as artifacts/<sha256>.json, and every file by its content as blobs/<sha256>, so that none is
  sent twice
"""

import functools
import hashlib
import json
import logging
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator

from infra import s3
from infra.cache import Cache
from infra.failures import AGAIN, InfrastructureError
from infra.locks import held
from infra.services import ProcessId
from infra.settings import settings

logger = logging.getLogger(__name__)

DEFAULT_CACHE_GIB = 100.0


class File(BaseModel, frozen=True, extra="forbid"):
    """One file of an artifact."""

    path: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        """Manifests come from stores that others write to: no name may lead out of the artifact's directory."""
        parts = path.split("/")
        if PurePosixPath(path).is_absolute() or {"", ".", ".."} & set(parts) or "\\" in path or "\0" in path:
            raise ValueError(f"A file of an artifact must have a plain relative path; got {path!r}.")
        return path


_files = TypeAdapter(list[File])


class Artifact(BaseModel, frozen=True, extra="forbid"):
    """A directory in the store. `uri` is its directory in a home or its manifest in a bucket."""

    uri: str
    sha256: str
    size_bytes: int

    @property
    def path(self) -> Path:
        """The local directory of its files, once `fetch` has returned. Never write into it."""
        return self._place / "files"

    @property
    def manifest(self) -> Path:
        """The list of its files, as JSON, where they are fetched; its digest is the artifact's name."""
        return self._place / "manifest.json"

    @property
    def _place(self) -> Path:
        if self.uri.startswith("file://"):
            return Path(self.uri.removeprefix("file://"))
        return _cache().artifact(self.sha256)


class CorruptArtifact(ValueError):
    """The files of an artifact are not those its name promises."""


class Store(Protocol):
    """Where artifacts are kept."""

    def put(self, directory: Path) -> Artifact:
        """The artifact of `directory`'s contents, in the store; `directory` is gone."""

    def has(self, artifact: Artifact) -> bool:
        """Whether all of its files are there, by their sizes."""

    def get(self, artifact: Artifact) -> Path:
        """The local directory of its files."""

    def verify(self, artifact: Artifact) -> None:
        """Read every byte. Raises CorruptArtifact."""


def store() -> Store:
    """The store that this process publishes to."""
    uri = settings().store
    return Bucket(uri) if uri else Home(settings().home)


def _store_of(artifact: Artifact) -> Store:
    """The store where an artifact is, which earlier settings may have named."""
    if artifact.uri.startswith("file://"):
        return Home(Path(artifact.uri.removeprefix("file://")).parents[1])
    return Bucket(artifact.uri.removesuffix(f"/artifacts/{artifact.sha256}.json"))


def new_directory() -> Path:
    """An empty directory to fill and publish, on the home's file system, so that publishing moves no bytes there."""
    scratch = settings().home / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    own = ProcessId.own()
    return Path(tempfile.mkdtemp(dir=scratch, prefix=f"{socket.gethostname()}~{own.pid}~{own.started_at}~"))


def remove_abandoned() -> int:
    """Remove what killed processes of this machine left of their `new_directory`s; how many that were."""
    abandoned = []
    for path in (settings().home / "scratch").glob(f"{socket.gethostname()}~*~*~*"):
        _, pid, started_at, _ = path.name.split("~")
        if not ProcessId(pid=int(pid), started_at=float(started_at)).alive():
            shutil.rmtree(path, ignore_errors=True)
            abandoned.append(path)
    return len(abandoned)


def publish(directory: Path) -> Artifact:
    """Move `directory` into the store under the digest of its contents.

    The same contents give the same artifact, stored once; readers never see half of one. `directory` is gone
    afterwards; when it fails, `directory` may be published again, and what was sent already is not sent twice.

    Raises:
        InfrastructureError, ConnectionError: the store refuses or does not answer.
    """
    artifact = store().put(directory)
    logger.info("published %s, %.1f MiB", artifact.sha256[:12], artifact.size_bytes / 2**20)
    return artifact


def exists(artifact: Artifact) -> bool:
    """Whether every file is in the store with its size. Cheap; `verify` reads every byte."""
    return _store_of(artifact).has(artifact)


def fetch(artifact: Artifact) -> Path:
    """The local directory of the artifact's files, all of them there: from the cache, or downloaded and checked.

    They stay until this process ends, whatever the cache's limit.

    Raises:
        FileNotFoundError: the artifact is not in the store.
        CorruptArtifact: what is stored is damaged.
        InfrastructureError, ConnectionError: the store refuses or does not answer.
    """
    return _store_of(artifact).get(artifact)


def files(artifact: Artifact) -> list[File]:
    """What the artifact's manifest lists; of one that is not here, after fetching it."""
    return _parse((fetch(artifact).parent / "manifest.json").read_bytes(), artifact)


def verify(artifact: Artifact) -> None:
    """Read every byte in the store, and of a copy that is here, and compare it with the artifact's name.

    Raises:
        CorruptArtifact: a file is missing, changed or added; the message names it.
    """
    _store_of(artifact).verify(artifact)


@dataclass(frozen=True)
class Home:
    """Artifacts as directories below a home; publishing is a rename."""

    root: Path

    def put(self, directory: Path) -> Artifact:
        listed = _manifest([_describe(directory, path) for path in _paths(directory)])
        sha256 = hashlib.sha256(listed).hexdigest()
        place = self.root / "artifacts" / sha256
        artifact = Artifact(uri=f"file://{place}", sha256=sha256, size_bytes=_size(_files.validate_json(listed)))
        if self.has(artifact):
            shutil.rmtree(directory)
            return artifact
        staged = new_directory()
        try:
            directory.rename(staged / "files")
            (staged / "manifest.json").write_bytes(listed)
            for file in (staged / "files").rglob("*"):
                if file.is_file():
                    file.chmod(0o444)
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():  # an earlier copy lost files; verify() or exists() found out
                shutil.rmtree(place)
            staged.rename(place)
        except OSError:
            shutil.rmtree(staged, ignore_errors=True)
            if not self.has(artifact):  # somebody else published the same contents a moment ago, or the disk is full
                raise
        return artifact

    def has(self, artifact: Artifact) -> bool:
        return _is_complete(artifact)

    def get(self, artifact: Artifact) -> Path:
        if not self.has(artifact):
            raise FileNotFoundError(
                f"Artifact {artifact.sha256[:12]} must be in {artifact.path.parent}; it is not, or lost files. Run the "
                "stage again."
            )
        return artifact.path

    def verify(self, artifact: Artifact) -> None:
        _verify_here(artifact)


@dataclass(frozen=True)
class Bucket:
    """Artifacts in S3, with copies on this machine."""

    uri: str

    def put(self, directory: Path) -> Artifact:
        def send(path: Path) -> File:
            found = _describe(directory, path, cache.digest_of(path))
            sent.append(s3.send(transfers, path, self._blob(found.sha256)))
            return found

        cache, sent = _cache(), list[bool]()
        with self._failures(), s3.Transfers() as transfers:
            s3.require_bucket(self.uri)
            found = transfers.each_file(send, _paths(directory))
            listed = _manifest(found)
            sha256 = hashlib.sha256(listed).hexdigest()
            artifact = Artifact(uri=f"{self.uri}/artifacts/{sha256}.json", sha256=sha256, size_bytes=_size(found))
            if s3.size_of(artifact.uri) != len(listed):
                s3.write(artifact.uri, listed)  # last: who reads it finds every blob
        contents = {file.path: file.sha256 for file in found}
        cache.keep(directory, sha256, listed, contents, lambda: _is_complete(artifact))
        cache.evict()
        if any(sent):
            _end_abandoned(self.uri)
        return artifact

    def has(self, artifact: Artifact) -> bool:
        with self._failures():
            try:
                listed = self._listed(artifact)
                found = _parse(listed, artifact)
            except (FileNotFoundError, CorruptArtifact):
                return False
            wanted = {artifact.uri: len(listed)} | {self._blob(file.sha256): file.size_bytes for file in found}
            with s3.Transfers() as transfers:
                return transfers.each_file(s3.size_of, wanted) == list(wanted.values())

    def get(self, artifact: Artifact) -> Path:
        cache = _cache()
        cache.use(artifact.sha256)
        if _is_complete(artifact):
            artifact.path.parent.touch()  # the cache keeps what was used last
            return artifact.path
        with self._failures():
            listed = self._listed(artifact)
            found = _parse(listed, artifact)
            cache.use(*{file.sha256 for file in found})
            with s3.Transfers() as transfers:
                transfers.each_file(lambda file: self._fetch(transfers, file, cache), _distinct(found))
        contents = {file.path: file.sha256 for file in found}
        cache.assemble(new_directory(), artifact.sha256, listed, contents, lambda: _is_complete(artifact))
        cache.evict()
        return artifact.path

    def _fetch(self, transfers: s3.Transfers, file: File, cache: Cache) -> None:
        """Make the file's content a blob of the cache, unless it is."""
        blob = cache.blob(file.sha256)
        if _has_size(blob, file.size_bytes):
            return
        with held(cache.partial(file.sha256)) as partial:
            if _has_size(blob, file.size_bytes):  # another process was faster
                partial.unlink()
                return
            uri, digest = self._blob(file.sha256), s3.Digest("sha256", file.sha256)
            with s3.errors(uri):
                s3.fetch(transfers, uri, partial, file.size_bytes, digest)
            partial.chmod(0o444)
            blob.parent.mkdir(exist_ok=True)
            partial.replace(blob)

    def verify(self, artifact: Artifact) -> None:
        with self._failures():
            try:
                listed = self._listed(artifact, here=False)
            except FileNotFoundError as error:
                raise CorruptArtifact(str(error)) from error
            found = _distinct(_parse(listed, artifact))
            with s3.Transfers() as transfers:

                def check(file: File) -> None:
                    blob = self._blob(file.sha256)
                    digest = s3.digest_of(transfers, blob, file.size_bytes)
                    if digest != file.sha256:
                        lost = "is not in the store" if digest is None else "was changed"
                        raise CorruptArtifact(
                            f"File {file.path} of artifact {artifact.sha256[:12]} {lost}. Delete {blob}, if it is "
                            "there, and run the stage again."
                        )

                transfers.each_file(check, found)
        if artifact.path.exists():
            _verify_here(artifact)

    def _listed(self, artifact: Artifact, *, here: bool = True) -> bytes:
        """The artifact's manifest: of the copy if there is one and `here`, else from the bucket."""
        if here and artifact.manifest.exists():
            listed = artifact.manifest.read_bytes()
            if hashlib.sha256(listed).hexdigest() == artifact.sha256:
                return listed
        found = s3.read(artifact.uri)
        if found is None:
            raise FileNotFoundError(
                f"Artifact {artifact.sha256[:12]} must be in the store; {artifact.uri} does not exist. Run the stage "
                "again."
            )
        if hashlib.sha256(found).hexdigest() != artifact.sha256:
            raise CorruptArtifact(f"The manifest of artifact {artifact.sha256[:12]} was changed: {artifact.uri}.")
        return found

    def _blob(self, sha256: str) -> str:
        return f"{self.uri}/blobs/{sha256}"

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """The store is what the flow stands on: what it refuses ends the flow, not a candidate."""
        try:
            with s3.errors(self.uri):
                yield
        except s3.Damaged as error:
            raise CorruptArtifact(str(error)) from error
        except (PermissionError, s3.NoBucket) as error:
            if error.errno is not None:  # a file of this machine
                raise
            raise InfrastructureError(f"{error} {AGAIN}") from error


@functools.cache
def _end_abandoned(uri: str) -> None:
    """Once in a process, end the uploads that killed ones left unfinished. What keeps it from that fails nobody."""
    try:
        if ended := s3.end_abandoned(f"{uri}/blobs"):
            logger.info("ended %d uploads to %s that nobody went on with", ended, uri)
    except OSError as error:
        logger.warning("uploads to %s that nobody went on with could not be ended: %s", uri, error)


def _cache() -> Cache:
    return Cache(settings().home / "cache", (settings().cache_gib or DEFAULT_CACHE_GIB) * 2**30)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _paths(directory: Path) -> list[Path]:
    """The files of a directory to publish, in order."""
    found = sorted(directory.rglob("*"))
    if links := [path for path in found if path.is_symlink()]:
        raise ValueError(f"An artifact must hold its files itself; {links[0]} is a link. Copy what it leads to.")
    if not (paths := [path for path in found if path.is_file()]):
        raise ValueError(f"An artifact needs at least one file; {directory} holds none.")
    return paths


def _describe(directory: Path, path: Path, sha256: str | None = None) -> File:
    name = path.relative_to(directory).as_posix()
    return File(path=name, size_bytes=path.stat().st_size, sha256=sha256 or _digest(path))


def _manifest(found: Iterable[File]) -> bytes:
    return json.dumps([file.model_dump() for file in found], indent=1).encode()


def _parse(listed: bytes, artifact: Artifact) -> list[File]:
    """The files of a manifest, which may come from a store that others write to."""
    try:
        return _files.validate_json(listed)
    except ValidationError as error:
        first = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise CorruptArtifact(f"The manifest of artifact {artifact.sha256[:12]} is none: {first}") from None


def _size(found: Iterable[File]) -> int:
    return sum(file.size_bytes for file in found)


def _distinct(found: Iterable[File]) -> list[File]:
    """One file of each content."""
    return list({file.sha256: file for file in found}.values())


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        return path.stat().st_size == size_bytes
    except FileNotFoundError:
        return False


def _is_complete(artifact: Artifact) -> bool:
    """Whether all files are on this machine, by their sizes."""
    try:
        found = _files.validate_json(artifact.manifest.read_bytes())
        return all((artifact.path / file.path).stat().st_size == file.size_bytes for file in found)
    except (OSError, ValueError):
        return False


def _verify_here(artifact: Artifact) -> None:
    """Compare every byte on this machine with the artifact's name."""
    try:
        listed = artifact.manifest.read_bytes()
    except OSError as error:
        raise CorruptArtifact(f"Artifact {artifact.sha256[:12]} is not in the store: {error}.") from None
    if hashlib.sha256(listed).hexdigest() != artifact.sha256:
        raise CorruptArtifact(f"The manifest of artifact {artifact.sha256[:12]} was changed: {artifact.manifest}.")
    expected = {file.path: file for file in _parse(listed, artifact)}
    found = {p.relative_to(artifact.path).as_posix(): p for p in artifact.path.rglob("*") if not p.is_dir()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CorruptArtifact(f"Artifact {artifact.sha256[:12]} lost its file {name}. Run the stage again.")
        if name not in expected:
            raise CorruptArtifact(f"Artifact {artifact.sha256[:12]} has a file that was never published: {name}.")
        if found[name].is_symlink() or _digest(found[name]) != expected[name].sha256:
            raise CorruptArtifact(
                f"File {name} of artifact {artifact.sha256[:12]} was changed. "
                f"Delete {artifact.path.parent} and run again."
            )
