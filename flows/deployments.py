"""Tell a Prefect server what prefect.yaml says: work pools, limits, deployments, and what to do about runs in trouble.

Doing it again changes what changed in the file. `slimline deploy` does it for a shared server, `slimline up` for the
local one.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel, Field

from infra.automations import create_automations
from infra.settings import environment, prepare_environment, settings

ROOT = Path(__file__).parents[1]

EXAMINE = "examine/examine"
"""The deployment that is started for a new candidate."""


class WorkPool(BaseModel, frozen=True, extra="forbid"):
    """Where flow runs wait for workers of a kind.

    Attributes:
        type: how its workers start a run: process, docker, kubernetes.
        concurrency_limit: runs at a time, over all its workers.
        base_job_template: a JSON file beside prefect.yaml; None: the type's own.
    """

    type: str = "process"
    concurrency_limit: int | None = Field(None, ge=1)
    base_job_template: Path | None = None


class Plan(BaseModel, frozen=True):
    """What a prefect.yaml asks for; `deployments` are their names by pool."""

    work_pools: dict[str, WorkPool]
    concurrency_limits: dict[str, int]
    deployments: dict[str, tuple[str, ...]]


def prefect_file() -> Path:
    """The project's prefect.yaml: in a checkout its root's, else the one that was installed with the package."""
    packaged = Path(__file__).parent / "_prefect.yaml"
    return packaged if packaged.exists() else ROOT / "prefect.yaml"


def read(file: Path, pools: Sequence[str]) -> Plan:
    """What `file` asks for, as far as it concerns `pools`; without any, all of it.

    Raises:
        ValueError: a pool is not defined there.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"A file like prefect.yaml is deployed; {file} does not exist.") from None
    defined = content.get("definitions") or {}
    work_pools = {name: WorkPool.model_validate(pool or {}) for name, pool in defined.get("work_pools", {}).items()}
    deployments: dict[str, tuple[str, ...]] = {}
    for deployment in content["deployments"]:
        name = deployment["work_pool"]["name"]
        deployments[name] = (*deployments.get(name, ()), deployment["name"])
    chosen = list(pools) or list(work_pools)
    if unknown := sorted((set(deployments) if not pools else set(pools)) - set(work_pools)):
        raise ValueError(
            f"{file}: a work pool must be one of definitions.work_pools ({', '.join(work_pools)}); got "
            f"{', '.join(unknown)}. Define it there."
        )
    return Plan(
        work_pools={name: work_pools[name] for name in chosen},
        concurrency_limits=defined.get("concurrency_limits", {}) if not pools else {},
        deployments={name: names for name, names in deployments.items() if name in chosen},
    )


def server() -> str:
    """The address of the Prefect server.

    Raises:
        ValueError: there is none; one that runs inside this process would forget everything.
    """
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    if not address:
        raise ValueError(
            "Deploying needs a Prefect server; none is set, and `slimline up` does not run. "
            "Set SLIMLINE_PREFECT_API_URL, or start one: slimline up"
        )
    return str(address)


def deploy(file: Path | None = None, pools: Sequence[str] = ()) -> Plan:
    """Tell the server of PREFECT_API_URL; what it was told.

    Args:
        file: default: `prefect_file()`.
        pools: only what concerns these.

    Raises:
        ValueError: the file is wrong, or the server refused a deployment.
    """
    file = (file or prefect_file()).resolve()
    plan = read(file, pools)
    with get_client(sync_client=True) as client:
        for name, pool in plan.work_pools.items():
            _put_pool(client, name, pool, file.parent)
        for name, limit in plan.concurrency_limits.items():
            client.upsert_global_concurrency_limit_by_name(name, limit)
        _put_deployments(file, [name for names in plan.deployments.values() for name in names])
        there = any(EXAMINE.rpartition("/")[2] in names for names in plan.deployments.values())
        create_automations(client, settings().notification_block, EXAMINE if there else None)
    return plan


def _put_pool(client: SyncPrefectClient, name: str, pool: WorkPool, beside: Path) -> None:
    wanted: dict[str, Any] = {"concurrency_limit": pool.concurrency_limit}
    if pool.base_job_template:
        wanted["base_job_template"] = json.loads((beside / pool.base_job_template).read_text(encoding="utf-8"))
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        template = wanted.pop("base_job_template", None) or _template_of(pool.type)
        client.create_work_pool(WorkPoolCreate(name=name, type=pool.type, base_job_template=template, **wanted))
        return
    if found.type != pool.type:
        raise ValueError(
            f"The work pool {name} must be of type {pool.type}; the server has one of type {found.type}. Delete that, "
            f"or name another: prefect work-pool delete {name}"
        )
    client.update_work_pool(name, WorkPoolUpdate(**wanted))


def _template_of(kind: str) -> dict[str, Any]:
    import asyncio

    from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

    template = asyncio.run(get_default_base_job_template_for_infrastructure_type(kind))
    if template is None:
        raise ValueError(f"Work pools of type {kind} need their Prefect package: pip install prefect-{kind}")
    return template


def _put_deployments(file: Path, names: Sequence[str]) -> None:
    """By Prefect's own command, which knows everything that the file may say."""
    if not names:
        return
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(file)]
    done = subprocess.run(
        [*command, *(word for name in names for word in ("--name", name))],
        cwd=ROOT,
        env=environment(PREFECT_LOGGING_LEVEL="WARNING"),
        capture_output=True,
        text=True,
    )
    missing = [name for name in names if f"/{name}' successfully" not in "".join(done.stdout.split("\n"))]
    if done.returncode or missing:
        raise ValueError(f"Prefect did not take the deployments of {file}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> None:
    """What `slimline up` runs: the deployments of one pool."""
    parser = argparse.ArgumentParser(prog="python -m flows.deployments")
    parser.add_argument("--pool", action="append", default=[])
    prepare_environment()
    plan = deploy(pools=parser.parse_args().pool)
    print(f"{server()} offers {plan.model_dump_json()}")  # noqa: T201  for the log


if __name__ == "__main__":
    main()
