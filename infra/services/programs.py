"""What is started for a home, with which options, and in which order it ends."""

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from infra.services import postgres, seaweedfs
from infra.services.addresses import HOST, Addresses, Database, at
from infra.services.credentials import credentials
from infra.services.processes import MARK
from infra.settings import QUIET, settings

POOL = "cpu"
"""The work pool of the local worker."""
RELEASE_POOL = "release"
"""That of promotions and rollbacks, which do not wait behind hours of optimization."""
DEPLOY = (sys.executable, "-m", "flows.deployments", "--pool", POOL, "--pool", RELEASE_POOL)
HEARTBEAT_S = 30
"""How often a flow run says that it lives; Prefect allows no less. infra/automations.py says when it is dead."""
ROOT = Path(__file__).parents[2]
MIGRATE = "from infra.settings import settings; from infra.tracking import prepare_database as p; p(settings().home)"
BUCKETS = f"from infra.s3 import create_bucket; [create_bucket(name) for name in {seaweedfs.BUCKETS}]"


class Plan(BaseModel, frozen=True):
    """What to run for a home.

    Attributes:
        ports: as `free_ports` chose them.
        database: what MLflow and Prefect keep their records in.
        deploy: the command that creates the deployments of the workers' pools, run from the project's root.
        timeout_s: until everything has to answer.
    """

    home: Path
    ports: dict[str, int]
    database: Database = "sqlite"
    deploy: tuple[str, ...] = DEPLOY
    timeout_s: float

    @property
    def addresses(self) -> Addresses:
        """Where the pages are."""
        return at(self.ports)


@dataclass(frozen=True)
class Program:
    """One process to start.

    Attributes:
        user: arguments of Popen, where it must not be ours.
        asked_to_end_by: after this signal it has `grace_s` before it is killed.
        tree: its children get the signal, too.
    """

    name: str
    command: Sequence[str]
    variables: Mapping[str, str | None] = field(default_factory=dict)
    user: Mapping[str, Any] = field(default_factory=dict)
    asked_to_end_by: signal.Signals = signal.SIGTERM
    grace_s: float = 5.0
    tree: bool = True


def inherited(home: Path) -> dict[str, str | None]:
    """The variables of the supervisor and everything below it."""
    return {
        **QUIET,
        MARK: str(home),
        "SLIMLINE_HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": None,
        "MLFLOW_TRACKING_URI": None,
        "PYTHONUNBUFFERED": "1",
    }


def store(plan: Plan) -> Program:
    """The S3 server."""
    command, variables = seaweedfs.server(plan.home / "seaweedfs", plan.ports, credentials(plan.home))
    return Program("s3", command, variables, grace_s=2.0)  # it has written everything at once, and stays for 15 s


def buckets(plan: Plan) -> Program:
    """The step that makes the buckets that are missing."""
    return Program("buckets", [sys.executable, "-c", BUCKETS], for_s3(plan))


def for_s3(plan: Plan) -> dict[str, str | None]:
    """How a process of ours reaches the S3 server."""
    return {"SLIMLINE_S3_ENDPOINT_URL": plan.addresses.s3_url, **credentials(plan.home).for_s3()}


def artifact_store(plan: Plan) -> dict[str, str | None]:
    """Where the worker keeps artifacts and results: in the S3 server, unless the user has named another S3.

    Results name MLflow's runs, so each database has its own.
    """
    if settings().store or settings().s3_endpoint_url:
        return {}
    return {**for_s3(plan), "SLIMLINE_STORE": f"s3://{seaweedfs.STORE}/{plan.database}"}


def database(plan: Plan) -> Program:
    """The PostgreSQL server."""
    directory = plan.home / "postgres"
    return Program(
        "postgres",
        postgres.server(directory, plan.ports["postgres"]),
        user=postgres.as_user(directory),
        asked_to_end_by=signal.SIGINT,
        tree=False,
    )


def databases(plan: Plan) -> Program:
    """The step that makes the databases that are missing."""
    command = postgres.create_databases(plan.ports["postgres"], ("mlflow", "prefect"))
    return Program("databases", command, for_postgres(plan))


def for_postgres(plan: Plan) -> dict[str, str]:
    """How a process shows who it is; nothing for SQLite."""
    if plan.database == "sqlite":
        return {}
    password = credentials(plan.home).postgres_password.get_secret_value()
    return postgres.password_file(plan.home / "pgpass", plan.ports["postgres"], password)


