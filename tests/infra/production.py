"""The production configuration on loopback: PostgreSQL, Redis, S3, MLflow with accounts, Prefect, process workers.

Every server is the one of production with the settings of mlflow/server.env and docs/deployment.md; every process is
started in a group of its own and ended with the fixture.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from infra.services import Addresses, postgres
from infra.services.processes import MARK, kill
from infra.settings import QUIET
from tests.infra.asking import ask, end_group, wait_until

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
POOLS = ("cpu", "gpu-sm90")
DATABASES = ("mlflow", "mlflow_auth", "prefect")


@dataclass
class Production:
    """Running servers and what is needed to talk to them."""

    where: Path
    ports: dict[str, int]
    servers: Addresses
    s3_keys: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("postgres", "redis", "mlflow-admin", "mlflow-worker", "mlflow-session", "prefect")
        self.secrets = {name: secrets.token_hex(12) for name in names}

    def start(self, name: str, command: Sequence[str], *, cwd: Path = ROOT, user: Any = None, **env: str) -> None:
        with (self.where / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env=self.environment(**env),
                start_new_session=True,
                **(user or {}),
            )

    def once(self, name: str, command: Sequence[str], **env: str) -> str:
        """What the step said."""
        done = subprocess.run(
            list(command), cwd=ROOT, env=self.environment(**env), capture_output=True, text=True, timeout=300
        )
        (self.where / f"{name}.log").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, (name, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def environment(self, **env: str) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        mine = {MARK: str(self.where), "PGPASSFILE": str(self.where / "pgpass"), "PREFECT_HOME": str(self.where / "p")}
        return {**ours, **QUIET, **mine, **env}

    def end(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End the process and its group, and wait for it."""
        process = self.processes.pop(name)
        os.killpg(process.pid, how)
        process.wait(60)

    def end_all(self) -> None:
        for process in self.processes.values():
            end_group(process)
        kill(self.where)  # flow runs have groups of their own

    def log(self, name: str) -> str:
        return (self.where / f"{name}.log").read_text(errors="replace")

    # What clients do

    def mlflow(self, path: str, body: Any = None, **headers: str) -> Any:
        headers = {"Authorization": _basic("admin", self.secrets["mlflow-admin"]), **headers}
        return _content(f"{self.servers.mlflow_url}/{path}", body, headers)

    def prefect(self, path: str, body: Any = None) -> Any:
        headers = {"Authorization": _basic("slimline", self.secrets["prefect"])}
        return _content(f"{self.servers.prefect_api_url}/{path}", body, headers)

    @contextmanager
    def prefect_client(self) -> Iterator[SyncPrefectClient]:
        """Prefect's own, which knows its types."""
        here = {PREFECT_API_URL: self.servers.prefect_api_url}
        here[PREFECT_API_AUTH_STRING] = f"slimline:{self.secrets['prefect']}"
        with temporary_settings(here), get_client(sync_client=True) as client:
            yield client

    def run(self, deployment: str, **parameters: Any) -> str:
        """The id of a new flow run of a deployment, FLOW/NAME."""
        found = self.prefect(f"deployments/name/{deployment}")
        return str(self.prefect(f"deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"])

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.prefect(f"flow_runs/{run}")["state"])

    def task_states(self, run: str) -> dict[str, list[str]]:
        """The states that task runs of a flow run ended in, by the name of the task run without its number."""
        found: dict[str, list[str]] = {}
        query = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        for task in self.prefect("task_runs/filter", query):
            found.setdefault(task["name"], []).append(task["state"]["name"])
        return found

    def worker_environment(self, name: str) -> dict[str, str]:
        return {
            "SLIMLINE_HOME": str(self.where / name),
            "SLIMLINE_PREFECT_API_URL": self.servers.prefect_api_url,
            "SLIMLINE_TRACKING_URI": self.servers.mlflow_url,
            "SLIMLINE_STORE": "s3://slimline/production",
            "SLIMLINE_S3_ENDPOINT_URL": self.servers.s3_url,
            **self.s3_keys,
            "SLIMLINE_REDIS_URL": f"redis://:{self.secrets['redis']}@127.0.0.1:{self.ports['redis']}/2",
            "PREFECT_API_URL": self.servers.prefect_api_url,
            "PREFECT_API_AUTH_STRING": f"slimline:{self.secrets['prefect']}",
            "MLFLOW_TRACKING_USERNAME": "worker",
            "MLFLOW_TRACKING_PASSWORD": self.secrets["mlflow-worker"],
        }

    # The servers

    def start_postgres(self) -> None:
        directory = self.where / "postgres"
        postgres.create(directory, self.secrets["postgres"], self.environment())
        postgres.password_file(self.where / "pgpass", self.ports["postgres"], self.secrets["postgres"])
        command = postgres.server(directory, self.ports["postgres"])
        self.start("postgres", command, cwd=Path("/"), user=postgres.as_user(directory))
        databases = postgres.create_databases(self.ports["postgres"], DATABASES)

        def made() -> bool:
            return subprocess.run(databases, env=self.environment(), capture_output=True).returncode == 0

        wait_until(made, 30, "PostgreSQL")

    def start_redis(self, program: str) -> None:
        options = ["--port", str(self.ports["redis"]), "--bind", "127.0.0.1", "--dir", str(self.where), "--save", ""]
        configuration = self.where / "redis.conf"  # a password in the command would be everybody's to read
        configuration.write_text(f"requirepass {self.secrets['redis']}\n")
        self.start("redis", [program, str(configuration), *options])

    def migrate(self) -> None:
        """The one-shot steps of mlflow/README.md and docs/deployment.md, in the order that is there."""
        self.once("mlflow-db", [PYTHON, "-m", "mlflow", "db", "upgrade", self.database("mlflow")])
        auth = ["-m", "mlflow.server.auth", "db", "upgrade", "--url", self.database("mlflow_auth")]
        self.once("mlflow-auth-db", [PYTHON, *auth])
        upgrade = ["-m", "prefect", "server", "database", "upgrade", "--yes"]
        self.once("prefect-db", [PYTHON, *upgrade], **self._prefect_environment())

    def database(self, name: str, scheme: str = "postgresql") -> str:
        return postgres.address(scheme, self.ports["postgres"], name)

    def start_mlflow(self) -> None:
        auth = self.where / "basic_auth.ini"
        auth.write_text(
            "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
            f"database_uri = {self.database('mlflow_auth')}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        options = ["--host", "127.0.0.1", "--port", str(self.ports["mlflow"]), "--workers", "1"]
        options += ["--app-name", "basic-auth", "--expose-prometheus", str(self.where / "metrics")]
        self.start(
            "mlflow",
            [PYTHON, "-m", "mlflow", "server", *options],
            **{
                **server_env(),
                **self.s3_keys,
                "MLFLOW_BACKEND_STORE_URI": self.database("mlflow"),
                "MLFLOW_SERVER_ALLOWED_HOSTS": "127.0.0.1:*",
                "MLFLOW_S3_ENDPOINT_URL": self.servers.s3_url,
                "AWS_DEFAULT_REGION": "us-east-1",
                "MLFLOW_AUTH_CONFIG_PATH": str(auth),
                "MLFLOW_AUTH_ADMIN_PASSWORD": self.secrets["mlflow-admin"],
                "MLFLOW_FLASK_SERVER_SECRET_KEY": self.secrets["mlflow-session"],
            },
        )

    def mlflow_answers(self) -> bool:
        return _answers(lambda: self.mlflow("api/2.0/mlflow/experiments/search", {"max_results": 1}))

    def create_accounts(self) -> None:
        account = {"username": "worker", "password": self.secrets["mlflow-worker"]}
        self.mlflow("api/2.0/mlflow/users/create", account)

    def _prefect_environment(self) -> dict[str, str]:
        redis = f"redis://:{self.secrets['redis']}@127.0.0.1:{self.ports['redis']}"
        return {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database("prefect", "postgresql+asyncpg"),
            "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
            "PREFECT_SERVER_API_AUTH_STRING": f"slimline:{self.secrets['prefect']}",
            "PREFECT_API_AUTH_STRING": f"slimline:{self.secrets['prefect']}",
            "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
            "PREFECT_MESSAGING_CACHE": "prefect_redis.messaging",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
            "PREFECT_REDIS_MESSAGING_URL": f"{redis}/0",
            "PREFECT_SERVER_DOCKET_URL": f"{redis}/1",
            "PREFECT_SERVER_METRICS_ENABLED": "true",
            "PREFECT_UI_STATIC_DIRECTORY": str(self.where / "ui"),
        }

    def start_prefect(self) -> None:
        command = [PYTHON, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
        self.start("prefect", [*command, "--port", str(self.ports["prefect"])], **self._prefect_environment())

    def prefect_answers(self) -> bool:
        return _answers(lambda: self.prefect("flows/paginate", {}))

    def deploy(self) -> None:
        """prefect.yaml, and beside it a flow that does nothing but hold a slot, and one in a pool without workers."""
        content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
        hold = {"name": "hold", "entrypoint": "tests.infra.held_slot.hold", "work_pool": {"name": "gpu-sm90"}}
        hold["work_pool"]["job_variables"] = {"env": {"PREFECT_CLIENT_METRICS_ENABLED": "false"}}
        idle = {"name": "idle", "entrypoint": "flows.fanning.make_candidate", "work_pool": {"name": "trt-sm90"}}
        content["deployments"] += [hold, idle]
        (self.where / "prefect.yaml").write_text(yaml.safe_dump(content))
        command = [PYTHON, "-m", "flows.cli", "deploy", "--file", str(self.where / "prefect.yaml")]
        self.once("deploy", command, **self.worker_environment("cpu"))

    def start_worker(self, pool: str, machine: str = "", **env: str) -> None:
        """A worker with a home of its own, as on a machine of its own; the default is named like its pool."""
        name = machine or pool
        command = [PYTHON, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--limit", "1"]
        self.start(
            f"worker-{name}",
            [*command, "--install-policy", "never"],
            **{
                **self.worker_environment(name),
                "PYTHONPATH": str(ROOT),  # elsewhere, Slimline is installed
                "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
                "PREFECT_WORKER_QUERY_SECONDS": "2",
                "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
                "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
                **env,
            },
        )

    def has_worker(self, pool: str, count: int = 1) -> bool:
        online = {"workers": {"status": {"any_": ["ONLINE"]}}}
        return len(self.prefect(f"work_pools/{pool}/workers/filter", online)) >= count

    def below(self, worker: str) -> list[psutil.Process]:
        """What a worker has started, all generations."""
        return psutil.Process(self.processes[f"worker-{worker}"].pid).children(recursive=True)

    def kill_machine(self, worker: str) -> None:
        """SIGKILL to a worker and all that it runs at once, as when its machine goes."""
        family = [psutil.Process(self.processes[f"worker-{worker}"].pid), *self.below(worker)]
        for how in (signal.SIGSTOP, signal.SIGKILL):  # nobody may still say that somebody died
            for process in family:
                process.send_signal(how)
        self.processes.pop(f"worker-{worker}").wait(30)

    def s3(self) -> Any:
        keys = {name.lower(): value for name, value in self.s3_keys.items()}
        return boto3.client("s3", endpoint_url=self.servers.s3_url, region_name="us-east-1", **keys)


def server_env() -> dict[str, str]:
    """What a shell makes of mlflow/server.env."""
    script = "set -a; . mlflow/server.env; env -0"
    said = subprocess.run(["sh", "-c", script], cwd=ROOT, env={}, capture_output=True, check=True).stdout.decode()
    pairs = (line.split("=", 1) for line in said.split("\0") if line)
    return {name: value for name, value in pairs if name.startswith("MLFLOW_")}


def _content(url: str, body: Any, headers: Mapping[str, str]) -> Any:
    """The JSON, or text, that a server answers."""
    text = ask(url, body, headers)[1].decode()
    return json.loads(text) if text[:1] in ("{", "[") else text


def _answers(call: Callable[[], Any]) -> bool:
    try:
        call()
    except OSError:
        return False
    return True


def _basic(user: str, password: str) -> str:
    return f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"
