"""A real S3 server (SeaweedFS, which comes as a wheel) on loopback, in a process group of its own."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from infra.services import seaweedfs as program
from infra.services.addresses import at, free_ports
from infra.services.credentials import credentials
from infra.settings import environment
from tests.infra.asking import end_group, wait_until

STARTUP_S = 90


@dataclass(frozen=True)
class S3Server:
    """Where the server answers, and who may enter."""

    url: str
    access_key: str
    secret_key: str


@contextmanager
def seaweedfs(home: Path) -> Iterator[S3Server]:
    """The server that `make up` starts, which keeps its files in the directory `home`; it ends with the block."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    keys, log = credentials(home), home / "log.txt"
    with free_ports(home) as ports:
        command, variables = program.server(home / "files", ports, keys)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, cwd=home, start_new_session=True, env=environment(**variables)
            )
        try:
            server = S3Server(at(ports).s3_url, keys.s3_access_key, keys.s3_secret_key.get_secret_value())
            client = boto3.client(
                "s3",
                endpoint_url=server.url,
                region_name="us-east-1",
                aws_access_key_id=server.access_key,
                aws_secret_access_key=server.secret_key,
                config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10),
            )

            def serves() -> bool:
                """Whether a written object can be read: the volume server joins last."""
                assert process.poll() is None, f"SeaweedFS did not start:\n{log.read_text()[-3000:]}"
                try:
                    with suppress(client.exceptions.BucketAlreadyOwnedByYou):  # since the last attempt
                        client.create_bucket(Bucket="ready")
                    client.put_object(Bucket="ready", Key="probe", Body=b"1")
                except (BotoCoreError, ClientError):
                    return False
                return True

            wait_until(serves, STARTUP_S, f"SeaweedFS, whose log is {log}")
            yield server
        finally:
            end_group(process)  # asked politely it takes longer than all tests; nothing is kept
