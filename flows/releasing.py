"""How a version becomes the champion, and how an earlier one becomes it again.

Whoever holds the lock of a model and adds the entry "started" right after all that it has seen is the one writer. A
process may be killed at any moment: the alias moves by one request, so the old or the new champion serves, and whoever
comes next finishes what the ledger says was started (`settle`).
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from flows.approving import Refused, expiry, lock_name, number_of, said
from infra import registry, releases
from infra.artifacts import CorruptArtifact
from infra.console import console
from infra.ledger import Entry, append, append_after, entries
from infra.locks import held_everywhere, holder_of
from infra.releases import CHAMPION, PREVIOUS, SmokeTestFailed
from infra.services import ProcessId
from infra.settings import settings
from infra.signing import Unverified
from infra.standing import Request, champions, copies, requests, unfinished

STALE = timedelta(minutes=30)
"""What another machine started that shares no lock with this one counts as under way for so long."""


@contextmanager
def writer(model: str) -> Iterator[None]:
    """Within, the caller alone moves aliases of the model."""

    def say(holder: str) -> None:
        console.print(f"waiting for {holder}, which moves aliases of {model}", soft_wrap=True, markup=False)

    with held_everywhere(lock_name(model), say):
        yield


def is_approved(request: Entry) -> bool:
    """Whether a request was approved and not yet carried out."""
    return any(
        (each.entry.number, each.state) == (request.number, "approved") for each in requests(entries(request.model))
    )


def outcome(request: Entry) -> Entry | None:
    """The entry "promoted" of a request that was carried out."""
    done = (each for each in entries(request.model) if (each.what, each.request) == ("promoted", request.number))
    return next(done, None)


def carry_out(request: Entry) -> Entry:
    """The entry "promoted" of an approved request: the version answers as champion.

    Raises:
        Refused: it is not approved, or the champion is no longer the one that the approver compared it with.
        SmokeTestFailed: it does not answer; the champion is what it was.
        Unverified: its files changed since they were looked at.
    """
    model, version = request.model, request.version
    with writer(model):
        _settle(model)
        if done := outcome(request):
            return done
        (found,) = (each for each in requests(entries(model)) if each.entry.number == request.number)
        if found.state != "approved":
            raise Refused(f"The request to promote version {version} of {model} must be approved; it is {found.state}.")
        _require_timely(found)
        copied = copy(model, version)
        about = {"sha256": request.sha256, "why": request.why, "request": request.number, "copy_sha256": copied}
        started = start(request.who, model, version, request.replaces, aim="promoted", **about)
        while started is None:  # another machine, which shares no lock with this one, was faster
            _require_timely(found)
            started = start(request.who, model, version, request.replaces, aim="promoted", **about)
        return _finish(started)


def _require_timely(request: Request) -> None:
    """What was approved is still what would happen now."""
    asked = request.entry
    champion = releases.holder(asked.model, CHAMPION)
    problem = expiry(request)
    if champion != asked.replaces:
        problem = (
            f"Version {asked.version} of {asked.model} was to replace {_named(asked.replaces)}; the champion is "
            f"{_named(champion)} now. Compare it with that, and ask again."
        )
    if problem:
        about = {"sha256": asked.sha256, "request": asked.number, "replaces": champion}
        append(asked.model, who=asked.who, what="refused", version=asked.version, why=problem, **about)
        raise Refused(problem)


def _named(version: str | None) -> str:
    return f"version {version}" if version else "nothing"


def roll_back(model: str, version: str = PREVIOUS, *, who: str, why: str) -> Entry:
    """The entry "rolled back": an earlier champion answers as champion again.

    Its bytes are verified first, and restored from the release store where MLflow's are damaged. Nothing is deleted.

    Args:
        model: a registered model.
        version: number of an earlier champion; "previous": the one before the present.

    Raises:
        ValueError: there is no earlier champion, that version never was one, or its bytes are damaged everywhere.
        SmokeTestFailed: it does not answer either; the champion is what it was.
    """
    who, why = said(who, "who goes back"), said(why, "why")
    registry.find_model(model)
    if version != PREVIOUS:
        version = number_of(model, version, PREVIOUS)
    with writer(model):
        known = entries(model)
        going = unfinished(known)
        if going:
            _require_gone(going)
            if going.aim == "rolled back" and version in (PREVIOUS, going.version):
                return _finish(going)
            _give_up(going, who)
        champion = releases.holder(model, CHAMPION)
        version = _earlier(model, version, champion, known, going)
        copied = copies(known).get(version, "")
        make_whole(model, version, copied)
        about = {"sha256": releases.known(model, version).sha256, "why": why, "copy_sha256": copied}
        if started := start(who, model, version, champion, aim="rolled back", **about):
            return _finish(started)
        raise Refused(f"The champion of {model} was {_named(champion)} a moment ago, and is another now. Look again.")


def _give_up(going: Entry, who: str) -> None:
    """What was started and not finished is not tested any more: who goes back does not wait for that."""
    reason = f"{who} goes back before it was tested"
    append(going.model, who=who, what="interrupted", version=going.version, sha256=going.sha256, why=reason)


def _earlier(model: str, version: str, champion: str | None, known: list[Entry], going: Entry | None) -> str:
    """The number of the earlier champion to go back to."""
    stack = [each for each in champions(known) if each != champion]
    if going and going.version == champion and going.replaces:
        stack = [each for each in stack if each != going.replaces] + [going.replaces]
    if version == PREVIOUS:
        if not stack:
            raise ValueError(f"{model} has no earlier champion than {_named(champion)}. Promote a version first.")
        return stack[-1]
    ever = {*stack, *copies(known)} - {champion}
    if version == champion:
        raise ValueError(f"Version {version} of {model} is the champion already.")
    if version not in ever:
        names = ", ".join(sorted(ever, key=int)) or "none"
        raise ValueError(
            f"One goes back to an earlier champion of {model} ({names}); version {version} never was one. Promote it: "
            f"slimline promote {model} {version}"
        )
    return version


def make_whole(model: str, version: str, copied: str) -> None:
    """Verify every byte that MLflow has of a version; what is damaged there is restored from its copy.

    Raises:
        ValueError: there is no copy, or it is damaged, too.
    """
    try:
        releases.verify_stored(model, version)
    except (Unverified, FileNotFoundError) as error:
        if not copied:
            raise ValueError(f"{error} The release store has no copy of it. Go back to another version.") from None
        console.print(f"{error} Restoring it from the release store.", soft_wrap=True, markup=False)
        try:
            releases.restore(model, version, copied)
        except (CorruptArtifact, FileNotFoundError, Unverified) as again:
            raise ValueError(f"{error} Its copy does not help: {again} Go back to another version.") from None


def settle(model: str) -> Entry | None:
    """Finish what a process that is gone has started, and say what came of it; None: nothing was left to finish.

    Raises:
        Refused: another place that shares no lock with this one is at it.
    """
    if unfinished(entries(model)) is None or holder_of(lock_name(model)):
        return None
    with writer(model):
        return _settle(model)


def _settle(model: str) -> Entry | None:
    """`settle`, by the writer."""
    going = unfinished(entries(model))
    if going is None:
        return None
    _require_gone(going)
    said_by = f"{going.who} started with version {going.version} of {model}"
    console.print(f"finishing what {said_by}", soft_wrap=True, markup=False)
    if releases.holder(model, CHAMPION) != going.version:
        reason = "it ended before the version was champion, or when it was no longer"
        return append(model, who=going.who, what="interrupted", version=going.version, sha256=going.sha256, why=reason)
    try:
        return _finish(going)
    except SmokeTestFailed:  # the champion is what it was
        return entries(model)[-1]


# Steps, each of which may be done twice


def copy(model: str, version: str) -> str:
    """The name of the copy of all the version's bytes in the release store."""
    return releases.copy(model, version).sha256


