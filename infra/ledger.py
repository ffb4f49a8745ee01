"""What was released, by whom, when and why: entries that are only ever added, each naming the one before by its digest.

MLflow keeps no history of aliases. Entries are small files, `ledger/<model>/<number>.json`, in the release store
(SLIMLINE_RELEASE_STORE, else the store of artifacts, else the home). A file is created only where there is none of its
name, so of several who append at once each gets a number of its own, and nobody's entry is lost.
"""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote, unquote

from pydantic import BaseModel, Field, ValidationError

from infra import s3
from infra.settings import settings

What = Literal["requested", "approved", "refused", "started", "interrupted", "failed", "promoted", "rolled back"]


class Entry(BaseModel, frozen=True, extra="forbid"):
    """One thing that happened to the releases of a model.

    Attributes:
        number: 1, 2, 3, ... per model.
        who: as they named themselves.
        version: of the registered model.
        sha256: of its bundle.
        why: in people's words, or the reason of a refusal or failure.
        request: the number of the request that this answers or carries out.
        replaces: the champion at that time; None: there was none.
        aim: of a start: what it becomes when it goes well.
        copy_sha256: the name of the copy of all the version's files in the release store.
        expires_at: of a request: approvals after it do not count.
        two_person: of a request: who asked may not approve.
        process: who works on a start: host, process id and its start.
        flow_run: of Prefect.
        id: tells entries apart that are otherwise the same.
        previous: the digest of the entry before; empty for the first.
        digest: SHA-256 of all the rest.
    """

    model: str
    number: int = Field(ge=1)
    time: datetime
    who: str
    what: What
    version: str
    sha256: str = ""
    why: str = ""
    request: int | None = None
    replaces: str | None = None
    aim: Literal["promoted", "rolled back"] | None = None
    copy_sha256: str = ""
    expires_at: datetime | None = None
    two_person: bool = False
    process: str = ""
    flow_run: str = ""
    id: str
    previous: str
    digest: str = ""

    def computed_digest(self) -> str:
        """What `digest` must be."""
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class BrokenLedger(ValueError):
    """An entry is missing, changed or not where it belongs; the message names the first."""


def append(model: str, *, who: str, what: What, version: str, **more: Any) -> Entry:
    """The new last entry; others who append at the same time get other numbers.

    Args:
        more: other attributes of `Entry`.

    Raises:
        BrokenLedger: what is there is not whole.
        ConnectionError, OSError: the store.
    """
    while True:
        if added := append_after(entries(model), model, who=who, what=what, version=version, **more):
            return added


def append_after(known: list[Entry], model: str, *, who: str, what: What, version: str, **more: Any) -> Entry | None:
    """The new entry right after those `known`; None: somebody else has added one, so look again before you decide."""
    last = known[-1] if known else None
    entry = Entry(
        model=model,
        number=last.number + 1 if last else 1,
        time=datetime.now(UTC),
        who=who,
        what=what,
        version=version,
        id=uuid.uuid4().hex,
        previous=last.digest if last else "",
        **more,
    )
    entry = entry.model_copy(update={"digest": entry.computed_digest()})
    content = json.dumps(entry.model_dump(mode="json"), indent=1).encode()
    return entry if _shelf(model).create(entry.number, content) else None


def entries(model: str) -> list[Entry]:
    """All entries of a model in order, none of them changed; empty: nothing was ever released.

    That the last ones were taken away cannot be seen from the others: compare with a digest that is kept elsewhere.

    Raises:
        BrokenLedger: see there.
    """
    shelf = _shelf(model)
    numbers = sorted(shelf.numbers())
    for expected, number in enumerate(numbers, 1):
        if number != expected:
            raise BrokenLedger(f"Entry {expected} of the ledger of {model} is missing: {shelf.name(expected)}.")
    found: list[Entry] = []
    for number, content in zip(numbers, shelf.read(numbers), strict=True):
        where = shelf.name(number)
        try:
            entry = Entry.model_validate_json(content or b"")
        except ValidationError:
            raise BrokenLedger(f"Entry {number} of the ledger of {model} is none: {where}.") from None
        if entry.digest != entry.computed_digest() or (entry.model, entry.number) != (model, number):
            raise BrokenLedger(f"Entry {number} of the ledger of {model} was changed: {where}.")
        if entry.previous != (found[-1].digest if found else ""):
            before = f"entry {number - 1} was changed" if found else "it is not the first"
            raise BrokenLedger(
                f"Entry {number} of the ledger of {model} does not follow from what is before it: {before}; {where} "
                "names another digest."
            )
        found.append(entry)
    return found


def models() -> list[str]:
    """All models that have a ledger."""
    root = release_store()
    if root.startswith("s3://"):
        names: Iterable[str] = (name.partition("/")[0] for name in s3.names(f"{root}/ledger"))
    else:
        folder = Path(root) / "ledger"
        names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted({unquote(name) for name in names})


def release_store() -> str:
    """Where ledgers and the bytes of champions are kept: s3://BUCKET/PREFIX, or a directory."""
    return settings().release_store or settings().store or str(settings().home)


class _Shelf(Protocol):
    """Where the entries of one model lie."""

    def numbers(self) -> Iterable[int]: ...

    def read(self, numbers: list[int]) -> list[bytes | None]: ...

    def create(self, number: int, content: bytes) -> bool:
        """Whether the entry is there now; False: another one of its number is."""

    def name(self, number: int) -> str: ...


def _shelf(model: str) -> _Shelf:
    if model in ("", ".", ".."):
        raise ValueError(f"A ledger belongs to a registered model; {model!r} is the name of none.")
    root, name = release_store(), quote(model, safe=" ")
    if root.startswith("s3://"):
        return _Prefix(f"{root}/ledger/{name}")
    return _Folder(Path(root) / "ledger" / name)


def _numbers(names: Iterable[str]) -> list[int]:
    """Files of other names are nobody's entries."""
    return [int(stem) for name in names if (stem := name.removesuffix(".json")).isdecimal() and name != stem]


@dataclass(frozen=True)
class _Folder:
    path: Path

    def numbers(self) -> list[int]:
        return _numbers(path.name for path in self.path.iterdir()) if self.path.is_dir() else []

    def read(self, numbers: list[int]) -> list[bytes | None]:
        return [(self.path / f"{number}.json").read_bytes() for number in numbers]

    def create(self, number: int, content: bytes) -> bool:
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.path, prefix=".") as draft:
            draft.write(content)
            draft.flush()
            os.fchmod(draft.fileno(), 0o444)
            os.fsync(draft.fileno())
            try:
                os.link(draft.name, self.path / f"{number}.json")  # whole, or not at all
            except FileExistsError:
                return False
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return True

    def name(self, number: int) -> str:
        return str(self.path / f"{number}.json")


@dataclass(frozen=True)
class _Prefix:
    uri: str

    def numbers(self) -> list[int]:
        return _numbers(s3.names(self.uri))

    def read(self, numbers: list[int]) -> list[bytes | None]:
        with s3.Transfers() as transfers:
            return transfers.each_file(lambda number: s3.read(self.name(number)), numbers)

    def create(self, number: int, content: bytes) -> bool:
        return s3.create(self.name(number), content)

    def name(self, number: int) -> str:
        return f"{self.uri}/{number}.json"