def mlflow_migration(plan: Plan) -> Program:
    """The step that brings MLflow's database to the present schema.

    In a process of its own: whoever imports MLflow's database code keeps 200 MiB of it.
    """
    if plan.database == "sqlite":
        return Program("mlflow-database", [sys.executable, "-c", MIGRATE])
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", _mlflow_database(plan)]
    return Program("mlflow-database", command, for_postgres(plan))


def prefect_migration(plan: Plan) -> Program:
    """The step that brings Prefect's database to the present schema."""
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    return Program("prefect-database", command, _prefect_database(plan))


def mlflow(plan: Plan) -> Program:
    """The tracking server. Files of runs pass through it to the S3 server, so that nobody else needs the keys."""
    # fmt: off
    options = [
        "--host", HOST, "--port", str(plan.ports["mlflow"]), "--workers", "1",
        "--backend-store-uri", _mlflow_database(plan), "--artifacts-destination", f"s3://{seaweedfs.FILES_OF_RUNS}",
    ]
    # fmt: on
    variables = {
        **for_postgres(plan),
        **credentials(plan.home).for_s3(),
        "MLFLOW_S3_ENDPOINT_URL": plan.addresses.s3_url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a quarter of a GiB for jobs that nobody here starts
    }
    return Program("mlflow", [sys.executable, "-m", "mlflow", "server", *options], variables)


def prefect(plan: Plan) -> Program:
    """The server of flow runs, schedules and automations, with its page."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(plan.ports["prefect"])]
    variables = {
        **_prefect_database(plan),
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_SERVER_METRICS_ENABLED": "true",
        # In memory they end with the server, and runs that hold a slot end with them.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_UI_STATIC_DIRECTORY": str(plan.home / "prefect" / "ui"),  # else it writes into site-packages
    }
    return Program("prefect", command, variables)


def deployments(plan: Plan) -> Program:
    """The step that tells Prefect what can be started here."""
    return Program("deployments", plan.deploy, {"PREFECT_API_URL": plan.addresses.prefect_api_url, **_our_code()})


def worker(plan: Plan) -> Program:
    """What runs the flow runs of the pool, one at a time: two would spoil each other's timing."""
    # fmt: off
    options = [
        "--pool", POOL, "--type", "process", "--name", "local", "--limit", "1", "--install-policy", "never",
        "--with-healthcheck",
    ]
    # fmt: on
    variables = {
        **_our_code(),
        **artifact_store(plan),
        "PREFECT_API_URL": plan.addresses.prefect_api_url,
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
        "PREFECT_WORKER_QUERY_SECONDS": "5",
        "PREFECT_WORKER_WEBSERVER_HOST": HOST,
        "PREFECT_WORKER_WEBSERVER_PORT": str(plan.ports["worker"]),
    }
    return Program("worker", [sys.executable, "-m", "prefect", "worker", "start", *options], variables)


def releaser(plan: Plan) -> Program:
    """What promotes and rolls back. Its ledger and copies are below the home, where the command line has them, too."""
    options = ["--pool", RELEASE_POOL, "--type", "process", "--name", "release", "--install-policy", "never"]
    variables = {
        **_our_code(),
        "PREFECT_API_URL": plan.addresses.prefect_api_url,
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "PREFECT_WORKER_QUERY_SECONDS": "5",
    }
    return Program("releaser", [sys.executable, "-m", "prefect", "worker", "start", *options], variables)


STOPPED_IN_ORDER = (("worker", "releaser"), ("mlflow", "prefect"), ("s3", "postgres"))
"""Flows before the servers they report to, those before what they write to."""


def _our_code() -> dict[str, str]:
    """Flow runs start in a directory of their own; in a checkout, the code of that checkout is meant."""
    return {"PYTHONPATH": str(ROOT)} if (ROOT / "pyproject.toml").exists() else {}


def _mlflow_database(plan: Plan) -> str:
    if plan.database == "sqlite":
        return f"sqlite:///{plan.home / 'mlflow.db'}"
    return postgres.address("postgresql", plan.ports["postgres"], "mlflow")


def _prefect_database(plan: Plan) -> dict[str, str]:
    if plan.database == "sqlite":
        return {}  # below PREFECT_HOME, migrated at the start
    return {
        **for_postgres(plan),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres.address(
            "postgresql+asyncpg", plan.ports["postgres"], "prefect"
        ),
        "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
    }
