"""A real S3 server (SeaweedFS, which comes as a wheel) on loopback, for the tests of storage."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.infra.seaweedfs import S3Server, seaweedfs


@pytest.fixture
def client(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The client that the code under test uses, with an empty bucket `models`; the home is below `tmp_path`."""
    from infra import s3
    from infra.settings import settings

    def forget() -> None:
        settings.cache_clear()
        s3._client.cache_clear()

    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLIMLINE_S3_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget()
    found = s3._client()
    if "models" not in {bucket["Name"] for bucket in found.list_buckets()["Buckets"]}:
        found.create_bucket(Bucket="models")
    yield found
    # Emptied and not deleted: a server needs a second or two for each new bucket.
    for item in found.list_objects_v2(Bucket="models").get("Contents", []):
        found.delete_object(Bucket="models", Key=item["Key"])
    for upload in found.list_multipart_uploads(Bucket="models").get("Uploads", []):
        found.abort_multipart_upload(Bucket="models", Key=upload["Key"], UploadId=upload["UploadId"])
    forget()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS server in a process group of its own, which ends with the fixture."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server
