import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra import artifacts
from infra.artifacts import CorruptArtifact, exists, new_directory, publish, verify
from infra.settings import Settings
from tests.infra.made import directory as directory_of


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "settings", lambda: Settings(home=tmp_path))


def directory(**contents: str) -> Path:
    return directory_of(**{name: text.encode() for name, text in contents.items()})


def test_the_same_contents_give_the_same_artifact_stored_once():
    first, second = publish(directory(a="1", b="22")), publish(directory(b="22", a="1"))
    assert first == second
    assert first.size_bytes == 3
    assert len(list(first.path.parents[1].iterdir())) == 1


def test_a_name_or_a_byte_that_differs_gives_another_artifact():
    assert len({publish(directory(**c)).sha256 for c in ({"a": "1"}, {"b": "1"}, {"a": "2"})}) == 3


def test_nothing_stays_in_scratch(tmp_path):
    publish(directory(a="1"))
    publish(directory(a="1"))
    assert not list((tmp_path / "scratch").iterdir())


def test_an_empty_directory_is_refused():
    with pytest.raises(ValueError, match="at least one file"):
        publish(new_directory())


def test_a_changed_byte_is_found_and_named():
    artifact = publish(directory(weights="1234"))
    verify(artifact)
    file = artifact.path / "weights"
    file.chmod(0o644)
    file.write_text("1235")
    assert exists(artifact)  # same size: only reading the bytes tells
    with pytest.raises(CorruptArtifact, match="weights"):
        verify(artifact)


def test_a_lost_file_is_found_and_publishing_again_mends_it():
    artifact = publish(directory(a="1", b="2"))
    (artifact.path / "b").unlink()
    assert not exists(artifact)
    with pytest.raises(CorruptArtifact, match="lost its file b"):
        verify(artifact)
    assert publish(directory(a="1", b="2")) == artifact
    verify(artifact)


def test_a_file_that_was_never_published_is_found():
    artifact = publish(directory(a="1"))
    (artifact.path / "extra.py").write_text("import os")
    with pytest.raises(CorruptArtifact, match=r"never published: extra\.py"):
        verify(artifact)


def test_a_changed_manifest_is_found():
    artifact = publish(directory(a="1"))
    artifact.manifest.write_text("[]")
    with pytest.raises(CorruptArtifact, match="manifest"):
        verify(artifact)


def test_what_a_killed_process_left_to_publish_is_removed_and_what_a_living_one_fills_is_not(tmp_path):
    code = "from infra.artifacts import new_directory; print(new_directory(), flush=True); import time; time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "SLIMLINE_HOME": str(tmp_path)},
    )
    its = Path(process.stdout.readline().strip())
    own = new_directory()
    assert artifacts.remove_abandoned() == 0
    process.kill()
    process.communicate()
    assert artifacts.remove_abandoned() == 1
    assert own.exists()
    assert not its.exists()
