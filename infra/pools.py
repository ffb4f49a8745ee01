"""Flow runs on the workers of a Prefect pool; those whose worker dies are run again by another."""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from httpx import HTTPError
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Scheduled

from infra.console import console
from infra.failures import InfrastructureError

POLL_S = 2.0
RETRY_AFTER = timedelta(seconds=15)
"""A worker of Prefect 3.8 dies when it is given a run again while it still cleans up after it."""
MAX_RETRIES = 5
"""Of a run whose worker or process died."""


class Ended(NamedTuple):
    """Of a flow run: the machine it ran on, what its last state says, and whether it completed."""

    where: str
    message: str
    completed: bool


def run_everywhere(deployment: str, calls: Mapping[str, Mapping[str, Any]], *, key: str) -> Iterator[tuple[str, Ended]]:
    """How flow runs of a deployment ended, by the names of `calls`, as they end.

    What is still running when the caller ends is cancelled.

    Args:
        deployment: FLOW/NAME; the workers of its pool run it, each as many runs at once as its `--limit` says.
        calls: the parameters of each run.
        key: the same key and name find the earlier run instead of starting another.

    Raises:
        InfrastructureError: workers died too often.
    """
    with get_client(sync_client=True) as client:
        waiting = {_start(deployment, name, parameters, f"{key}-{name}"): name for name, parameters in calls.items()}
        deaths = dict.fromkeys(waiting, 0)
        try:
            while waiting:
                for run in [client.read_flow_run(each) for each in waiting]:
                    state = run.state
                    if state and state.is_crashed():  # so also Prefect calls one that infra/automations.py gave up
                        deaths[run.id] += 1
                        name = waiting[run.id]
                        if deaths[run.id] > MAX_RETRIES:
                            raise InfrastructureError(f"{name} could not be made by the workers: {state.message}")
                        console.print(f"  [yellow]again[/]  {name}: ", end="")
                        console.print(state.message, markup=False, soft_wrap=True)
                        again: State[None] = Scheduled(
                            scheduled_time=datetime.now(UTC) + RETRY_AFTER, name="AwaitingRetry"
                        )
                        client.set_flow_run_state(run.id, again, force=True)
                    elif state and state.is_final():
                        host, colon, _ = (run.infrastructure_pid or "").partition(":")
                        where = host if colon else "a worker"  # process workers of Prefect 3.8 give a number alone
                        yield waiting.pop(run.id), Ended(where, state.message or "", state.is_completed())
                time.sleep(POLL_S if waiting else 0)
        finally:
            with suppress(HTTPError):  # without its server nothing can be cancelled
                for each in waiting:
                    client.set_flow_run_state(each, Cancelling())


def _start(deployment: str, name: str, parameters: Mapping[str, Any], key: str) -> UUID:
    run = run_deployment(
        deployment, parameters=dict(parameters), flow_run_name=name, timeout=0, idempotency_key=key
    )  # shown below the run that calls this
    assert isinstance(run, FlowRun)
    return run.id


def require_workers(deployment: str) -> None:
    """Refuse a deployment that nobody would run.

    Raises:
        InfrastructureError: there is no such deployment, or nobody works for its pool.
    """
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_deployment_by_name(deployment).work_pool_name
        except ObjectNotFound:
            raise InfrastructureError(
                f"The Prefect server must have the deployment {deployment} that SLIMLINE_FAN_OUT names; the one at "
                f"{client.api_url} has not. Run `slimline deploy`, or change the variable."
            ) from None
        workers = client.read_workers_for_work_pool(str(pool))
    if not any(worker.status == WorkerStatus.ONLINE for worker in workers):
        raise InfrastructureError(
            f"The work pool {pool} must have workers; none is online. Start one on each machine (prefect worker start "
            f"--pool {pool} --limit 1), or unset SLIMLINE_FAN_OUT."
        )
