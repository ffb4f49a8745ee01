"""Directories in S3 and back: parallel, each file checked by size and checksum, never half of one at its name."""

import email.utils
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from infra.settings import settings

NUM_TRANSFERS = 8
PART_BYTES = 64 * 2**20
"""Size of the parts of a multipart upload; the ETag that S3 gives depends on it."""

MIN_PART_BYTES = 5 * 2**20
"""S3 takes no smaller part, the last excepted."""

SHA256 = "sha256"
"""User metadata of objects uploaded here: the SHA-256 of the whole file, which S3 itself keeps per part only."""

T = TypeVar("T")


def download(uri: str, out: Path) -> Path:
    """`out`, now holding the objects below the prefix `uri` (s3://bucket/prefix) under their relative names.

    Everything is fetched beside `out` and moved there at the end: `out` is complete or as it was.

    Raises:
        FileNotFoundError: no such bucket, or nothing below the prefix.
        PermissionError: no credentials, or refused.
        ConnectionError: the endpoint cannot be reached.
        OSError: what arrived is not what the server announced.
    """
    with _errors(uri):
        objects = list(_objects(uri))
        if not objects:
            raise FileNotFoundError(f"{uri} must hold files; there is nothing below that prefix in the bucket.")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        try:
            _in_parallel(lambda item: _fetch(uri, item, partial), objects)
            if out.is_dir() and not any(out.iterdir()):
                out.rmdir()
            if out.exists():
                raise FileExistsError(f"{out} must be empty to download {uri} into it; it is not.")
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def upload(directory: Path, uri: str) -> None:
    """Put every file of `directory` below the prefix `uri`; the server checks each against its SHA-256.

    S3 knows no rename. Each object appears whole or not at all, and a file named manifest.json is sent last, so that a
    reader who waits for it sees a complete directory.

    Raises:
        ValueError: the directory holds no files.
        FileNotFoundError, PermissionError, ConnectionError: as `download`.
    """
    _boto3()
    from boto3.exceptions import S3UploadFailedError

    bucket, prefix = _parse(uri)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if not files:
        raise ValueError(f"A directory to upload must hold files; {directory} holds none.")

    def put(path: Path) -> None:
        key = "/".join(filter(None, [prefix, path.relative_to(directory).as_posix()]))
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        arguments = {"Metadata": {SHA256: digest}, "ChecksumAlgorithm": "SHA256"}
        try:
            _client().upload_file(str(path), bucket, key, ExtraArgs=arguments, Config=_transfers())
        except S3UploadFailedError as error:
            raise error.__context__ or error from None  # what the server answered, not boto3's prose about it
        stored = _client().head_object(Bucket=bucket, Key=key)
        if stored["ContentLength"] != path.stat().st_size or stored["Metadata"].get(SHA256) != digest:
            raise OSError(
                f"s3://{bucket}/{key} must be the {path.stat().st_size} bytes just sent; the server has others."
            )

    with _errors(uri):
        _require_bucket(bucket)
        _in_parallel(put, [path for path in files if path.name != "manifest.json"])
        _in_parallel(put, [path for path in files if path.name == "manifest.json"])


def exists(uri: str) -> bool:
    """Whether there is anything below the prefix `uri`."""
    with _errors(uri):
        return next(_objects(uri), None) is not None


def fingerprint(uri: str) -> str:
    """A digest of the names, sizes and ETags below the prefix `uri`: changes when a file does; downloads nothing.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `download`.
    """
    with _errors(uri):
        facts = sorted((name, item["Size"], item["ETag"]) for name, item in _objects(uri))
    if not facts:
        raise FileNotFoundError(f"{uri} must hold files; there is nothing below that prefix in the bucket.")
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class Probe(NamedTuple):
    """What writing to a store and reading from it showed. `skew_s`: by how much our clock is ahead of the store's."""

    elapsed_s: float
    multipart_mib: float
    multipart_mib_per_s: float
    skew_s: float | None


def probe(uri: str) -> Probe:
    """Write objects below the prefix `uri`, read them back, compare and remove them: a small one and one in two parts.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `download`.
        OSError: the store gave back other bytes, or kept what was removed.
    """
    _boto3()
    from botocore.exceptions import ClientError

    bucket, prefix = _parse(uri)
    key = "/".join(filter(None, [prefix, f".probe-{uuid.uuid4()}"]))
    small, part = os.urandom(1024), os.urandom(MIN_PART_BYTES)
    with _errors(uri):
        client = _client()
        _require_bucket(bucket)
        started_at = time.monotonic()
        stored = client.put_object(Bucket=bucket, Key=key, Body=small, ChecksumAlgorithm="SHA256")
        date = stored["ResponseMetadata"]["HTTPHeaders"].get("date")
        skew_s = time.time() - email.utils.parsedate_to_datetime(date).timestamp() if date else None
        try:
            if client.get_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")["Body"].read() != small:
                raise OSError(f"s3://{bucket}/{key} must be the bytes just written; the store gave others.")
        finally:
            client.delete_object(Bucket=bucket, Key=key)
        try:
            client.head_object(Bucket=bucket, Key=key)
            raise OSError(f"s3://{bucket}/{key} was removed; the store still has it.")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (403, 404):  # 403: who may not list
                raise
        elapsed_s = time.monotonic() - started_at

        started_at = time.monotonic()
        upload_id = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        try:
            sent = [
                client.upload_part(Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=part)["ETag"]
                for number in (1, 2)
            ]
            parts = {"Parts": [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(sent, 1)]}
            client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload=parts)
        except BaseException:
            client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
            raise
        try:
            second = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={MIN_PART_BYTES}-")["Body"].read()
            if second != part:
                raise OSError(f"s3://{bucket}/{key} must end in the part just written; the store gave other bytes.")
        finally:
            client.delete_object(Bucket=bucket, Key=key)
        mib = 3 * MIN_PART_BYTES / 2**20  # two parts there, one back
        return Probe(elapsed_s, 2 * MIN_PART_BYTES / 2**20, mib / (time.monotonic() - started_at), skew_s)


