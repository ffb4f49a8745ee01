"""MLflow's webhooks, as MLflow's documentation says they are signed; and from end to end with real servers."""

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import time
import urllib.error
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from fastapi.testclient import TestClient

from flows.examining import EXAMINED, PASSED, reconcile
from infra import bridge, registry
from infra.settings import environment, settings
from infra.signing import Unverified
from infra.tracking import client, start_flow
from tests.infra.asking import ask, ask_json, end_group, unused_port, wait_until
from tests.infra.mlflow_server import mlflow_server
from tests.infra.production import server_env
from tests.infra.registering import code, tiny

ROOT = Path(__file__).parents[2]
SECRET = "a secret of sixteen or more"
ALIAS = {
    "entity": "model_version_alias",
    "action": "created",
    "timestamp": "2026-11-30T20:00:00+00:00",
    "data": {"name": "tiny", "alias": "candidate", "version": "7"},
}


def signed(content: object, *, secret: str = SECRET, at: float | None = None, delivery: str = "d1") -> dict:
    """A request as MLflow sends it: X-MLflow-Signature is v1,base64(HMAC-SHA256(secret, id.time.body))."""
    body, sent_at = json.dumps(content), str(int(time.time() if at is None else at))
    mac = hmac.new(secret.encode(), f"{delivery}.{sent_at}.{body}".encode(), hashlib.sha256).digest()
    return {
        "content": body,
        "headers": {
            "X-MLflow-Delivery-Id": delivery,
            "X-MLflow-Timestamp": sent_at,
            "X-MLflow-Signature": f"v1,{base64.b64encode(mac).decode()}",
        },
    }


@pytest.fixture
def told(monkeypatch):
    """The events that Prefect was told, in place of a server."""
    events = []

    async def tell(event):
        events.append(event)

    monkeypatch.setattr(bridge, "tell", tell)
    return events


@pytest.fixture
def clients(told):
    return TestClient(bridge.build(SECRET))


def test_an_alias_that_was_set_becomes_an_event_about_its_model(clients, told):
    assert clients.post("/", **signed(ALIAS)).status_code == 204
    (event,) = told
    assert event.event == "mlflow.model_version_alias.created"
    assert event.resource.id == "mlflow.registered-model.tiny"
    assert event.resource["mlflow.alias"] == "candidate"
    assert event.payload == {"name": "tiny", "alias": "candidate", "version": "7"}


def test_a_delivery_that_comes_twice_is_one_event(clients, told):
    for delivery in ("d1", "d1", "d2"):
        clients.post("/", **signed(ALIAS, delivery=delivery))
    first, again, other = (event.id for event in told)
    assert first == again != other


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (signed(ALIAS, secret="another secret"), "must be signed with SLIMLINE_WEBHOOK_SECRET"),
        ({**signed(ALIAS), "content": json.dumps({**ALIAS, "action": "deleted"})}, "must be signed"),
        (signed(ALIAS, at=time.time() - 1000), "at most 300 s old"),
        (signed(ALIAS, at=time.time() + 1000), "at most 300 s old"),
        ({"content": json.dumps(ALIAS)}, "at most 300 s old"),
    ],
)
def test_what_mlflow_did_not_send_now_is_refused(request_, message, clients, told):
    answer = clients.post("/", **request_)
    assert answer.status_code == 401
    assert message in answer.text
    assert told == []


@pytest.mark.parametrize("content", [[], {}, {"entity": "x", "action": "y"}, {"entity": 1, "action": 2, "data": []}])
def test_what_is_no_event_of_the_registry_is_refused(content, clients, told):
    assert clients.post("/", **signed(content)).status_code == 400
    assert clients.post("/", **signed({**ALIAS, "data": {"name": "example_model"}})).status_code == 204  # button Test
    assert clients.post("/", content=b"x" * (2**20 + 1)).status_code == 413
    assert told == []


def test_mlflow_is_asked_to_send_it_again_when_prefect_is_away(clients, monkeypatch):
    async def tell(event):
        raise ConnectionError("nobody listens")

    monkeypatch.setattr(bridge, "tell", tell)
    assert clients.post("/", **signed(ALIAS)).status_code == 502  # which it tries again


