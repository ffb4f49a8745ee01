"""How a promotion is asked for, looked at, and approved or refused. All of it is in the ledger."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from urllib.parse import quote
from uuid import UUID

from infra import registry, releases
from infra.console import console
from infra.hardware import differences, hardware
from infra.ledger import Entry, append, entries
from infra.locks import holder_of
from infra.releases import CHAMPION, Known
from infra.signing import Unverified
from infra.standing import Request, requests, unfinished
from infra.tracking import tracking_uri

Revalidate = Literal["if_hardware_differs", "always", "never"]


class Refused(ValueError):
    """A version may not be promoted, or not by this approval. The ledger has it."""


def ask(
    model: str,
    version: str,
    *,
    who: str,
    why: str,
    two_person: bool,
    approval_hours: float,
    revalidate: Revalidate,
    flow_run: str = "",
) -> Entry:
    """The request to promote a version that may be: accepted, signed, whole, and good on this hardware.

    Asking again for what was asked and is not done gives that request.

    Args:
        model: a registered model.
        version: its number, or "candidate".
        two_person: who asks may not approve.
        approval_hours: until then.
        revalidate: whether to measure and judge it anew here, against the model that its run started from.
        flow_run: of Prefect; each asks once.

    Raises:
        Refused: it may not, or aliases of the model are being moved.
        ValueError: there is no such version, or it is the champion.
    """
    who, why = said(who, "who asks"), said(why, "why it is asked")
    version = number_of(model, version, registry.CANDIDATE)
    known = entries(model)
    if found := _asked_already(known, version, flow_run):
        return found
    champion = releases.holder(model, CHAMPION)
    if champion == version:
        raise ValueError(f"Version {version} of {model} is the champion already.")
    about = releases.known(model, version)
    if problem := _under_way(model, known) or _examined(about, revalidate):
        append(model, who=who, what="refused", version=version, sha256=about.sha256, why=problem, replaces=champion)
        raise Refused(problem)
    return append(
        model,
        who=who,
        what="requested",
        version=version,
        sha256=about.sha256,
        why=why,
        replaces=champion,
        expires_at=datetime.now(UTC) + timedelta(hours=approval_hours),
        two_person=two_person,
        flow_run=flow_run,
    )


def _asked_already(known: list[Entry], version: str, flow_run: str) -> Entry | None:
    for request in reversed(requests(known)):
        asked = request.entry
        if flow_run and asked.flow_run == flow_run:
            return asked
        same = (asked.version, asked.flow_run, flow_run) == (version, "", "")
        if same and request.state != "done" and not request.is_expired:
            return asked
    return None


def _under_way(model: str, known: list[Entry]) -> str | None:
    holder = holder_of(lock_name(model))
    if holder is None:
        return None
    going = unfinished(known)
    what = f"version {going.version} is made champion by {going.who}" if going else f"{holder} is at work"
    return f"Aliases of {model} are being moved at this moment: {what}. Ask again when that is done."


def lock_name(model: str) -> str:
    """Of the lock that whoever moves aliases of the model holds."""
    return f"release-{quote(model, safe='')}"


def _examined(about: Known, revalidate: Revalidate) -> str | None:
    """Why a version may not be promoted, in sentences."""
    name = f"Version {about.version} of {about.model}"
    verdict = about.tags.get("verdict", "none")
    if verdict != registry.ACCEPT:
        return f"{name} must have the verdict {registry.ACCEPT}; it has {verdict}. Promote another."
    try:
        registry.verified_version(about.model, about.version)
    except Unverified as error:
        return str(error)
    if revalidate == "never":
        return None
    other = differences(about.run.hardware, hardware()) if about.run else ["nobody knows where it was measured"]
    if not other and revalidate == "if_hardware_differs":
        return None
    from flows.validating import verdict_here

    console.print(f"measuring {name} here: {'; '.join(other) or 'as asked'}", soft_wrap=True, markup=False)
    verdict, sentence = verdict_here(about)
    if verdict != registry.ACCEPT:
        where = "; ".join(other) or "the same hardware"
        return f"{name} must be accepted on this machine ({where}); its verdict here is {verdict}: {sentence}"
    return None


def answer(request: Entry, *, who: str, why: str, approve: bool) -> Entry:
    """The entry that approves a request, or refuses it, which ends it. Approving again changes nothing.

    Raises:
        Refused: the request has expired, is done with, or is the approver's own and needs two persons.
    """
    who, why = said(who, "who answers"), said(why, "why it is answered so")
    model, version = request.model, request.version
    known = entries(model)
    (found,) = (each for each in requests(known) if each.entry.number == request.number)
    about: dict[str, Any] = {"version": version, "sha256": request.sha256, "request": request.number}
    if found.state == "done":
        raise Refused(f"The request to promote version {version} of {model} is done with. Ask again.")
    if problem := expiry(found):
        append(model, who=who, what="refused", why=problem, **about)
        raise Refused(problem)
    if not approve:
        return append(model, who=who, what="refused", why=why, **about)
    if is_own(request, who):
        problem = f"{who} asked to promote version {version} of {model}, so somebody else must approve it."
        if not any((each.what, each.who, each.why) == ("refused", who, problem) for each in known[request.number :]):
            append(model, who=who, what="refused", why=problem, **{**about, "request": None})  # the request stays open
        raise Refused(problem)
    if found.state == "approved":
        return next(each for each in reversed(known) if (each.what, each.request) == ("approved", request.number))
    return append(model, who=who, what="approved", why=why, **about)


def is_own(request: Entry, who: str) -> bool:
    """Whether an approver may not approve a request because it is theirs."""
    return request.two_person and who.strip().casefold() == request.who.casefold()


def asked(model: str, version: str) -> Entry:
    """The last request for a version.

    Raises:
        ValueError: there is none.
    """
    version = number_of(model, version, registry.CANDIDATE)
    known = requests(entries(model))
    found = [each for each in known if each.entry.version == version]
    if found:
        return found[-1].entry
    waiting = [each.entry.version for each in known if each.state == "open" and not each.is_expired]
    raise ValueError(
        f"An answer needs a request; nobody asked to promote version {version} of {model}. Waiting: "
        f"{', '.join(waiting) or 'none'}. Ask with: slimline promote {model} {version}"
    )


def resume(request: Entry, *, who: str, why: str, approve: bool) -> None:
    """Answer the form that the flow run of a request waits with.

    Raises:
        Refused: it does not wait (any more).
    """
    from prefect.exceptions import FlowPauseTimeout, NotPausedError, ObjectNotFound
    from prefect.flow_runs import resume_flow_run

    form = {"who": said(who, "who answers"), "why": said(why, "why"), "decision": "approve" if approve else "refuse"}
    try:
        resume_flow_run(UUID(request.flow_run), run_input=form)
    except (FlowPauseTimeout, NotPausedError, ObjectNotFound, RuntimeError) as error:
        raise Refused(
            f"The flow run {request.flow_run} asked to promote version {request.version} of {request.model}; it does "
            f"not wait for an answer: {error} Look at its page, or ask again."
        ) from None


def expiry(request: Request) -> str | None:
    """That a request waited for too long, in sentences."""
    asked = request.entry
    if not request.is_expired:
        return None
    until = f"{asked.expires_at:%Y-%m-%d %H:%M} UTC"
    return f"The request of {asked.who} to promote version {asked.version} expired on {until}. Ask again."


def said(text: str, what: str) -> str:
    """The text, which the ledger keeps.

    Raises:
        ValueError: it is empty.
    """
    if not text.strip():
        raise ValueError(f"The ledger keeps {what}; it must not be empty. Say it.")
    return text.strip()


def number_of(model: str, version: str, alias: str) -> str:
    """The number of a version that exists, named by it or by this alias.

    Raises:
        ValueError: there is no such version, or no such name is allowed.
    """
    if re.fullmatch(r"[1-9]\d*", version):
        return str(registry.find_version(f"models:/{model}/{version}").version)
    if version != alias:
        raise ValueError(f"A version of {model} is its number, or {alias!r}; got {version!r}.")
    return str(registry.find_version(f"models:/{model}@{alias}").version)


def briefing(request: Entry) -> str:
    """What an approver looks at, in Markdown: who asks and why, the comparison with today's champion, the report."""
    about = releases.known(request.model, request.version)
    champion = releases.known(request.model, request.replaces) if request.replaces else None
    other = differences(about.run.hardware, hardware()) if about.run else []
    by = f"somebody other than {request.who}" if request.two_person else "anybody"
    lines = [
        f"**{request.who}** asks to promote version {request.version} of {request.model}: {request.why}",
        "",
        f"* to be approved by {by}, until {request.expires_at:%Y-%m-%d %H:%M} UTC",
        f"* verdict {about.tags.get('verdict')}; every byte is as it was signed; bundle {request.sha256[:12]}",
    ]
    if other:
        lines.append(f"* measured on another machine than this ({'; '.join(other)})")
    lines += ["", releases.compared(about, champion), ""]
    page = f"{tracking_uri()}/#/models/{quote(request.model)}/versions/{request.version}"
    lines.append(f"[The version in MLflow]({page})")
    if about.run:
        lines.append(f"[Its run, with the report]({about.run.url})")
    return "\n".join([*lines, "", "---", "", about.description])
