"""No pickle, and no secret where somebody else can read it."""

import ast
import importlib
from pathlib import Path

import prefect
import pytest

from infra.failures import silent_server
from infra.settings import PREFIX, Settings, settings
from tests.flows.command_line import slimline

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("flows", "tasks", "infra") for path in (ROOT / package).rglob("*.py"))
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
NAMED_ONLY = {"tasks/calibration/checkpoints.py"}
"""Imports pickle for the name of the error that says that a checkpoint holds more than tensors."""


def unpicklers(source: str) -> list[str]:
    """What in a source reads or writes pickles, or may."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name.endswith(("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps")) or name == "torch.save":
                found.append(name)
            if name == "torch.load" and options.get("weights_only") != "True":
                found.append(f"{name} without weights_only=True")
            if name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                found.append(f"{name} with allow_pickle")
            if options.get("trust_remote_code", "False") != "False":
                found.append(f"{name} with trust_remote_code")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "torch.save(model, file)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_pickle_is_noticed(source):
    assert unpicklers(source)


def test_no_pickle_is_read_or_written():
    found = {path.relative_to(ROOT).as_posix(): unpicklers(path.read_text()) for path in SOURCES}
    assert {name: what for name, what in found.items() if what} == {name: ["pickle"] for name in NAMED_ONLY}


def test_what_prefect_keeps_of_a_task_is_json():
    modules = [importlib.import_module(f"tasks.{path.stem}") for path in sorted((ROOT / "tasks").glob("*.py"))]
    tasks = [value for module in modules for value in vars(module).values() if isinstance(value, prefect.Task)]
    assert len(tasks) > 10
    assert {task.name for task in tasks if task.persist_result and task.result_serializer != "json"} == set()


def test_password_in_an_address_is_not_told_when_its_server_is_silent(tmp_path):
    address = "http://trainer:planted-6f1e@127.0.0.1:9"
    where = {"SLIMLINE_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = slimline("lineage", "models:/tiny@candidate", home=tmp_path, **where)
    assert done.returncode != 0
    assert "6f1e" not in done.stdout + done.stderr
    examined = slimline("doctor", "mlflow", "network", home=tmp_path, SLIMLINE_TRACKING_URI=address)
    assert examined.returncode == 1
    assert "trainer:***@127.0.0.1" in examined.stderr
    assert "6f1e" not in examined.stdout + examined.stderr


def test_secrets_among_the_settings_are_not_shown(monkeypatch):
    monkeypatch.setenv(f"{PREFIX}REDIS_URL", "redis://:planted-6f1e@127.0.0.1/0")
    settings.cache_clear()
    try:
        assert "6f1e" not in repr(settings()) + str(settings().model_dump())
    finally:
        settings.cache_clear()
    assert Settings.model_fields.keys() & {"password", "token", "secret"} == set()


def test_address_of_a_silent_server_is_told_without_its_password():
    import requests

    error = requests.exceptions.ConnectionError("HTTPConnectionPool: http://a:planted-6f1e@h:1/api refused")
    assert "http://a:***@h:1" in str(silent_server(error))


def test_servers_of_this_project_listen_on_loopback_unless_told():
    """No source of ours names an address of all interfaces; the images do, and publish on loopback."""
    everywhere = [path.relative_to(ROOT).as_posix() for path in SOURCES if "0.0.0.0" in path.read_text()]
    assert everywhere == []
