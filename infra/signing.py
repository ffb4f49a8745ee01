"""Who vouches for which bytes, and what they were made from: signed statements about directories.

A statement is in-toto's (https://in-toto.io/Statement/v1) with SLSA's provenance as its predicate, in a DSSE envelope
(https://github.com/secure-systems-lab/dsse, protocol 1.0.2) signed with Ed25519, so that others' tools read it too. It
lies in the directory as `signature.json` and lists every other file.

This file travels with registered versions and checks them wherever they are loaded: it imports little.
"""

import base64
import hashlib
import logging
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import BaseModel, Field, ValidationError

from infra.locks import held
from infra.settings import settings

logger = logging.getLogger(__name__)

SIGNATURE = "signature.json"
OF_MLFLOW = "registered_model_meta"
"""MLflow adds it to every copy of a registered version that it makes, and reads no code or model from it."""
IN_TOTO = "application/vnd.in-toto+json"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Unverified(ValueError):
    """Files are unsigned, signed by a key that is not trusted, or not those that were signed."""


class Signature(BaseModel, frozen=True):
    """One signature of an envelope. `keyid` is a hint; what counts is whose key verifies `sig`."""

    keyid: str
    sig: str


class Envelope(BaseModel, frozen=True):
    """A signed text, as DSSE writes it: `payload` and `sig` are base64."""

    payloadType: str
    payload: str
    signatures: tuple[Signature, ...]


class Facts(BaseModel, frozen=True, extra="forbid"):
    """What a statement says about the directory beside its files.

    `sha256` is that of the artifact (the bundle) in it, `parents` are those of the models it was made from, nearest
    first; `hardware` is that of the verdict, as `infra.hardware.hardware` has it.
    """

    model: str
    sha256: Sha256
    verdict: str
    hardware: dict[str, Any] = {}
    git_commit: str = ""
    recipe_sha256: str = ""
    sbom_sha256: str = ""
    flow_run: str = ""
    parents: tuple[str, ...] = ()


class _Resource(BaseModel, frozen=True):
    """in-toto's ResourceDescriptor."""

    name: str
    digest: dict[str, str]
    annotations: dict[str, int] = {}


class _BuildDefinition(BaseModel, frozen=True):
    buildType: Literal["urn:slimline:optimize"] = "urn:slimline:optimize"
    externalParameters: Facts
    resolvedDependencies: tuple[_Resource, ...]


class _Provenance(BaseModel, frozen=True):
    """SLSA's provenance 1.0; what it says of the run is among the parameters."""

    buildDefinition: _BuildDefinition
    runDetails: dict[str, Any] = {"builder": {"id": "urn:slimline"}}


class Statement(BaseModel, frozen=True):
    """What was signed."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field("https://in-toto.io/Statement/v1", alias="_type")
    subject: tuple[_Resource, ...]
    predicateType: Literal["https://slsa.dev/provenance/v1"] = "https://slsa.dev/provenance/v1"
    predicate: _Provenance

    @property
    def facts(self) -> Facts:
        """What it says beside the files."""
        return self.predicate.buildDefinition.externalParameters

    @property
    def files(self) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of every file, by its path in the directory."""
        return {each.name: (each.annotations["size_bytes"], each.digest["sha256"]) for each in self.subject}


def sign(directory: Path, facts: Facts) -> Envelope:
    """A statement about all files below `directory` but its signature, signed with this process's key.

    Raises:
        ValueError: there is nothing to sign, a file is a link, or the key cannot be used.
    """
    found = _files(directory)
    if not found:
        raise ValueError(f"What is signed must hold files; {directory} holds none.")
    if links := [name for name, path in found.items() if path.is_symlink()]:
        raise ValueError(f"What is signed must hold its files itself; {links[0]} is a link. Copy what it leads to.")
    sizes = [path.stat().st_size for path in found.values()]
    subject = tuple(
        _Resource(name=name, digest={"sha256": sha256}, annotations={"size_bytes": size})
        for name, size, sha256 in zip(found, sizes, _digests(found.values()), strict=True)
    )
    sources = [_Resource(name="code", digest={"gitCommit": facts.git_commit})] if facts.git_commit else []
    sources += [_Resource(name="parent", digest={"sha256": sha256}) for sha256 in facts.parents]
    definition = _BuildDefinition(externalParameters=facts, resolvedDependencies=tuple(sources))
    statement = Statement(subject=subject, predicate=_Provenance(buildDefinition=definition))
    return seal(IN_TOTO, statement.model_dump_json(by_alias=True).encode())


