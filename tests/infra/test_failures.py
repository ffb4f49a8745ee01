"""What is the surroundings' fault, told from what is the stage's own."""

import errno
import os
import tempfile
from pathlib import Path

import httpx
import pytest

from infra import failures
from infra.failures import InfrastructureError, explain, require_room, silent_server
from infra.settings import settings


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield tmp_path / "home"
    settings.cache_clear()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EDQUOT, "The disk quota is used up"),
        (errno.EFBIG, "A file may not grow any further (`ulimit -f`"),
    ],
)
def test_a_disk_without_room_is_named_with_what_is_free_and_what_to_do(number, words, tmp_path):
    said = explain(OSError(number, os.strerror(number), str(tmp_path / "model.safetensors")), tmp_path)
    assert said.startswith(words)
    assert str(tmp_path / "model.safetensors") in said
    assert f"MiB are free at {tmp_path}" in said
    assert ". Free some, or set SLIMLINE_HOME" in said
    assert "finished stages are kept" in said


def test_an_error_without_a_file_names_the_fullest_disk_that_was_written_to(tmp_path, monkeypatch):
    free = {"/small": 3 * 2**20, tempfile.gettempdir(): 2**30}
    monkeypatch.setattr(failures, "_free_bytes", lambda place: free[str(place)])
    monkeypatch.setattr(failures, "_existing", lambda place: place)
    said = explain(OSError(errno.ENOSPC, "No space left on device"), Path("/small"))
    assert said.startswith("The disk is full; 3.0 MiB are free at /small, and more was to be written. Free some")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_what_libraries_say_in_words_is_understood(error, tmp_path):
    assert explain(error, tmp_path).startswith("The disk is full")


def test_a_run_does_not_begin_where_the_databases_have_no_room(home, monkeypatch):
    require_room(home)
    monkeypatch.setattr(failures, "_free_bytes", lambda place: 7 * 2**20)
    with pytest.raises(InfrastructureError, match=r"The disk is full; 7\.0 MiB are free at "):
        require_room(home)


def test_what_led_to_an_error_is_looked_at_but_not_what_was_handled(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped, unrelated = RuntimeError("could not save"), RuntimeError("a bug")
    wrapped.__cause__, unrelated.__context__, unrelated.__suppress_context__ = full, full, True
    assert explain(wrapped, tmp_path)
    assert explain(unrelated, tmp_path) is None


def test_a_home_that_cannot_be_written_is_our_surroundings_and_another_file_the_user_s(home, tmp_path):
    def refused(where):
        return PermissionError(errno.EACCES, "Permission denied", str(where))

    said = explain(refused(home / "scratch" / "tmp1"), tmp_path)
    assert said.startswith(f"{home} cannot be used: Permission denied ({home / 'scratch' / 'tmp1'})")
    assert explain(refused(tmp_path / "data.txt"), tmp_path) is None
    assert explain(PermissionError(errno.EPERM, "Operation not permitted"), tmp_path) is None  # a call of the system's
    assert "Read-only file system" in explain(OSError(errno.EROFS, "", str(home / "mlflow.db")), tmp_path)
    assert explain(RuntimeError("(sqlite3.OperationalError) unable to open database file"), tmp_path).startswith(
        str(home)
    )


@pytest.mark.parametrize(("number", "words"), [(errno.EIO, "system's log"), (errno.EMFILE, "`ulimit -n`")])
def test_a_disk_that_fails_and_a_system_without_open_files_are_named_wherever_it_happens(number, words, tmp_path):
    assert words in explain(OSError(number, "", str(tmp_path / "x")), tmp_path)


@pytest.mark.parametrize("error", [ValueError("groups of 48 do not divide 64"), KeyError("oops"), OSError(2, "", "x")])
def test_other_errors_are_the_stage_s_own(error, tmp_path):
    assert explain(error, tmp_path) is None


def test_a_tracking_server_that_is_gone_is_named(monkeypatch, tmp_path):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MlflowException) as gone:
        MlflowClient("http://127.0.0.1:9").get_experiment("0")
    said = explain(gone.value, tmp_path)
    assert said.startswith("The tracking server (MLflow) http://127.0.0.1:9 does not answer.")
    assert explain(gone.value, tmp_path, servers=False) is None
    assert silent_server(MlflowException("No such experiment")) is None


def test_a_prefect_server_that_is_gone_is_named_and_the_hub_speaks_for_itself(tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    with pytest.raises(httpx.ConnectError) as gone:
        httpx.get("http://127.0.0.1:9/api")
    assert explain(gone.value, tmp_path).startswith("The Prefect server")
    hub = LocalEntryNotFoundError("the model is not there, and the hub cannot be reached")
    hub.__cause__ = gone.value
    assert explain(hub, tmp_path) is None


def test_an_object_store_that_is_gone_says_so_itself(tmp_path):
    said = "The S3 endpoint http://store cannot be reached"
    assert explain(ConnectionError(said), tmp_path) == said
    assert explain(BrokenPipeError(errno.EPIPE, "Broken pipe"), tmp_path) is None
    assert explain(InfrastructureError(said), tmp_path) == said