def start(who: str, model: str, version: str, replaces: str | None, **about: Any) -> Entry | None:
    """The entry that says what is about to be done, right after all that is known; None: the champion is another."""
    own = ProcessId.own()
    process = f"{socket.gethostname()} {own.pid} {own.started_at}"
    while True:
        known = entries(model)
        if going := unfinished(known):  # by somebody who shares no lock with us
            _require_gone(going)
        if releases.holder(model, CHAMPION) != replaces:
            return None
        about |= {"replaces": replaces, "process": process}
        if added := append_after(known, model, who=who, what="started", version=version, **about):
            return added


def move(started: Entry) -> None:
    """From here on the new one serves."""
    releases.point(started.model, CHAMPION, started.version)


def smoke_test(started: Entry) -> None:
    """Whether it answers."""
    releases.smoke_test(started.model, started.version)


def go_back(started: Entry, reason: str) -> None:
    """The champion is again what it was."""
    if started.replaces:
        releases.point(started.model, CHAMPION, started.replaces)
    else:
        releases.unpoint(started.model, CHAMPION)
    append(
        started.model,
        who=started.who,
        what="failed",
        version=started.version,
        sha256=started.sha256,
        why=reason,
        request=started.request,
        replaces=started.replaces,
    )


def keep_previous(started: Entry) -> None:
    """`previous` is where a rollback would go."""
    stack = champions(entries(started.model))
    if started.aim == "rolled back" and started.version in stack:
        stack = stack[: stack.index(started.version)]
    elif started.replaces:
        stack = [started.replaces]
    if stack:
        releases.point(started.model, PREVIOUS, stack[-1])
    elif releases.holder(started.model, PREVIOUS):
        releases.unpoint(started.model, PREVIOUS)


def tell(started: Entry) -> Entry:
    """What came of it, in the ledger and on MLflow's pages."""
    assert started.aim
    about = {name: getattr(started, name) for name in ("sha256", "why", "request", "replaces", "copy_sha256")}
    entry = append(started.model, who=started.who, what=started.aim, version=started.version, **about)
    releases.tell_registry(entry)
    return entry


def _finish(started: Entry) -> Entry:
    """The steps after `start`."""
    move(started)
    try:
        smoke_test(started)
    except SmokeTestFailed as error:
        go_back(started, str(error))
        raise SmokeTestFailed(f"{error} The champion of {started.model} is {_named(started.replaces)}.") from None
    keep_previous(started)
    return tell(started)


def _require_gone(started: Entry) -> None:
    """Who holds the lock and finds a start knows that its process is gone, unless that one has another lock.

    Raises:
        Refused: it may be at work.
    """
    host, pid, started_at = started.process.split(" ")
    own = ProcessId.own()
    if host == socket.gethostname():
        lives = int(pid) != own.pid and ProcessId(pid=int(pid), started_at=float(started_at)).alive()
    else:
        lives = settings().redis_url is None and datetime.now(UTC) - started.time < STALE
    if lives:
        raise Refused(
            f"Aliases of {started.model} are being moved by {started.who} on {host} since {started.time:%H:%M} UTC. "
            f"Wait; what another machine started counts as ended after {STALE.total_seconds() / 60:.0f} min."
        )