def check(directory: Path, envelope: Envelope, *, imported: bool = False) -> Statement:
    """What was signed about `directory`, of which every byte is what it was then. Nothing in it is parsed.

    Args:
        directory: all files below it are read.
        envelope: as `signature_of` reads it, or kept elsewhere.
        imported: Python has imported code that lies in it, and put its `__pycache__` there.

    Raises:
        Unverified: the key is not trusted, or a file changed, is missing, or was added; the message names it.
    """
    try:
        statement = Statement.model_validate_json(unseal(envelope, IN_TOTO))
        expected = statement.files
    except (ValidationError, KeyError) as error:
        raise Unverified(f"The statement about {directory} is signed, but not one of Slimline's: {error}") from None
    found = _files(directory)
    if imported:
        found = {name: path for name, path in found.items() if "__pycache__" not in name.split("/")}
    for name in sorted(expected.keys() - found.keys()):
        raise Unverified(f"{directory} lost its file {name} after it was signed. {_AGAIN}")
    for name in sorted(found.keys() - expected.keys()):
        raise Unverified(f"{directory} got the file {name} after it was signed. {_AGAIN}")
    for name, path in found.items():
        if path.is_symlink() or path.stat().st_size != expected[name][0]:
            raise Unverified(f"File {name} of {directory} was changed after it was signed. {_AGAIN}")
    for name, sha256 in zip(found, _digests(found.values()), strict=True):
        if sha256 != expected[name][1]:
            raise Unverified(f"File {name} of {directory} was changed after it was signed. {_AGAIN}")
    return statement


_AGAIN = "Use none of it: take it from where it was signed, or another version."


def signature_of(directory: Path) -> Envelope:
    """The envelope in a signed directory.

    Raises:
        Unverified: there is none, or what is there is none.
    """
    file = directory / SIGNATURE
    if not file.is_file():
        raise Unverified(f"{directory} is not signed: it has no {SIGNATURE}. Register its bundle again.")
    try:
        return Envelope.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise Unverified(f"{file} is no DSSE envelope: {error.errors()[0]['msg']}. {_AGAIN}") from None


def statement_sha256(envelope: Envelope) -> str:
    """The digest of what was signed: it tells two statements of one key about one directory apart."""
    return hashlib.sha256(base64.b64decode(envelope.payload)).hexdigest()


def seal(payload_type: str, payload: bytes) -> Envelope:
    """`payload`, signed with this process's key.

    Raises:
        ValueError: the key cannot be used.
    """
    key = signing_key()
    signature = key.sign(_to_sign(payload_type, payload))
    return Envelope(
        payloadType=payload_type,
        payload=base64.b64encode(payload).decode(),
        signatures=(Signature(keyid=key_id(key.public_key()), sig=base64.b64encode(signature).decode()),),
    )


def unseal(envelope: Envelope, payload_type: str) -> bytes:
    """The payload of an envelope that a trusted key signed.

    Raises:
        Unverified: no trusted key did, or it holds something else than `payload_type`.
        ValueError: no key is trusted here.
    """
    trusted = trusted_keys()
    try:
        payload = base64.b64decode(envelope.payload, validate=True)
        signatures = [base64.b64decode(each.sig, validate=True) for each in envelope.signatures]
    except ValueError:
        raise Unverified("The signature is no base64. Take the version from where it was signed.") from None
    signed = _to_sign(envelope.payloadType, payload)
    if not any(_verifies(key, signature, signed) for key in trusted for signature in signatures):
        by = ", ".join(each.keyid[:12] for each in envelope.signatures) or "no key"
        ours = ", ".join(key_id(key)[:12] for key in trusted)
        if {each.keyid for each in envelope.signatures} & {key_id(key) for key in trusted}:
            raise Unverified(f"The signature by the key {by} does not fit what it signs: that was changed. {_AGAIN}")
        raise Unverified(
            f"The signature must be by a trusted key ({ours}); it is by {by}. If that one is to be trusted, add its "
            "public key to SLIMLINE_TRUSTED_KEYS."
        )
    if envelope.payloadType != payload_type:
        raise Unverified(f"What is signed must be {payload_type}; it is {envelope.payloadType}.")
    return payload


