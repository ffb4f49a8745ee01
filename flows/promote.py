"""The flow that a release team starts to make a version the champion: it waits, without a process, for an approval."""

from datetime import UTC, datetime
from typing import Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import suspend_flow_run
from prefect.runtime import flow_run
from pydantic import Field

from flows.approval import Approval, Text
from flows.approving import Refused, Revalidate, answer, ask, briefing, is_own
from flows.releasing import carry_out, is_approved, outcome, settle
from infra.ledger import Entry


@flow(name="promote", flow_run_name="promote-{model}-{version}", validate_parameters=True, persist_result=False)
def promote(
    model: Annotated[str, Field(min_length=1, examples=["smollm2-135m"])],
    who: Text,
    why: Text,
    version: Annotated[str, Field(pattern=r"^([1-9]\d*|candidate)$")] = "candidate",
    two_person: bool = True,
    approval_hours: Annotated[float, Field(gt=0, le=24 * 30)] = 24.0,
    revalidate: Revalidate = "if_hardware_differs",
) -> Entry:
    """Make a version of a registered model its champion, once somebody has approved it.

    Args:
        model: A registered model.
        who: Who asks.
        why: What for.
        version: Its number, or candidate: the newest accepted one.
        two_person: Who asks may not approve.
        approval_hours: An approval after so many hours does not count.
        revalidate: Measure and judge it anew on the worker's machine.
    """
    settle(model)
    request = ask(
        model,
        version,
        who=who,
        why=why,
        two_person=two_person,
        approval_hours=approval_hours,
        revalidate=revalidate,
        flow_run=str(flow_run.id),
    )
    if not (promoted := outcome(request)):  # else this run died after that
        if not is_approved(request):
            _approved(request)
        promoted = carry_out(request)
    create_markdown_artifact(
        key="release",
        markdown=f"Version {promoted.version} of {model} is the champion; it was {promoted.replaces or 'none'} before.",
        description="What serves now",
    )
    return promoted


def _approved(request: Entry) -> None:
    """Suspend this run until somebody approves; who may not is told so, and the run waits again.

    After each answer Prefect runs the flow from its beginning, where earlier answers come back at once; what is in the
    ledger already is not put there again.
    """
    told = ""
    while True:
        assert request.expires_at
        left_s = max(1, int((request.expires_at - datetime.now(UTC)).total_seconds()))
        decision = suspend_flow_run(
            wait_for_input=Approval.with_initial_data(description=told + briefing(request)), timeout=left_s
        )
        try:
            found = answer(request, who=decision.who, why=decision.why, approve=decision.decision == "approve")
        except Refused as refused:
            if not is_own(request, decision.who):
                raise
            told = f"**{refused}**\n\n"
            continue
        if found.what == "refused":
            raise Refused(f"{found.who} refused version {request.version} of {request.model}: {found.why}")
        return
