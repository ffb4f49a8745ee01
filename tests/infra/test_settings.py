import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.settings import environment, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh():
    settings.cache_clear()
    yield
    settings.cache_clear()


def test_home_is_absolute_whatever_the_directory_of_later_processes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIMLINE_HOME", "here")
    assert settings().home == tmp_path / "here"


def test_a_value_that_cannot_be_used_names_the_variable(monkeypatch):
    monkeypatch.setenv("SLIMLINE_THREADS", "0")
    with pytest.raises(ValueError, match=r"SLIMLINE_THREADS='0'.*greater than or equal to 1"):
        settings()


def test_a_misspelt_variable_is_refused_with_the_nearest(monkeypatch):
    monkeypatch.setenv("SLIMLINE_THREDS", "2")
    with pytest.raises(ValueError, match=r"SLIMLINE_THREDS is no setting\. Did you mean SLIMLINE_THREADS\?"):
        settings()


def test_a_child_environment_can_add_and_remove(monkeypatch):
    monkeypatch.setenv("GONE", "1")
    child = environment(GONE=None, NEW="2")
    assert "GONE" not in child
    assert child["NEW"] == "2"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLIMLINE_CACHE_GIB": "5"}, "SLIMLINE_CACHE_GIB limits copies of a remote store; set SLIMLINE_STORE"),
        ({"SLIMLINE_S3_SSE_KMS_KEY_ID": "key"}, "needs SLIMLINE_S3_SSE=aws:kms"),
        ({"SLIMLINE_S3_SSE": "rot13"}, r"SLIMLINE_S3_SSE='rot13'"),
        ({"SLIMLINE_STORE": "/somewhere"}, r"SLIMLINE_STORE='/somewhere'"),
        ({"SLIMLINE_STORE": "s3:///prefix"}, r"SLIMLINE_STORE='s3:///prefix'"),
    ],
)
def test_a_setting_of_the_store_that_would_be_ignored_or_is_none_is_refused(variables, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        settings()


def test_a_store_is_named_without_a_slash_at_its_end(monkeypatch):
    monkeypatch.setenv("SLIMLINE_STORE", "s3://bucket/team/")
    assert settings().store == "s3://bucket/team"


def test_a_registered_version_bears_settings_that_are_newer_than_its_code(tmp_path):
    shutil.copytree(ROOT / "infra", tmp_path / "infra")
    code = "from infra.settings import settings; print(settings().home)"
    env = environment(SLIMLINE_HOME=str(tmp_path), SLIMLINE_INVENTED_LATER="1", PYTHONPATH=None)
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert told.stdout.strip() == str(tmp_path), told.stderr
