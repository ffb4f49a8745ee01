"""Directories in a real S3 server and back, and what users read when it does not work."""

from pathlib import Path
from typing import Any

import pytest

from infra import s3
from infra.settings import settings

pytestmark = pytest.mark.servers


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Files of several sizes, one in a folder, one empty."""
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "empty").write_bytes(b"")
    (source / "deep" / "er" / "weights.bin").write_bytes(bytes(range(256)) * 4096)
    return source


def _contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_directory_comes_back_as_it_was(client: Any, directory: Path, tmp_path: Path) -> None:
    s3.upload(directory, "s3://models/teacher/v1/")
    out = s3.download("s3://models/teacher/v1", tmp_path / "out")
    assert _contents(out) == _contents(directory)


def test_a_file_of_several_parts_comes_back_as_it_was(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)  # the smallest part that S3 takes
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(b"0123456789abcdef" * (11 * 2**16))
    s3.upload(source, "s3://models/large")
    assert "-3" in client.head_object(Bucket="models", Key="large/weights")["ETag"]
    assert _contents(s3.download("s3://models/large", tmp_path / "out")) == _contents(source)


def test_a_prefix_ends_at_a_slash(client: Any, directory: Path, tmp_path: Path) -> None:
    s3.upload(directory, "s3://models/a")
    s3.upload(directory, "s3://models/ab")
    assert len(_contents(s3.download("s3://models/a", tmp_path / "out"))) == 3


def test_files_of_others_are_checked_by_their_etag(client: Any, tmp_path: Path) -> None:
    client.put_object(Bucket="models", Key="plain/file", Body=b"made elsewhere")
    assert _contents(s3.download("s3://models/plain", tmp_path / "out")) == {"file": b"made elsewhere"}


def test_a_damaged_object_is_refused_and_nothing_is_left(client: Any, directory: Path, tmp_path: Path) -> None:
    s3.upload(directory, "s3://models/teacher")
    promised = client.head_object(Bucket="models", Key="teacher/config.json")["Metadata"]
    client.put_object(Bucket="models", Key="teacher/config.json", Body=b"[]", Metadata=promised)
    with pytest.raises(OSError, match=r"teacher/config\.json must have the digest .* The stored file is damaged"):
        s3.download("s3://models/teacher", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_the_fingerprint_follows_the_contents(client: Any, directory: Path) -> None:
    s3.upload(directory, "s3://models/teacher")
    before = s3.fingerprint("s3://models/teacher")
    assert s3.fingerprint("s3://models/teacher/") == before
    (directory / "config.json").write_text("[]")
    s3.upload(directory, "s3://models/teacher")
    assert s3.fingerprint("s3://models/teacher") != before


def test_the_manifest_is_sent_last(client: Any, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "manifest.json").write_text("[]")
    sent: list[str] = []
    put = client.put_object
    monkeypatch.setattr(client, "put_object", lambda **given: (sent.append(given["Key"]), put(**given)))
    s3.upload(directory, "s3://models/teacher")
    assert len(sent) == 4
    assert sent[-1] == "teacher/manifest.json"


def test_a_full_directory_is_not_overwritten(client: Any, directory: Path, tmp_path: Path) -> None:
    s3.upload(directory, "s3://models/teacher")
    before = _contents(directory)
    with pytest.raises(FileExistsError, match="must be empty"):
        s3.download("s3://models/teacher", directory)
    assert _contents(directory) == before


def test_nothing_below_a_prefix(client: Any, tmp_path: Path) -> None:
    assert not s3.exists("s3://models/absent")
    with pytest.raises(FileNotFoundError, match="s3://models/absent must hold files"):
        s3.download("s3://models/absent", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="s3://models/absent must hold files"):
        s3.fingerprint("s3://models/absent")


def test_no_such_bucket(client: Any, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="The bucket 'nowhere' must exist"):
        s3.download("s3://nowhere/teacher", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="The bucket 'nowhere' must exist"):
        s3.upload(directory, "s3://nowhere/teacher")


def test_no_credentials(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3._client.cache_clear()
    with pytest.raises(PermissionError, match="AWS_ACCESS_KEY_ID"):
        s3.download("s3://models/teacher", tmp_path / "out")


def test_wrong_credentials(client: Any, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3._client.cache_clear()
    with pytest.raises(PermissionError, match="refuses access to s3://models/teacher"):
        s3.download("s3://models/teacher", tmp_path / "out")
    with pytest.raises(PermissionError, match="refuses access to s3://models/teacher"):
        s3.upload(directory, "s3://models/teacher")


def test_an_endpoint_that_does_not_answer(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLINE_S3_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setenv("SLIMLINE_S3_RETRY_S", "0.3")
    settings.cache_clear()
    s3._client.cache_clear()
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9 cannot be reached .* asked again for 0\.3 s"):
        s3.download("s3://models/teacher", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["models/teacher", "s3://", "s3:///teacher"])
def test_a_location_that_is_none(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET/PREFIX"):
        s3.download(uri, tmp_path / "out")


def test_an_empty_directory_is_not_uploaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold files"):
        s3.upload(tmp_path, "s3://models/teacher")


def test_probe_leaves_nothing_behind(client: Any) -> None:
    found = s3.probe("s3://models/doctor")
    assert found.multipart_mib == 10
    assert found.removed
    assert found.skew_s is not None
    assert abs(found.skew_s) < 5
    assert not s3.exists("s3://models/doctor")
    assert "Uploads" not in client.list_multipart_uploads(Bucket="models")


def test_probe_says_what_is_refused(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="The bucket 'nowhere' must exist"):
        s3.probe("s3://nowhere/doctor")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3._client.cache_clear()
    with pytest.raises(PermissionError, match="refuses access to s3://models/doctor"):
        s3.probe("s3://models/doctor")
