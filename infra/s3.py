"""Bytes in S3 and back: in parallel parts, checked from end to end, going on where a cut or a kill left off.

Requests that fail for a reason that passes are asked again, with growing and random pauses, for SLIMLINE_S3_RETRY_S. A
file in S3 appears whole or not at all, and so does a downloaded one.
"""

import base64
import functools
import hashlib
import itertools
import json
import logging
import os
import random
import re
import shutil
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from infra.locks import held
from infra.settings import settings

logger = logging.getLogger(__name__)

NUM_TRANSFERS = 8
"""Parts on their way at a time, of all files together."""
NUM_FILES = 4
"""Files at a time; their threads hash and wait."""
PART_BYTES = 8 * 2**20
"""Of a part, which with NUM_TRANSFERS bounds the memory; larger for files of more than MAX_PARTS."""
MAX_PARTS = 10_000
SMALLEST_PART_BYTES = 5 * 2**20
"""S3 takes no smaller part, the last excepted."""
BLOCK_BYTES = 2**20
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
IDLE_S = 900.0
"""An upload that got no part for so long has no living sender: those give up earlier. Anybody may go on with it."""
ABANDONED_S = 24 * 3600.0
"""After so long without a part an unfinished upload is ended; until then its parts cost storage."""
NUM_TRIES = 3
"""Of a whole file whose bytes arrive damaged, and of an upload that others ended under us."""

SHA256 = "sha256"
"""User metadata of objects that `upload` made: the SHA-256 of the whole file, which S3 itself keeps per part only."""

T = TypeVar("T")
R = TypeVar("R")


class Damaged(OSError):
    """What arrived is not what was stored, again and again."""


class NoBucket(FileNotFoundError):
    """The bucket does not exist."""


# Directories


def download(uri: str, out: Path) -> Path:
    """`out`, now holding the objects below the prefix `uri` (s3://bucket/prefix) under their relative names.

    Everything is fetched beside `out` and moved there at the end: `out` is complete or as it was.

    Raises:
        FileNotFoundError: no such bucket, or nothing below the prefix.
        PermissionError: no credentials, or refused.
        ConnectionError: the endpoint cannot be reached, or does not recover.
        OSError: what arrived is not what the server announced.
    """
    with errors(uri):
        objects = list(_objects(uri))
        if not objects:
            raise FileNotFoundError(f"{uri} must hold files; there is nothing below that prefix in the bucket.")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        try:
            with Transfers() as transfers:
                transfers.each_file(lambda item: _fetch_listed(transfers, uri, item, partial), objects)
            if out.is_dir() and not any(out.iterdir()):
                out.rmdir()
            if out.exists():
                raise FileExistsError(f"{out} must be empty to download {uri} into it; it is not.")
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def _fetch_listed(transfers: "Transfers", uri: str, item: tuple[str, dict[str, Any]], out: Path) -> None:
    """Download one listed object below `out` and compare it with what the server says of it."""
    name, listed = item
    bucket, _ = _parse(uri)
    target = (out / name).resolve()
    if not target.is_relative_to(out.resolve()):
        raise OSError(f"Names below {uri} must stay below it; {listed['Key']!r} does not.")
    target.parent.mkdir(parents=True, exist_ok=True)
    found = transfers.ask(lambda: _client().head_object(Bucket=bucket, Key=listed["Key"]))
    etag = found["ETag"].strip('"')
    digest = None
    if SHA256 in found["Metadata"]:
        digest = Digest("sha256", found["Metadata"][SHA256])
    elif re.fullmatch("[0-9a-f]{32}", etag) and not _by_kms(found):  # of an object sent in one part it is the MD5
        digest = Digest("md5", etag)
    fetch(transfers, f"s3://{bucket}/{listed['Key']}", target, found["ContentLength"], digest, etag=found["ETag"])