def _verifies(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _to_sign(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: a payload cannot be passed off as one of another type."""
    name = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(payload), payload)


# Keys


def signing_key() -> Ed25519PrivateKey:
    """The key that this process signs with: SLIMLINE_SIGNING_KEY, or the home's, which is made on first use.

    Raises:
        ValueError: it is no Ed25519 key in PEM.
    """
    secret = settings().signing_key
    if secret is None:
        place = settings().home / "keys"
        with held(place / "lock"):
            if not (place / PRIVATE).exists():
                make_keys(place)
        return _private(_text_of("the home's key", str(place / PRIVATE)), str(place / PRIVATE))
    return _private(_text_of("SLIMLINE_SIGNING_KEY", secret.get_secret_value()), "SLIMLINE_SIGNING_KEY")


def trusted_keys() -> list[Ed25519PublicKey]:
    """The keys whose signatures count: SLIMLINE_TRUSTED_KEYS, or only the one that this process signs with.

    Raises:
        ValueError: there is none, or what is set is none.
    """
    if trusted := settings().trusted_keys:
        return _public(_text_of("SLIMLINE_TRUSTED_KEYS", trusted))
    if settings().signing_key is not None or (settings().home / "keys" / PRIVATE).exists():
        return [signing_key().public_key()]
    raise ValueError(
        "What is loaded must be signed by a trusted key, and none is trusted here. Set SLIMLINE_TRUSTED_KEYS to the "
        f"file of public keys of those who sign ({PUBLIC}, beside their {PRIVATE}), or SLIMLINE_HOME to the home that "
        "the runs had."
    )


PRIVATE, PUBLIC = "signing.pem", "trusted.pem"


def make_keys(directory: Path) -> str:
    """Write a new key pair into `directory`, signing.pem for its owner only, and trusted.pem; the key's id.

    Raises:
        ValueError: there is one already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    draft = directory / f".{PRIVATE}.{os.getpid()}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
            file.write(private)
        os.link(draft, directory / PRIVATE)  # never over another
    except FileExistsError:
        raise ValueError(f"A key pair is made in a directory without one; {directory} has one. Name another.") from None
    finally:
        draft.unlink()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (directory / PUBLIC).write_bytes(public)
    return key_id(key.public_key())


def key_id(key: Ed25519PublicKey) -> str:
    """The SHA-256 of the key in DER, as `openssl pkey -pubin -outform DER | sha256sum` says it."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _text_of(setting: str, value: str) -> str:
    """The PEM that a setting is, or names the file of. Neither is ever shown."""
    if "-----BEGIN" in value:
        return value.replace("\\n", "\n")  # env files have one line per variable
    try:
        return Path(value).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"{setting} must be a file of PEM, or the PEM itself; it cannot be read: {why}.") from None


def _private(text: str, setting: str) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(
            f"{setting} must be an Ed25519 private key in PEM, without a password; it is none. "
            "`slimline keys DIRECTORY` makes one."
        )
    return key


def _public(text: str) -> list[Ed25519PublicKey]:
    found = []
    for block in re.findall(r"-----BEGIN [^-]+-----.*?-----END [^-]+-----", text, re.DOTALL) or [""]:
        try:
            key = load_pem_public_key(block.encode())
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            kind = block.split("-----")[1].removeprefix("BEGIN ") if block else "none"
            raise ValueError(
                f"SLIMLINE_TRUSTED_KEYS must hold Ed25519 public keys in PEM (BEGIN PUBLIC KEY); one is {kind}. Those "
                f"that `slimline keys DIRECTORY` writes into {PUBLIC} may be put one after the other."
            )
        found.append(key)
    return found


# Files


def _files(directory: Path) -> dict[str, Path]:
    """What lies below `directory` and is no directory, links among it, by its path there; without the signature."""
    found = sorted(path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    named = {path.relative_to(directory).as_posix(): path for path in found}
    return {name: path for name, path in named.items() if name not in (SIGNATURE, OF_MLFLOW)}


def _digests(paths: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves Python's lock
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
