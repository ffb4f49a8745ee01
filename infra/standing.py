"""What the entries of a ledger say together: who waits for approval, who was champion, what is under way."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple, cast

from infra.ledger import Entry

Answer = Literal["open", "approved", "done"]


class Request(NamedTuple):
    """A request and what became of it so far; one that was carried out, refused or failed is done."""

    entry: Entry
    state: Answer

    @property
    def is_expired(self) -> bool:
        """Whether approvals come too late."""
        return self.entry.expires_at is not None and datetime.now(UTC) >= self.entry.expires_at


def requests(known: Sequence[Entry]) -> list[Request]:
    """All requests, in order."""
    states = {entry.number: "open" for entry in known if entry.what == "requested"}
    for entry in known:
        if entry.request in states and entry.what in ("approved", "refused", "promoted", "failed"):
            states[entry.request] = "approved" if entry.what == "approved" else "done"
    return [Request(known[number - 1], cast(Answer, state)) for number, state in states.items()]


def champions(known: Sequence[Entry]) -> list[str]:
    """The champions that a rollback could go back to, and at the end the present one.

    Going back to one takes those after it away: a version that was rolled back from is nobody's `previous`.
    """
    found: list[str] = []
    for entry in known:
        if entry.what not in ("promoted", "rolled back"):
            continue
        if not found and entry.replaces:  # set before there was a ledger
            found.append(entry.replaces)
        if entry.what == "rolled back" and entry.version in found:
            found = found[: found.index(entry.version) + 1]
        else:
            found = [version for version in found if version != entry.version] + [entry.version]
    return found


def copies(known: Sequence[Entry]) -> dict[str, str]:
    """The name of the copy of every champion that there ever was, by version."""
    return {entry.version: entry.copy_sha256 for entry in known if entry.what == "promoted"}


def unfinished(known: Sequence[Entry]) -> Entry | None:
    """The start that nothing came of yet."""
    for entry in reversed(known):
        if entry.what in ("promoted", "rolled back", "failed", "interrupted"):
            return None
        if entry.what == "started":
            return entry
    return None