def upload(directory: Path, uri: str) -> None:
    """Put every file of `directory` below the prefix `uri`; the server checks what arrives.

    S3 knows no rename. Each object appears whole or not at all, and a file named manifest.json is sent last, so that a
    reader who waits for it sees a complete directory. Files that are there already are not sent.

    Raises:
        ValueError: the directory holds no files.
        FileNotFoundError, PermissionError, ConnectionError: as `download`.
    """
    _boto3()
    bucket, prefix = _parse(uri)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if not files:
        raise ValueError(f"A directory to upload must hold files; {directory} holds none.")

    def put(path: Path) -> None:
        key = "/".join(filter(None, [prefix, path.relative_to(directory).as_posix()]))
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        send(transfers, path, f"s3://{bucket}/{key}", metadata={SHA256: digest})

    with errors(uri), Transfers() as transfers:
        require_bucket(uri)
        transfers.each_file(put, [path for path in files if path.name != "manifest.json"])
        transfers.each_file(put, [path for path in files if path.name == "manifest.json"])


def create_bucket(name: str) -> None:
    """Make the bucket `name` where there is none.

    Raises:
        PermissionError, ConnectionError: as `download`.
    """
    from botocore.exceptions import ClientError

    with errors(f"s3://{name}"):
        try:
            _client().head_bucket(Bucket=name)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            _client().create_bucket(Bucket=name)


def exists(uri: str) -> bool:
    """Whether there is anything below the prefix `uri`."""
    with errors(uri):
        return next(_objects(uri), None) is not None


def fingerprint(uri: str) -> str:
    """A digest of the names, sizes and ETags below the prefix `uri`: changes when a file does; downloads nothing.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `download`.
    """
    with errors(uri):
        facts = sorted((name, item["Size"], item["ETag"]) for name, item in _objects(uri))
    if not facts:
        raise FileNotFoundError(f"{uri} must hold files; there is nothing below that prefix in the bucket.")
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# Single objects


def read(uri: str) -> bytes | None:
    """The content of a small object; None: there is none.

    Raises:
        PermissionError, ConnectionError: as `download`.
    """
    bucket, key = _parse(uri)
    with errors(uri):
        try:
            return bytes(patiently(lambda: _client().get_object(Bucket=bucket, Key=key)["Body"].read()))
        except Exception as error:
            if _code(error) in ("NoSuchKey", "404"):
                return None
            raise


def write(uri: str, content: bytes) -> None:
    """Make `content` the object `uri`; the server checks what arrives.

    Raises:
        FileNotFoundError: no such bucket.
        PermissionError, ConnectionError: as `download`.
    """
    bucket, key = _parse(uri)
    with errors(uri):
        patiently(lambda: _put(bucket, key, content, {}))


def create(uri: str, content: bytes) -> bool:
    """Make `content` the object `uri` where there is none; False: there is another one, which stays.

    Raises:
        FileNotFoundError: no such bucket.
        PermissionError, ConnectionError: as `download`.
    """
    bucket, key = _parse(uri)
    with errors(uri):
        try:
            patiently(lambda: _put(bucket, key, content, {}, IfNoneMatch="*"))
        except Exception as error:
            if _code(error) not in ("PreconditionFailed", "412"):
                raise
            return read(uri) == content  # an earlier attempt of ours whose answer was lost
    return True


def listed(uri: str) -> list[tuple[str, datetime, int]]:
    """Relative name, time of the last change and size in bytes of all objects below the prefix `uri`.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `download`.
    """
    with errors(uri):
        return [(name, item["LastModified"], item["Size"]) for name, item in _objects(uri)]


def delete(uri: str) -> None:
    """Make the object `uri` be gone, whether it was there or not.

    Raises:
        PermissionError, ConnectionError: as `download`.
    """
    bucket, key = _parse(uri)
    with errors(uri):
        patiently(lambda: _client().delete_object(Bucket=bucket, Key=key))


def names(uri: str) -> list[str]:
    """The names of all objects below the prefix `uri`, relative to it; empty: there is none.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `download`.
    """
    with errors(uri):
        return [name for name, _ in _objects(uri)]


def size_of(uri: str) -> int | None:
    """The size of an object in bytes; None: there is none. One small request.

    Raises:
        PermissionError, ConnectionError: as `download`.
    """
    bucket, key = _parse(uri)
    with errors(uri):
        found = patiently(lambda: _head(bucket, key))
    return None if found is None else int(found["ContentLength"])


class Probe(NamedTuple):
    """What writing to a store and reading from it showed.

    `skew_s` is by how much our clock is ahead of the store's, and `removed` whether we may delete: the store does not
    need it.
    """

    elapsed_s: float
    multipart_mib: float
    multipart_mib_per_s: float
    skew_s: float | None
    removed: bool


