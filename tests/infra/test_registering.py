"""Many who register at once, at a real MLflow server; and who may."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from flows.cli import app
from infra import registry
from infra.hardware import hardware
from infra.settings import environment, settings
from infra.signing import Unverified
from infra.tracking import Parent, client, start_flow
from tests.infra import registering
from tests.infra.mlflow_server import mlflow_server

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def parent(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLIMLINE_TRACKING_URI", server.url)
    settings.cache_clear()
    yield start_flow("many", recipe_json="{}", tags={})
    settings.cache_clear()


@pytest.mark.parametrize(
    ("num_processes", "each"), [(4, 6), pytest.param(8, 25, marks=pytest.mark.real)], ids=["24", "200"]
)
def test_many_who_register_at_once_lose_nothing(num_processes, each, server, parent, tmp_path):
    try:
        made = registered_at_once(num_processes, each, parent, tmp_path)
        versions = list(client().search_model_versions("name = 'many'", max_results=1000))
        total = num_processes * each + 1  # and the one that all have
        assert len(versions) == total
        assert len(set(made)) == total
        assert Counter(sha256 for sha256, _ in made).most_common(2)[0][1] == num_processes
        known = {version.tags["sha256"]: str(version.version) for version in versions}
        assert known == dict(made)
        assert sorted(int(version.version) for version in versions) == list(range(1, total + 1))
        assert client().get_registered_model("many").aliases["candidate"] in known.values()
    finally:
        client().delete_registered_model("many")


def registered_at_once(num_processes: int, each: int, parent: Parent, folder: Path) -> list[tuple[str, str]]:
    """Digest and version of what each process registered."""
    module = [sys.executable, "-m", "tests.infra.registering", parent.model_dump_json()]
    running = [
        subprocess.Popen(
            [*module, f"process-{number}", str(each), str(folder)],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(num_processes)
    ]
    said = [process.communicate(timeout=1200) for process in running]
    assert [process.returncode for process in running] == [0] * num_processes, [err[-2000:] for _, err in said]
    return [(sha256, version) for out, _ in said for sha256, version in json.loads(out.splitlines()[-1])]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with accounts: its admin's, a trainer's and a releaser's."""
    with mlflow_server(tmp_path_factory.mktemp("guarded"), accounts=True) as found:
        for name in ("ci", "release"):
            found.create_account(name)
        yield found


@pytest.fixture
def become(guarded, tmp_path, monkeypatch):
    """Makes this process one with an account's credentials, and a home of its own."""

    def act(name: str, **env: str) -> None:
        named = {"SLIMLINE_TRACKING_URI": guarded.url, "SLIMLINE_HOME": str(tmp_path / name), **guarded.of(name), **env}
        for variable, value in named.items():
            monkeypatch.setenv(variable, value)
        settings.cache_clear()

    yield act
    settings.cache_clear()


def slimline(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, " ".join((done.stdout + done.stderr).split())


def test_a_trainer_submits_and_only_a_releaser_registers_and_moves_the_champion(become, tmp_path):
    roles = ("roles", "--model", "many", "--trainer", "ci", "--releaser", "release")
    become("admin")
    code, said = slimline(*roles)
    assert code == 0, said
    assert said == "ci is a trainer release is a releaser ci may only read many"
    assert slimline(*roles) == (0, said)  # may be repeated

    become("ci")
    submitted = registering.submit()
    assert registering.submit() == submitted  # once
    with pytest.raises(MlflowException, match="Permission denied"):
        client().create_model_version("many", source=f"models:/{submitted.model_id}")

    become("release")
    code, said = slimline("admit")
    assert code == 2
    assert "none is trusted here" in said
    become("release", SLIMLINE_TRUSTED_KEYS=str(tmp_path / "ci" / "keys" / "trusted.pem"))
    assert slimline("admit") == (0, "registered many version 1: models:/many@candidate")
    assert slimline("admit") == (0, "nothing waits to be registered")
    assert client().get_model_version("many", "1").tags["verdict"] == "ACCEPT"

    become("ci")
    assert isinstance(registering.submit(), registry.Version)  # the same bundle is there now
    for alias in ("champion", "candidate", "previous"):
        with pytest.raises(MlflowException, match="Permission denied"):
            client().set_registered_model_alias("many", alias, "1")
    with pytest.raises(MlflowException, match="Permission denied"):
        client().set_model_version_tag("many", "1", "verdict", "REJECT")
    become("release")
    client().set_registered_model_alias("many", "champion", "1")
    assert client().get_registered_model("many").aliases == {"candidate": "1", "champion": "1"}


def test_what_a_trainer_says_beside_what_was_signed_does_not_count(become, tmp_path):
    become("admin")
    assert slimline("roles", "--model", "other", "--trainer", "ci", "--releaser", "release")[0] == 0
    become("ci")
    submitted = registering.submit("other", "told otherwise")
    client().set_logged_model_tags(submitted.model_id, {"hardware": '{"cpu": "a faster one"}', "git_sha": "forged"})
    become("release", SLIMLINE_TRUSTED_KEYS=str(tmp_path / "ci" / "keys" / "trusted.pem"))
    (version,) = registry.admit("other")
    tags = client().get_model_version("other", version.version).tags
    assert tags["hardware"] == json.dumps(hardware())
    assert tags["git_sha"] != "forged"

    become("ci")
    forged = registering.submit("other", "as another")
    client().set_logged_model_tags(forged.model_id, {"sha256": "0" * 64})
    become("release", SLIMLINE_TRUSTED_KEYS=str(tmp_path / "ci" / "keys" / "trusted.pem"))
    with pytest.raises(
        Unverified, match=f"Model {forged.model_id} must not be registered: it was signed as other, ACCEPT"
    ):
        registry.admit("other")


@pytest.mark.parametrize(
    ("account", "arguments", "message"),
    [
        ("ci", ["--trainer", "ci"], "given by MLflow's admin; this is ci, whom the server refuses (403)"),
        ("admin", ["--trainer", "nobody"], "nobody"),
        ("admin", ["--trainer", "ci", "--releaser", "ci"], "ci is to be both"),
        ("admin", [], "--trainer"),
    ],
)
def test_roles_that_cannot_be_given_are_told(account, arguments, message, become):
    become(account)
    code, said = slimline("roles", *arguments)
    assert code == 2
    assert message in said
