"""What Prefect does by itself: about flow runs in trouble, and about what happens in MLflow's registry.

Prefect's own server notices no dead process: a run whose machine went away would be "Running" for ever, or "Pending"
if that was starting it. Runs say twice a minute that they live; one that is silent for `DEAD_AFTER`, or has not begun
`BEGUN_WITHIN` of being taken by a worker, counts as crashed. That can be wrong (a machine that was asleep), so nothing
is lost by it: running it again goes on after the finished stages.
"""

from datetime import timedelta
from typing import Any

from prefect.automations import Automation, ChangeFlowRunState, EventTrigger, Posture, RunDeployment, SendNotification
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

DEAD_AFTER = timedelta(seconds=90)
"""Three heartbeats."""
BEGUN_WITHIN = timedelta(minutes=30)
"""Time enough to fetch the image of a container."""
ENDED = ("Completed", "Failed", "TimedOut", "Crashed", "Cancelled", "Paused", "Suspended", "AwaitingRetry")
ALIAS_SET = "mlflow.model_version_alias.created"
MODELS = {"prefect.resource.id": "mlflow.registered-model.*"}
FLOW_RUNS = {"prefect.resource.id": "prefect.flow-run.*"}


def dead_runs(after: timedelta = DEAD_AFTER) -> AutomationCore:
    """Runs that said that they live, and then nothing for `after`, are crashed."""
    return AutomationCore(
        name="slimline: a run without a sign of life is crashed",
        description="The process or the machine of the run is gone. Run it again: finished stages are cached.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in ENDED)},
            match=FLOW_RUNS,  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            threshold=1,
            within=after,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"Nothing was heard of this run for {after.total_seconds():.0f} s: its process or machine is "
                "gone. Run it again: finished stages are cached.",
            )
        ],
    )


def never_begun(within: timedelta = BEGUN_WITHIN) -> AutomationCore:
    """Runs that a worker took and that have not begun `within` are crashed."""
    return AutomationCore(
        name="slimline: a run that does not begin is crashed",
        description="Whoever was starting the run is gone, and it would keep its place in the queue. Run it again.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.Pending"},
            expect={f"prefect.flow-run.{state}" for state in ("Running", *ENDED)},
            match=FLOW_RUNS,  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            threshold=1,
            within=within,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"A worker took this run {within.total_seconds():.0f} s ago and did not begin it. Retry it.",
            )
        ],
    )


def runs_in_trouble(block_id: Any) -> AutomationCore:
    """Failed, crashed and late runs are told to the notification block."""
    return _told(
        block_id,
        "a run in trouble is told",
        {f"prefect.flow-run.{state}" for state in ("Failed", "TimedOut", "Crashed", "Late")},
        FLOW_RUNS,
        subject="{{ flow.name }}: {{ flow_run.state.name }}",
        body="{{ flow_run.name }} is {{ flow_run.state.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
    )


def new_candidates(deployment_id: Any) -> AutomationCore:
    """A version that gets the alias `candidate` is examined."""
    return AutomationCore(
        name="slimline: a new candidate is examined",
        description="MLflow says so, through `slimline bridge`; the deployment reconcile finds what that missed.",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect={ALIAS_SET},
            match={**MODELS, "mlflow.alias": "candidate"},
            threshold=1,
        ),
        actions=[
            RunDeployment(
                deployment_id=deployment_id,
                parameters={"model": "{{ event.payload.name }}", "version": "{{ event.payload.version }}"},
            )
        ],
    )


def new_champions(block_id: Any) -> AutomationCore:
    """A version that gets the alias `champion` is told to the notification block."""
    return _told(
        block_id,
        "a new champion is told",
        {ALIAS_SET},
        {**MODELS, "mlflow.alias": "champion"},
        subject="{{ event.payload.name }}: version {{ event.payload.version }} is the champion",
        body="MLflow's alias champion of {{ event.payload.name }} names version {{ event.payload.version }}.",
    )


def _told(
    block_id: Any, what: str, expect: set[str], match: dict[str, str], *, subject: str, body: str
) -> AutomationCore:
    return AutomationCore(
        name=f"slimline: {what}",
        description="By the block that SLIMLINE_NOTIFICATION_BLOCK named at the last deploy.",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect=expect,
            match=match,  # type: ignore[arg-type]
            threshold=1,
        ),
        actions=[SendNotification(block_document_id=block_id, subject=subject, body=body)],
    )


def create_automations(client: SyncPrefectClient, notification_block: str | None, examine: str | None = None) -> None:
    """Put them on the server, in place of earlier ones of the same name.

    Args:
        client: of the server.
        examine: the deployment that examines candidates, FLOW/NAME; None: nothing does.
        notification_block: "TYPE/NAME" of a block there, as "slack-webhook/team"; None: nobody is told.

    Raises:
        ValueError: there is no such block.
    """
    wanted = [dead_runs(), never_begun()]
    if notification_block:
        kind, _, name = notification_block.partition("/")
        block_id = _block_id(client, kind, name)
        wanted += [runs_in_trouble(block_id), new_champions(block_id)]
    if examine:
        wanted.append(new_candidates(client.read_deployment_by_name(examine).id))
    for automation in wanted:
        put(client, automation)


def put(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Create it, or change the one of its name where it differs: a changed one forgets the runs it waits for."""
    found: list[Automation] = client.read_automations_by_name(automation.name)  # type: ignore[assignment]
    if found and found[0].model_dump(exclude={"id"}) == automation.model_dump():
        return
    if found:
        assert found[0].id
        client.update_automation(found[0].id, automation)
    else:
        client.create_automation(automation)


def _block_id(client: SyncPrefectClient, kind: str, name: str) -> Any:
    try:
        return client.read_block_document_by_name(name, kind, include_secrets=False).id
    except ObjectNotFound:
        raise ValueError(
            f"SLIMLINE_NOTIFICATION_BLOCK names TYPE/NAME of a block on the Prefect server; there is no "
            f"{kind}/{name}. Create it on the Blocks page."
        ) from None
