"""A model in S3 as the source of a run."""

import pytest

from infra import s3
from infra.settings import settings
from tasks.calibration.checkpoints import import_checkpoint, parse_source
from tasks.checkpoint import _local, fingerprint


@pytest.fixture
def bucket(s3_server, monkeypatch, request) -> str:
    import boto3

    monkeypatch.setenv("SLIMLINE_S3_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    settings.cache_clear()
    s3._client.cache_clear()
    client = boto3.client("s3", endpoint_url=s3_server.url, region_name="us-east-1")
    name = request.node.name.replace("_", "-")[:60].strip("-")
    client.create_bucket(Bucket=name)
    yield f"s3://{name}"
    settings.cache_clear()
    s3._client.cache_clear()


def test_a_checkpoint_in_s3_is_imported_and_a_changed_one_is_noticed(bucket, tiny_checkpoint, tmp_path):
    uri = f"{bucket}/models/tiny"
    s3.upload(tiny_checkpoint, uri)
    before = fingerprint(uri)
    assert fingerprint(uri) == before

    local = _local(parse_source(uri), tmp_path / "download")
    (tmp_path / "out").mkdir()
    summary = import_checkpoint(source=str(local), out=tmp_path / "out")
    assert summary.num_layers == 4
    assert (tmp_path / "out" / "model.safetensors").exists()

    config = tiny_checkpoint / "config.json"
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text(config.read_text() + "\n")
    s3.upload(changed, uri)
    assert fingerprint(uri) != before


def test_a_prefix_that_holds_nothing_is_said(bucket):
    with pytest.raises(FileNotFoundError, match="/nothing must hold files"):
        fingerprint(f"{bucket}/nothing")