def test_a_bridge_without_a_secret_says_so(monkeypatch):
    monkeypatch.delenv("SLIMLINE_WEBHOOK_SECRET", raising=False)
    settings.cache_clear()
    with pytest.raises(ValueError, match="SLIMLINE_WEBHOOK_SECRET is not set"):
        bridge.secret()


# From end to end


@contextmanager
def running(where: Path, name: str, *arguments: str, **env: str):
    with (where / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment(**env),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end_group(process)


@pytest.fixture
def servers(tmp_path, monkeypatch):
    """MLflow, Prefect and the bridge between them; this process registers at that MLflow."""
    ports = {name: unused_port() for name in ("prefect", "bridge")}
    api = f"http://127.0.0.1:{ports['prefect']}/api"
    named = {name: value for name, value in server_env().items() if "_WEBHOOK_" in name}
    allowed = {**named, "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode()}
    allowed["MLFLOW_WEBHOOK_CACHE_TTL"] = "0"  # a new webhook is heard of at once, not after a minute
    prefect = {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_UI_STATIC_DIRECTORY": str(tmp_path / "ui")}
    where = ("--host", "127.0.0.1", "--port")
    with (
        mlflow_server(tmp_path, **allowed) as mlflow,
        running(tmp_path, "prefect", "prefect", "server", "start", *where, str(ports["prefect"]), **prefect),
    ):
        mine = {
            "SLIMLINE_HOME": str(tmp_path / "home"),
            "SLIMLINE_TRACKING_URI": mlflow.url,
            "SLIMLINE_PREFECT_API_URL": api,
            "SLIMLINE_WEBHOOK_SECRET": SECRET,
            "PREFECT_API_URL": api,
        }
        for name, value in mine.items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()
        wait_until(lambda: ask(f"{api}/health")[0] == 200, 180, "Prefect")
        with running(tmp_path, "bridge", "flows.cli", "bridge", "--port", str(ports["bridge"])):
            address = f"http://127.0.0.1:{ports['bridge']}/"
            wait_until(lambda: ask(f"{address}health")[0] == 200, 120, "the bridge")
            yield api, address, tmp_path
    settings.cache_clear()


@pytest.mark.servers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_new_candidate_is_examined_and_one_that_was_missed_is_found(servers):
    api, address, where = servers
    parent = start_flow("tiny", recipe_json="{}", tags={})
    given = code(where / "code")

    def register(content: str) -> str:
        return registry.register("tiny", bundle=tiny(content), parent=parent, verdict="ACCEPT", **given).version

    missed = register("before there is a webhook")
    for command in (["deploy", "--pool", "release"], ["webhook", address]):
        done = subprocess.run([sys.executable, "-m", "flows.cli", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(address, ALIAS)
    assert runs_of_examine(api) == []
    version = register("after")
    (run,) = wait_until(lambda: runs_of_examine(api), 60, "the automation")
    assert run["parameters"] == {"model": "tiny", "version": version}
    assert run["created_by"]["type"] == "AUTOMATION"

    client().set_registered_model_alias("tiny", "candidate", missed)
    assert reconcile.fn() == {f"models:/tiny/{missed}": PASSED}
    assert client().get_model_version("tiny", missed).tags[EXAMINED] == PASSED
    assert reconcile.fn() == {}  # once

    stored = client().get_logged_model(client().get_model_version("tiny", version).tags["model_id"])
    (engine,) = (where / "artifacts").glob(f"*/models/{stored.model_id}/artifacts/artifacts/files/manifest.json")
    engine.write_bytes(engine.read_bytes().replace(b"after", b"afteR"))
    client().set_registered_model_alias("tiny", "candidate", version)
    with pytest.raises(Unverified, match=r"Version 2 of tiny must not be used. File artifacts/files/manifest.json"):
        reconcile.fn()
    assert client().get_model_version("tiny", version).tags[EXAMINED].startswith("failed: Version 2 of tiny")


def runs_of_examine(api: str) -> list[dict]:
    return ask_json(f"{api}/flow_runs/filter", {"flows": {"name": {"any_": ["examine"]}}})
