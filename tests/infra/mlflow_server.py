"""An MLflow server on loopback, with SQLite and files in a folder; with accounts where they are asked for."""

import os
import secrets
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.settings import QUIET
from tests.infra.asking import ask_json, end_group, unused_port, wait_until

ADMIN = "admin"


@dataclass
class Server:
    """A running server; `passwords` of its accounts, none where it has none."""

    url: str
    passwords: dict[str, str] = field(default_factory=dict)

    def of(self, user: str) -> dict[str, str]:
        """The variables that MLflow's client reads, for an account."""
        return {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": self.passwords[user]}

    def create_account(self, user: str) -> None:
        self.passwords[user] = secrets.token_hex(12)
        body = {"username": user, "password": self.passwords[user]}
        self.ask("api/2.0/mlflow/users/create", body)

    def ask(self, path: str, body: Any = None) -> Any:
        """What the admin is answered."""
        headers = {}
        if self.passwords:
            known = f"{ADMIN}:{self.passwords[ADMIN]}".encode()
            headers = {"Authorization": f"Basic {b64encode(known).decode()}"}
        return ask_json(f"{self.url}/{path}", body, headers=headers)


@contextmanager
def mlflow_server(where: Path, *, accounts: bool = False, **variables: str) -> Iterator[Server]:
    """A server that answers; it ends with the block.

    Args:
        where: a folder for its database and files.
        accounts: whoever has none is refused; the server's `passwords` has the admin's.
        variables: more of its environment.
    """
    server = Server(f"http://127.0.0.1:{unused_port()}")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment: Mapping[str, str] = {**ours, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **variables}
    options = ["--host", "127.0.0.1", "--port", server.url.rpartition(":")[2], "--workers", "1"]
    options += ["--backend-store-uri", f"sqlite:///{where / 'mlflow.db'}"]
    options += ["--artifacts-destination", str(where / "artifacts")]
    if accounts:
        server.passwords[ADMIN] = secrets.token_hex(12)
        (where / "basic_auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\nadmin_username = {ADMIN}\n"
            f"database_uri = sqlite:///{where / 'accounts.db'}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        options += ["--app-name", "basic-auth"]
        environment = {
            **environment,
            "MLFLOW_AUTH_CONFIG_PATH": str(where / "basic_auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": server.passwords[ADMIN],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(12),
        }
    with (where / "mlflow.log").open("wb") as log:
        command = [sys.executable, "-m", "mlflow", "server", *options]
        process = subprocess.Popen(command, cwd=where, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:

        def answers() -> bool:
            assert process.poll() is None, (where / "mlflow.log").read_text()
            server.ask("api/2.0/mlflow/experiments/search", {"max_results": 1})
            return True

        wait_until(answers, 600, "MLflow")
        yield server
    finally:
        end_group(process)