def probe(uri: str) -> Probe:
    """Write an object below the prefix `uri` and read it back, whole and then in two parts; remove it at the end.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `download`.
        OSError: the store gave back other bytes.
    """
    bucket, prefix = _parse(uri)
    key = "/".join(filter(None, [prefix, "probes", socket.gethostname()]))
    small, part = os.urandom(1024), os.urandom(SMALLEST_PART_BYTES)
    with errors(uri):
        client = _client()
        require_bucket(uri)
        started_at = time.monotonic()
        checksum = {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": _crc32(small)}
        stored = client.put_object(Bucket=bucket, Key=key, Body=small, **checksum, **_encryption())
        date = stored["ResponseMetadata"]["HTTPHeaders"].get("date")
        skew_s = time.time() - parsedate_to_datetime(date).timestamp() if date else None
        found = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        elapsed_s = time.monotonic() - started_at

        started_at = time.monotonic()
        upload = {"Bucket": bucket, "Key": key}
        upload["UploadId"] = client.create_multipart_upload(**upload, **_encryption())["UploadId"]
        try:
            tags = [client.upload_part(**upload, PartNumber=number, Body=part)["ETag"] for number in (1, 2)]
            parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
            client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except BaseException:
            client.abort_multipart_upload(**upload)
            raise
        second = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={len(part)}-")["Body"].read()
        parts_s = time.monotonic() - started_at
        removed = _removed(bucket, key)
    if (found, second) != (small, part):
        raise OSError(f"s3://{bucket}/{key} must be the bytes just written; the store gave others. See its log.")
    mib = len(part) / 2**20
    return Probe(elapsed_s, 2 * mib, 3 * mib / parts_s, skew_s, removed)  # two parts there, one back


def _removed(bucket: str, key: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        _client().delete_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 403:
            raise
        return False
    return True


# Many at a time


class Transfers:
    """Threads that move files in parts. A failure, or leaving early, stops what has not begun.

    Files take turns in a few threads, which hash and wait; their parts share the others.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._files = ThreadPoolExecutor(NUM_FILES, thread_name_prefix="files")
        self._parts = ThreadPoolExecutor(NUM_TRANSFERS, thread_name_prefix="parts")

    def __enter__(self) -> "Transfers":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._parts.shutdown(cancel_futures=True)
        self._files.shutdown(cancel_futures=True)

    def each_file(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """What `function` returns for every item, in order; the first failure is raised and stops the others."""
        futures = [self._files.submit(function, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]

    def each_part(self, function: Callable[[int], R], count: int) -> Iterator[R]:
        """What `function` returns for parts 0 ... count - 1, in order, as soon as each is done."""
        futures = [self._parts.submit(self._unless_stopped, function, index) for index in range(count)]
        try:
            for future in futures:
                yield future.result()
        finally:
            _cancel(futures)

    def ask(self, call: Callable[[], T]) -> T:
        """As `patiently`, but without patience once another transfer has failed."""
        return patiently(call, self.stop)

    def _unless_stopped(self, function: Callable[[int], R], index: int) -> R:
        if self.stop.is_set():
            raise InterruptedError("Another transfer failed.")
        return function(index)


def _cancel(futures: Iterable[Future[Any]]) -> None:
    """Cancel what has not begun and wait for what has, so that nobody writes into a file that is given up."""
    wait([future for future in futures if not future.cancel()])


# Upload


def send(transfers: Transfers, file: Path, uri: str, *, metadata: dict[str, str] | None = None) -> bool:
    """Make the object `uri` hold `file`, unless it does; whether anything had to be sent.

    An object of the same size, and where `metadata` is given of the same metadata, counts as the same: the caller names
    objects by their content or describes it. Parts that an earlier, killed or cut upload left are not sent again.
    """
    bucket, key = _parse(uri)
    before = file.stat()
    metadata = metadata or {}

    def is_there() -> bool:
        found = transfers.ask(lambda: _head(bucket, key))
        same = found is not None and all(found["Metadata"].get(name) == value for name, value in metadata.items())
        return found is not None and same and int(found["ContentLength"]) == before.st_size

    if is_there():
        return False
    if before.st_size <= PART_BYTES:
        content = file.read_bytes()
        transfers.ask(lambda: _put(bucket, key, content, metadata))
    else:
        for attempt in range(NUM_TRIES):
            with held(_journal(uri, metadata)) as journal:
                if is_there():  # another process of this machine was faster
                    journal.unlink()
                    return False
                try:
                    _send_parts(transfers, file, bucket, key, metadata, journal)
                except Exception as error:
                    if _code(error) not in ("NoSuchUpload", "InvalidPart", "InvalidRequest"):
                        raise
                    journal.unlink()  # the upload was completed or ended by somebody else
                    if attempt == NUM_TRIES - 1 and not is_there():
                        raise
                if is_there():
                    journal.unlink(missing_ok=True)
                    break
        else:
            raise Damaged(f"{uri} must have the {before.st_size} bytes just sent; the server has others.")
    after = file.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError(f"{file} must not change while it is sent; it did. Send it again.")
    return True


def _journal(uri: str, metadata: dict[str, str]) -> Path:
    """Where this machine notes the unfinished upload of an object."""
    name = hashlib.sha256(json.dumps([settings().s3_endpoint_url, uri, metadata]).encode()).hexdigest()
    return settings().home / "uploads" / name


def _send_parts(
    transfers: Transfers, file: Path, bucket: str, key: str, metadata: dict[str, str], journal: Path
) -> None:
    size = file.stat().st_size
    part_bytes = part_size(size)
    count = -(-size // part_bytes)
    upload, listed = _resumable(transfers, bucket, key, journal, owned=not metadata)
    if upload is None:
        created = transfers.ask(
            lambda: _client().create_multipart_upload(
                Bucket=bucket, Key=key, Metadata=metadata, ChecksumAlgorithm="CRC32", **_encryption()
            )
        )
        upload = str(created["UploadId"])
        journal.write_text(upload)

    with file.open("rb", buffering=0) as stream:

        def part(index: int) -> dict[str, Any]:
            content = os.pread(stream.fileno(), part_bytes, index * part_bytes)
            checksum = _crc32(content)
            etag = listed.get(index + 1, {}).get("ETag")
            if etag is None or listed[index + 1]["Size"] != len(content) or not _same(etag, content):
                etag = transfers.ask(
                    lambda: _client().upload_part(
                        Bucket=bucket,
                        Key=key,
                        UploadId=upload,
                        PartNumber=index + 1,
                        Body=content,
                        ChecksumCRC32=checksum,
                    )["ETag"]
                )
            return {"PartNumber": index + 1, "ETag": etag, "ChecksumCRC32": checksum}

        parts = list(transfers.each_part(part, count))
    transfers.ask(
        lambda: _client().complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
        )
    )


def part_size(size_bytes: int) -> int:
    """The size of the parts that a file of `size_bytes` is moved in."""
    return max(PART_BYTES, -(-size_bytes // MAX_PARTS // 2**20) * 2**20)


def _same(etag: str, content: bytes) -> bool:
    """Whether a part that is there holds `content`, as far as its ETag tells: it is no digest where KMS encrypts."""
    found = etag.strip('"')
    return settings().s3_sse == "aws:kms" or found == hashlib.md5(content, usedforsecurity=False).hexdigest()


def _resumable(
    transfers: Transfers, bucket: str, key: str, journal: Path, *, owned: bool
) -> tuple[str | None, dict[int, dict[str, Any]]]:
    """The unfinished upload to go on with, if there is one, and its parts by number.

    It is the one this machine noted; we hold the note, so its sender is gone. `owned`: the key names the content, so
    that an upload of another machine will do, too, once it has been idle for so long that its sender must be gone.
    """
    known = journal.read_text().strip()
    if known:
        try:
            return known, {part["PartNumber"]: part for part in transfers.ask(lambda: _parts(bucket, key, known))}
        except Exception as error:
            if _code(error) != "NoSuchUpload":
                raise
    if owned:
        for upload, parts, idle_s in transfers.ask(lambda: list(_unfinished(bucket, key))):
            if idle_s > IDLE_S and parts:
                journal.write_text(upload["UploadId"])
                return str(upload["UploadId"]), {part["PartNumber"]: part for part in parts}
    return None, {}


def end_abandoned(uri: str) -> int:
    """End the uploads below the prefix `uri` that nobody has gone on with for a day, and say how many those were."""
    bucket, prefix = _parse(uri)
    ended = 0
    with errors(uri):
        for upload, _, idle_s in patiently(lambda: list(_unfinished(bucket, f"{prefix}/"))):
            if idle_s > ABANDONED_S:
                _client().abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                ended += 1
    return ended


def _unfinished(bucket: str, prefix: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], float]]:
    """Unfinished uploads of keys that begin with `prefix`, their parts, and for how many seconds they got none."""
    for page in _client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
        now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])  # its dates are by that clock, too
        for upload in page.get("Uploads", []):
            try:
                parts = _parts(bucket, upload["Key"], upload["UploadId"])
            except Exception as error:
                if _code(error) != "NoSuchUpload":
                    raise
                continue
            last: datetime = max([upload["Initiated"], *(part["LastModified"] for part in parts)])
            yield upload, parts, (now - last).total_seconds()


def _parts(bucket: str, key: str, upload: str) -> list[dict[str, Any]]:
    pages = _client().get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=upload)
    return [part for page in pages for part in page.get("Parts", [])]


def _put(bucket: str, key: str, content: bytes, metadata: dict[str, str], **condition: str) -> None:
    checksum = _crc32(content)
    _client().put_object(
        Bucket=bucket, Key=key, Body=content, Metadata=metadata, ChecksumCRC32=checksum, **_encryption(), **condition
    )


def _crc32(content: bytes) -> str:
    """As S3 writes it; the server computes it of what arrives and refuses what differs."""
    return base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()


def _encryption() -> dict[str, str]:
    found = {"ServerSideEncryption": settings().s3_sse, "SSEKMSKeyId": settings().s3_sse_kms_key_id}
    return {name: value for name, value in found.items() if value}


def _by_kms(head: dict[str, Any]) -> bool:
    return str(head.get("ServerSideEncryption", "")).startswith("aws:kms")


# Download


@dataclass(frozen=True)
class Digest:
    """What the bytes of a file must hash to."""

    algorithm: str
    value: str


def fetch(
    transfers: Transfers, uri: str, target: Path, size_bytes: int, digest: Digest | None, *, etag: str | None = None
) -> None:
    """Make `target` hold the object `uri`.

    What a killed or cut download left at `target`, with the list of its parts beside it, is not fetched again. Until
    this returns, `target` may be incomplete.

    Args:
        size_bytes: of the object.
        digest: of its content; None: nobody knows it, and only the size is compared.
        etag: of the object, where its name does not fix its content: a changed one is then refused.

    Raises:
        Damaged: the bytes are others than `digest` says, however often they are fetched.
    """
    done = target.with_name(f"{target.name}.parts")
    part_bytes = part_size(size_bytes)
    about = json.dumps([part_bytes, size_bytes, digest and digest.value, etag])
    for _ in range(NUM_TRIES):
        found = _fetch_parts(transfers, uri, target, done, about, size_bytes, part_bytes, digest, etag)
        done.unlink(missing_ok=True)
        if digest is None or found == digest.value:
            return
        target.unlink()
        logger.warning("%s arrived damaged; fetching it again", uri)
    assert digest
    raise Damaged(
        f"{uri} must have the digest {digest.value}; what arrived has {found}, {NUM_TRIES} times. The stored file is "
        "damaged: delete it and make it again."
    )


def _fetch_parts(
    transfers: Transfers,
    uri: str,
    target: Path,
    done: Path,
    about: str,
    size_bytes: int,
    part_bytes: int,
    digest: Digest | None,
    etag: str | None,
) -> str:
    """The digest of what is now at `target`, computed while the parts arrive."""
    bucket, key = _parse(uri)
    whole = target.exists() and target.stat().st_size == size_bytes  # its room is taken before the first part
    lines = done.read_text().splitlines() if whole and done.exists() else []
    finished = {int(line) for line in lines[1:]} if lines and lines[0] == about else set()
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | (0 if finished else os.O_TRUNC), 0o644)
    try:
        if size_bytes:
            os.posix_fallocate(descriptor, 0, size_bytes)  # a disk without room says so now
        with done.open("a" if finished else "w", buffering=1) as note:
            if not finished:
                note.write(f"{about}\n")

            def put(at: int, block: bytes) -> None:
                os.pwrite(descriptor, block, at)

            def part(index: int) -> None:
                if index not in finished:
                    start = index * part_bytes
                    length = min(part_bytes, size_bytes - start)
                    _receive(transfers, bucket, key, start, length, put, etag)
                    note.write(f"{index}\n")

            hashed = hashlib.new(digest.algorithm if digest else "sha256", usedforsecurity=False)
            arrived = transfers.each_part(part, -(-size_bytes // part_bytes))
            for index, _ in enumerate(arrived):
                if digest:
                    hashed.update(os.pread(descriptor, part_bytes, index * part_bytes))
        return hashed.hexdigest()
    except OSError as error:
        if error.errno is not None:  # the disk, not the store: it needs the room
            target.unlink(missing_ok=True)
            done.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def digest_of(transfers: Transfers, uri: str, size_bytes: int) -> str | None:
    """The SHA-256 of the object `uri`, all of which is read; None: there is none of this size."""
    bucket, key = _parse(uri)
    found = transfers.ask(lambda: _head(bucket, key))
    if found is None or found["ContentLength"] != size_bytes:
        return None
    hashed = hashlib.sha256()
    _receive(transfers, bucket, key, 0, size_bytes, lambda _, block: hashed.update(block), None)
    return hashed.hexdigest()


def _receive(
    transfers: Transfers,
    bucket: str,
    key: str,
    start: int,
    length: int,
    put: Callable[[int, bytes], None],
    etag: str | None,
) -> None:
    """Call `put(at, block)` for `length` bytes of an object from `start` on, in order; after a cut it goes on there."""
    done = 0

    def attempt() -> None:
        nonlocal done
        before = done
        wanted = f"bytes={start + done}-{start + length - 1}"
        same = {"IfMatch": etag} if etag else {}
        try:
            response = _client().get_object(Bucket=bucket, Key=key, Range=wanted, **same)
            if response["ContentLength"] != length - done:
                raise OSError(
                    f"s3://{bucket}/{key} must have {length - done} bytes at {wanted}; the server has others."
                )
            while block := response["Body"].read(BLOCK_BYTES):
                put(start + done, block)
                done += len(block)
                if transfers.stop.is_set():
                    raise InterruptedError("Another transfer failed.")
        except Exception as error:
            if done == before or not _passes(error):
                raise  # else bytes have come: patience begins anew

    while done < length:
        transfers.ask(attempt)


# Requests


def patiently(call: Callable[[], T], stop: threading.Event | None = None) -> T:
    """What `call` returns; while it fails for a reason that passes, it is called again, until SLIMLINE_S3_RETRY_S."""
    stop = stop or threading.Event()
    failed_at = None
    for attempt in itertools.count():
        try:
            return call()
        except Exception as error:
            if not _passes(error):
                raise
            failed_at = failed_at or time.monotonic()
            # Random, so that not all threads and machines come back in the same moment.
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1)
            if time.monotonic() + pause - failed_at > settings().s3_retry_s:
                raise
            if attempt >= 2:
                _say_waiting(error)
            if stop.wait(pause):
                raise
    raise AssertionError("unreachable")


_said_at = 0.0


def _say_waiting(error: Exception) -> None:
    global _said_at
    if time.monotonic() - _said_at > 30:
        _said_at = time.monotonic()
        logger.warning("the object store fails (%s); asking again for up to %.0f s", error, settings().s3_retry_s)


def _passes(error: Exception) -> bool:
    """Whether an error may be gone in a moment: the network, a busy or restarting server, bytes lost on the way."""
    from botocore import exceptions
    from botocore.exceptions import ClientError, SSLError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return (status >= 500 and status != 501) or status in (408, 429) or _code(error) in PASSING
    lost = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
    return isinstance(error, lost) and not isinstance(error, SSLError)


# fmt: off
PASSING = (
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted", "RequestTimeout",
    "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException", "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
)
# fmt: on
"""Codes of answers that are worth asking again, whatever their status."""


def _code(error: Exception) -> str:
    """The code of the server's answer, as "NoSuchKey"; empty where there was none."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _head(bucket: str, key: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = _client().head_object(Bucket=bucket, Key=key)
    except Exception as error:
        if _code(error) in ("NoSuchKey", "404"):
            return None
        raise
    return found


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

    def client(**s3: Any) -> Any:
        return boto3.Session().client(
            "s3",
            endpoint_url=settings().s3_endpoint_url,
            region_name=settings().s3_region or boto3.Session().region_name or "us-east-1",
            config=Config(
                connect_timeout=5,
                read_timeout=60,
                retries={"total_max_attempts": 1, "mode": "standard"},  # `patiently` asks again
                max_pool_connections=NUM_TRANSFERS + NUM_FILES,
                request_checksum_calculation="when_required",  # we send our own
                response_checksum_validation="when_required",
                # What is sent carries a checksum; signing it as well would hash every byte once more.
                s3={"payload_signing_enabled": False, **s3},
            ),
        )

    found = client()
    # Stores other than AWS seldom answer for names like bucket.host.
    return found if re.search(r"\.amazonaws\.com(\.cn)?$", found.meta.endpoint_url) else client(addressing_style="path")


def endpoint() -> str:
    """Where the bucket is, for messages."""
    return str(_client().meta.endpoint_url)


def require_bucket(uri: str) -> None:
    """Raise NoBucket where the bucket of `uri` is known to be absent: some stores would create it silently."""
    from botocore.exceptions import ClientError

    bucket, _ = _parse(uri)
    try:
        patiently(lambda: _client().head_bucket(Bucket=bucket))
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            raise NoBucket(_no_bucket(bucket)) from error
        # 403: who may write need not be allowed to look; writing itself will tell


def _no_bucket(bucket: str) -> str:
    return f"The bucket {bucket!r} must exist at {endpoint()}; it does not. Create it."


def _boto3() -> Any:
    """The library, which is installed only where S3 is used."""
    try:
        import boto3
    except ImportError as error:
        raise ValueError("S3 locations need boto3; it is not installed. Run: pip install 'slimline[s3]'") from error
    return boto3


def _objects(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name below the prefix and description of every object; an object that *is* the prefix goes by its last part."""
    bucket, prefix = _parse(uri)
    position: dict[str, str] = {}
    while True:
        page = patiently(functools.partial(_client().list_objects_v2, Bucket=bucket, Prefix=prefix, **position))
        for item in page.get("Contents", []):
            key: str = item["Key"]
            if key.endswith("/"):
                continue
            if prefix and key == prefix:
                yield key.rpartition("/")[2], item
            elif not prefix or key.startswith(f"{prefix}/"):
                yield key.removeprefix(prefix).lstrip("/"), item
        if not page.get("IsTruncated"):
            return
        position = {"ContinuationToken": page["NextContinuationToken"]}


@contextmanager
def errors(uri: str) -> Iterator[None]:
    """Turn what boto3 raises into one sentence."""
    _boto3()
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, SSLError

    bucket, _ = _parse(uri)
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise PermissionError(
            f"Access to {uri} needs credentials; none were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "write them to ~/.aws/credentials."
        ) from error
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code == "NoSuchBucket":
            raise NoBucket(_no_bucket(bucket)) from error
        if status == 404:
            raise FileNotFoundError(f"{uri} does not exist at {endpoint()} (any more): {error}") from error
        if status in (401, 403):
            raise PermissionError(f"{endpoint()} refuses access to {uri} ({code}). Check the credentials.") from error
        if _passes(error):
            raise ConnectionError(
                f"The S3 endpoint {endpoint()} answers {code} ({status}) for {uri}, {_for_how_long()}. Look at the "
                "store's own log, and try again when it is well."
            ) from error
        raise OSError(f"{endpoint()} answered {code} for {uri}: {error}") from error
    except SSLError as error:
        raise ConnectionError(
            f"The certificate of {endpoint()} must be one that this machine trusts; it is not: {error}. Name the "
            "authority's certificate in AWS_CA_BUNDLE."
        ) from error
    except BotoCoreError as error:
        if _passes(error):
            raise ConnectionError(
                f"The S3 endpoint {endpoint()} cannot be reached for {uri}, {_for_how_long()}. Check "
                "SLIMLINE_S3_ENDPOINT_URL and the network."
            ) from error
        raise OSError(f"S3 failed for {uri} at {endpoint()}: {error}") from error


def _for_how_long() -> str:
    return f"asked again for {settings().s3_retry_s:g} s"
