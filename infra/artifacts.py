"""Immutable directories, named by what they contain: what stages pass to each other instead of models."""

import hashlib
import json
import logging
import shutil
import tempfile
from pathlib import Path

from pydantic import BaseModel

from infra.settings import settings

logger = logging.getLogger(__name__)


class File(BaseModel, frozen=True, extra="forbid"):
    """One file of an artifact."""

    path: str
    size_bytes: int
    sha256: str


class Artifact(BaseModel, frozen=True, extra="forbid"):
    """A directory in the store."""

    uri: str
    sha256: str
    size_bytes: int

    @property
    def path(self) -> Path:
        """The local directory of its files. Never write into it."""
        return Path(self.uri.removeprefix("file://")) / "files"

    @property
    def manifest(self) -> Path:
        """The list of its files, as JSON; its digest is the artifact's name."""
        return Path(self.uri.removeprefix("file://")) / "manifest.json"


class CorruptArtifact(ValueError):
    """The files of an artifact are not those its name promises."""


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _manifest(directory: Path) -> bytes:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    if not files:
        raise ValueError(f"An artifact needs at least one file; {directory} holds none.")
    entries = [
        File(path=p.relative_to(directory).as_posix(), size_bytes=p.stat().st_size, sha256=_digest(p)) for p in files
    ]
    return json.dumps([e.model_dump() for e in entries], indent=1).encode()


def files(artifact: Artifact) -> list[File]:
    """What the artifact's manifest lists."""
    return [File.model_validate(entry) for entry in json.loads(artifact.manifest.read_bytes())]


def new_directory() -> Path:
    """An empty directory to fill and publish, on the store's file system, so that publishing is a rename."""
    scratch = settings().home / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=scratch))


def publish(directory: Path) -> Artifact:
    """Move `directory` into the store under the digest of its contents.

    The same contents give the same artifact, stored once; readers never see half of one, because the last step is a
    rename. `directory` is gone afterwards.
    """
    manifest = _manifest(directory)
    sha256 = hashlib.sha256(manifest).hexdigest()
    place = settings().home / "artifacts" / sha256
    size_bytes = sum(entry["size_bytes"] for entry in json.loads(manifest))
    artifact = Artifact(uri=f"file://{place}", sha256=sha256, size_bytes=size_bytes)
    if exists(artifact):
        shutil.rmtree(directory)
        return artifact
    staged = new_directory()
    try:
        directory.rename(staged / "files")
        (staged / "manifest.json").write_bytes(manifest)
        for file in (staged / "files").rglob("*"):
            if file.is_file():
                file.chmod(0o444)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():  # an earlier copy lost files; verify() or exists() found out
            shutil.rmtree(place)
        staged.rename(place)
    except OSError:
        shutil.rmtree(staged, ignore_errors=True)
        if not exists(artifact):  # somebody else published the same contents a moment ago, or the disk is full
            raise
    logger.info("published %s, %.1f MiB", sha256[:12], size_bytes / 2**20)
    return artifact


def exists(artifact: Artifact) -> bool:
    """Whether every file is there with its size. Cheap; `verify` reads every byte."""
    try:
        return all((artifact.path / f.path).stat().st_size == f.size_bytes for f in files(artifact))
    except (OSError, ValueError):
        return False


def verify(artifact: Artifact) -> None:
    """Read every byte and compare it with the artifact's name.

    Raises:
        CorruptArtifact: a file is missing, changed or added; the message names it.
    """
    try:
        listed = artifact.manifest.read_bytes()
    except OSError as error:
        raise CorruptArtifact(f"Artifact {artifact.sha256[:12]} is not in the store: {error}.") from None
    if hashlib.sha256(listed).hexdigest() != artifact.sha256:
        raise CorruptArtifact(f"The manifest of artifact {artifact.sha256[:12]} was changed: {artifact.manifest}.")
    expected = {f.path: f for f in files(artifact)}
    found = {p.relative_to(artifact.path).as_posix(): p for p in artifact.path.rglob("*") if p.is_file()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CorruptArtifact(f"Artifact {artifact.sha256[:12]} lost its file {name}. Run the stage again.")
        if name not in expected:
            raise CorruptArtifact(f"Artifact {artifact.sha256[:12]} has a file that was never published: {name}.")
        if _digest(found[name]) != expected[name].sha256:
            raise CorruptArtifact(
                f"File {name} of artifact {artifact.sha256[:12]} was changed. "
                f"Delete {artifact.path.parent} and run again."
            )
