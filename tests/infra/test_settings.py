import pytest

from infra.settings import environment, settings


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