def _parse(uri: str) -> tuple[str, str]:
    """Bucket and prefix, the latter without slashes around it."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise ValueError(f"An S3 location is written s3://BUCKET/PREFIX; got {uri!r}.")
    return bucket, prefix.strip("/")


@functools.cache
def _client() -> Any:
    """One client for all threads (clients are thread-safe), talking to the endpoint of the settings."""
    boto3 = _boto3()
    from botocore.config import Config

    endpoint = settings().s3_endpoint_url
    return boto3.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings().s3_region,
        config=Config(
            connect_timeout=5,
            read_timeout=60,
            retries={"max_attempts": 3, "mode": "standard"},
            max_pool_connections=2 * NUM_TRANSFERS,
            # Stores other than AWS seldom answer for names like bucket.host.
            s3={"addressing_style": "path" if endpoint else "auto"},
        ),
    )


def _require_bucket(bucket: str) -> None:
    """Raise FileNotFoundError where the bucket is known to be absent: some stores would create it silently."""
    from botocore.exceptions import ClientError

    try:
        _client().head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            raise FileNotFoundError(_no_bucket(bucket)) from error
        # 403: who may write need not be allowed to look; writing itself will tell


def _no_bucket(bucket: str) -> str:
    return f"The bucket {bucket!r} must exist at {settings().s3_endpoint_url or 'AWS'}; it does not. Create it."


def _boto3() -> Any:
    """The library, which is installed only where S3 is used."""
    try:
        import boto3
    except ImportError as error:
        raise ValueError("S3 locations need boto3; it is not installed. Run: pip install 'slimline[s3]'") from error
    return boto3


def _transfers() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)


def _objects(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name below the prefix and description of every object; an object that *is* the prefix goes by its last part."""
    bucket, prefix = _parse(uri)
    pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    for page in pages:
        for item in page.get("Contents", []):
            key: str = item["Key"]
            if key.endswith("/"):
                continue
            if prefix and key == prefix:
                yield key.rpartition("/")[2], item
            elif not prefix or key.startswith(f"{prefix}/"):
                yield key.removeprefix(prefix).lstrip("/"), item


def _fetch(uri: str, item: tuple[str, dict[str, Any]], out: Path) -> None:
    """Download one object below `out` and compare it with what the server says of it."""
    name, listed = item
    bucket, _ = _parse(uri)
    target = (out / name).resolve()
    if not target.is_relative_to(out.resolve()):
        raise OSError(f"Names below {uri} must stay below it; {listed['Key']!r} does not.")
    target.parent.mkdir(parents=True, exist_ok=True)
    _client().download_file(bucket, listed["Key"], str(target), Config=_transfers())
    where = f"s3://{bucket}/{listed['Key']}"
    if target.stat().st_size != listed["Size"]:
        raise OSError(f"{where} must have {listed['Size']} bytes; {target.stat().st_size} arrived. Try again.")
    expected = _client().head_object(Bucket=bucket, Key=listed["Key"])["Metadata"].get(SHA256)
    etag = listed["ETag"].strip('"')
    with target.open("rb") as stream:
        if expected is not None:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        elif len(etag) == 32:  # of an object sent in one part, unencrypted, the ETag is its MD5
            expected, found = etag, hashlib.file_digest(stream, "md5").hexdigest()
        else:
            return
    if found != expected:
        raise OSError(f"{where} must have the digest {expected}; what arrived has {found}. The stored file is damaged.")


def _in_parallel(function: Callable[[T], None], items: Iterable[T]) -> None:
    """Call `function` for every item; the first failure cancels what has not begun and is raised."""
    pool = ThreadPoolExecutor(NUM_TRANSFERS)
    try:
        for future in [pool.submit(function, item) for item in items]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turn what boto3 raises into one sentence."""
    _boto3()
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectTimeoutError,
        EndpointConnectionError,
        NoCredentialsError,
        PartialCredentialsError,
        ReadTimeoutError,
    )

    bucket, _ = _parse(uri)
    endpoint = settings().s3_endpoint_url or "AWS"
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise PermissionError(
            f"Access to {uri} needs credentials; none were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "write them to ~/.aws/credentials."
        ) from error
    except (EndpointConnectionError, ConnectTimeoutError, ReadTimeoutError) as error:
        raise ConnectionError(
            f"The S3 endpoint {endpoint} cannot be reached for {uri}. Check SLIMLINE_S3_ENDPOINT_URL and the network."
        ) from error
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code == "NoSuchBucket":
            raise FileNotFoundError(_no_bucket(bucket)) from error
        if status == 404:
            raise FileNotFoundError(f"{uri} does not exist at {endpoint} (any more): {error}") from error
        if status in (401, 403):
            raise PermissionError(f"{endpoint} refuses access to {uri} ({code}). Check the credentials.") from error
        raise OSError(f"{endpoint} answered {code} for {uri}: {error}") from error
    except BotoCoreError as error:
        raise OSError(f"S3 failed for {uri} at {endpoint}: {error}") from error
