"""What the ledger tells people: the history of a model's releases, and whether that and champions' bytes are whole."""

from typing import NamedTuple

from infra import releases
from infra.artifacts import CorruptArtifact
from infra.ledger import BrokenLedger, Entry, entries, models
from infra.releases import CHAMPION
from infra.signing import Unverified
from infra.standing import champions, copies, requests, unfinished


class Finding(NamedTuple):
    """What looking at one thing showed."""

    said: str
    is_problem: bool = False


def read(model: str) -> list[Entry]:
    """All that happened to a model's releases.

    Raises:
        ValueError: nothing did; the message says of which models there is a ledger.
        BrokenLedger: it is not whole.
    """
    if found := entries(model):
        return found
    raise ValueError(
        f"Nothing was released of {model!r}. There is a ledger of: {', '.join(models()) or 'nothing yet'}."
    )


def lines(known: list[Entry]) -> list[str]:
    """One line per entry; requests say what became of them."""
    states = {
        each.entry.number: "expired" if each.state == "open" and each.is_expired else each.state
        for each in requests(known)
    }
    return [_line(entry, states.get(entry.number)) for entry in known]


def _line(entry: Entry, state: str | None) -> str:
    what = f"{entry.what} ({state})" if state and state != "done" else entry.what
    was = f", which was {entry.replaces}" if entry.what in ("promoted", "rolled back") and entry.replaces else ""
    return (
        f"{entry.number:>4}  {entry.time:%Y-%m-%d %H:%M:%S}Z  {entry.who:<14} {what:<20} version {entry.version}{was}  "
        f"{entry.sha256[:12]}  {entry.why}"
    )


def examine(model: str | None = None) -> list[Finding]:
    """Chain, aliases and every byte of every champion of a model, or of all models that have a ledger.

    Raises:
        ValueError: nothing was released of that model.
    """
    if model is not None and model not in models():
        read(model)
    return [finding for name in ([model] if model else models()) for finding in _examine(name)]


def _examine(model: str) -> list[Finding]:
    try:
        known = entries(model)
    except BrokenLedger as error:
        return [Finding(str(error), True)]
    found = [_chain(model, known), _alias(model, known)]
    for version, copied in copies(known).items():
        found += [_stored(model, version), _copied(model, version, copied)]
    return found


def _chain(model: str, known: list[Entry]) -> Finding:
    told = releases.told_to_registry(model)
    if told and (len(known) < told[0] or known[told[0] - 1].digest != told[1]):
        return Finding(
            f"The ledger of {model} ends at entry {len(known)}; MLflow was told of entry {told[0]} with the digest "
            f"{told[1][:12]}, which is not there.",
            True,
        )
    return Finding(f"ledger of {model}: {len(known)} entries, each following from the one before")


def _alias(model: str, known: list[Entry]) -> Finding:
    champion, stack = releases.holder(model, CHAMPION), champions(known)
    wanted = stack[-1] if stack else None
    going = unfinished(known)
    if going:
        return Finding(
            f"{going.who} started to make version {going.version} of {model} champion, and that was not finished; the "
            f"champion is {champion}. The same command, or a rollback, finishes it.",
            True,
        )
    if champion != wanted:
        return Finding(
            f"The champion of {model} is version {champion}; the ledger says {wanted}. Somebody moved it.", True
        )
    return Finding(f"champion of {model}: version {champion}, as the ledger says")


def _stored(model: str, version: str) -> Finding:
    try:
        releases.verify_stored(model, version)
    except (Unverified, FileNotFoundError) as error:
        return Finding(f"MLflow: {error}", True)
    except ValueError as error:  # the version is gone
        return Finding(str(error), True)
    return Finding(f"version {version} of {model}: every byte in MLflow is as it was signed")


def _copied(model: str, version: str, copied: str) -> Finding:
    try:
        releases.verify_copy(copied)
    except (CorruptArtifact, FileNotFoundError) as error:
        return Finding(f"The copy of version {version} of {model} in the release store: {error}", True)
    return Finding(f"version {version} of {model}: every byte in the release store is the one that was promoted")
