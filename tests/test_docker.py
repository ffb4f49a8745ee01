"""Images, compose.yaml and their scripts: what can be tried without a container engine."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
OUR_IMAGES = re.compile(r"^slimline-(mlflow|prefect|worker)(:(cpu|cuda))?$")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DOCKER / "compose.yaml").read_text()))


def sh(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    command = ["sh", str(DOCKER / script), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def test_compose_file_keeps_to_the_specification(compose):
    assert PyCompose.from_json(json.dumps(compose)).service_names() == list(compose["services"])
    broken = {**compose, "services": {**compose["services"], "redis": {"image": "redis:7", "restarts": "always"}}}
    with pytest.raises(ValueError, match="restarts"):
        PyCompose.from_json(json.dumps(broken))


def test_what_a_service_names_exists(compose):
    for name, service in compose["services"].items():
        assert set(service.get("depends_on", ())) <= compose["services"].keys(), name
        assert set(service.get("secrets", ())) <= compose["secrets"].keys(), name
        assert {each["source"] for each in service.get("configs", ())} <= compose["configs"].keys(), name
        volumes = {each.partition(":")[0] for each in service.get("volumes", ())}
        assert volumes <= compose["volumes"].keys(), name


def test_services_are_built_from_stages_of_the_dockerfile(compose):
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE))
    for service in compose["services"].values():
        assert bool(OUR_IMAGES.match(service["image"])) == ("build" in service)
        if "build" in service:
            assert service["build"]["target"] in stages


def test_servers_are_published_on_loopback_only(compose):
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports == ["127.0.0.1:5000:5000", "127.0.0.1:4200:4200"]


def test_our_containers_are_hardened_and_their_health_is_asked(compose):
    for name, service in compose["services"].items():
        if "build" in service:
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
    dockerfile = (DOCKER / "Dockerfile").read_text()
    running = [stage for stage in re.split(r"^FROM ", dockerfile, flags=re.MULTILINE) if "\nENTRYPOINT" in stage]
    assert len(running) == 3
    for stage in running:
        assert "\nUSER 10001:10001\n" in stage
        assert "\nHEALTHCHECK " in stage


def test_every_secret_is_made_and_none_is_written_in_the_files(compose, tmp_path):
    assert sh("make-secrets.sh", str(tmp_path)).returncode == 0
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    wanted = {Path(secret["file"]).name for secret in compose["secrets"].values()}
    assert wanted == made.keys()
    (identity,) = json.loads(made["s3_identities"])["identities"]
    assert identity["credentials"][0]["secretKey"] == made["AWS_SECRET_ACCESS_KEY"]
    assert len({made[name] for name in ("PGPASSWORD", "REDISCLI_AUTH", "MLFLOW_TRACKING_PASSWORD")}) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9_=-]{32}", made[name]) for name in ("PGPASSWORD", "AWS_SECRET_ACCESS_KEY"))
    sh("make-secrets.sh", str(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == made, "a second time changes nothing"
    variables = [name for service in compose["services"].values() for name in service.get("environment", ())]
    assert not [name for name in variables if re.search("PASSWORD$|SECRET|TOKEN|AUTH_STRING", name)]


def test_secrets_become_variables_and_nothing_else_does(tmp_path):
    (tmp_path / "PGPASSWORD").write_text("pa$s 'word\"\n")
    (tmp_path / "HOME").write_text("not-this")
    (tmp_path / "s3_identities").write_text("{}")
    (tmp_path / "1BAD").write_text("x")
    show = "import os, json; print(json.dumps(dict(os.environ)))"
    done = sh("with-secrets.sh", sys.executable, "-c", show, SECRETS_DIR=str(tmp_path), HOME="/kept")
    found = json.loads(done.stdout)
    assert found["PGPASSWORD"] == "pa$s 'word\""
    assert found["HOME"] == "/kept"
    assert not {"s3_identities", "1BAD"} & found.keys()
    assert sh("with-secrets.sh", "echo", "fine", SECRETS_DIR=str(tmp_path / "absent")).stdout == "fine\n"
    assert sh("with-secrets.sh", "sh", "-c", "exit 7", SECRETS_DIR=str(tmp_path)).returncode == 7


class Api(BaseHTTPRequestHandler):
    """Answers POSTs of one account."""

    def do_POST(self) -> None:
        right = self.headers["Authorization"] == "Basic YWRtaW46cGFzcw=="  # admin:pass
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200 if right and asked == {"max_results": 1} else 401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_health_is_what_the_api_says():
    server = HTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = {"HEALTHY_URL": f"http://127.0.0.1:{server.server_address[1]}/api"}
    try:
        assert sh("healthy.sh", "mlflow", MLFLOW_AUTH_ADMIN_PASSWORD="pass", **address).returncode == 0
        refused = sh("healthy.sh", "mlflow", MLFLOW_AUTH_ADMIN_PASSWORD="old", **address)
        assert refused.returncode == 1
        assert "401" in refused.stderr
    finally:
        server.shutdown()
        server.server_close()
    gone = sh("healthy.sh", "mlflow", **address)
    assert gone.returncode == 1
    assert "refused" in gone.stderr
    assert sh("healthy.sh", "mysql").returncode == 2


@pytest.mark.parametrize("requirements", ["mlflow-server.txt", "prefect-server.txt"])
def test_every_library_of_a_server_is_pinned(requirements):
    def names(file: Path) -> set[str]:
        found = re.findall(r"^([A-Za-z0-9._-]+)", file.read_text(), re.MULTILINE)
        return {re.sub(r"[-_.]+", "-", name).lower() for name in found}

    assert names(DOCKER / requirements) - names(ROOT / "constraints.txt") == set()


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "docker/Dockerfile"],
        ["shellcheck", *sorted(path.relative_to(ROOT).as_posix() for path in DOCKER.glob("*.sh"))],
    ],
    ids=lambda command: command[0],
)
def test_linters_have_nothing_to_say(command):
    tool = shutil.which(command[0], path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip(f"{command[0]} is not installed; it comes with the extra 'dev'")
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
