import base64
import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from infra import signing
from infra.settings import settings, shared_environment
from infra.signing import Envelope, Facts, Unverified, check, key_id, make_keys, sign, signing_key

FACTS = Facts(model="tiny", sha256="a" * 64, verdict="ACCEPT", git_commit="c0ffee", parents=("b" * 64,))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield tmp_path / "home"
    settings.cache_clear()


@pytest.fixture
def directory(tmp_path) -> Path:
    place = tmp_path / "bundle"
    (place / "inner").mkdir(parents=True)
    (place / "engine.onnx").write_bytes(bytes(range(256)) * 10)
    (place / "inner" / "tokenizer.json").write_text("{}")
    (place / "empty").touch()
    return place


@pytest.fixture
def envelope(directory) -> Envelope:
    envelope = sign(directory, FACTS)
    (directory / signing.SIGNATURE).write_text(envelope.model_dump_json())
    return envelope


def test_what_was_signed_is_what_is_read_back(directory, envelope):
    statement = check(directory, signing.signature_of(directory))
    assert statement.facts == FACTS
    assert set(statement.files) == {"engine.onnx", "inner/tokenizer.json", "empty"}
    assert statement.files["inner/tokenizer.json"] == (2, hashlib.sha256(b"{}").hexdigest())


def test_the_envelope_is_dsse_over_a_statement_of_in_toto_as_openssl_verifies_it(directory, envelope, home, tmp_path):
    """The standard's words, composed and verified without our code."""
    written = json.loads((directory / signing.SIGNATURE).read_text())
    payload = base64.b64decode(written["payload"])
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {"name": "code", "digest": {"gitCommit": "c0ffee"}, "annotations": {}} in (
        statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    )
    kind = written["payloadType"]
    (tmp_path / "signed").write_bytes(f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload)
    (tmp_path / "sig").write_bytes(base64.b64decode(written["signatures"][0]["sig"]))
    key = home / "keys" / "trusted.pem"
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", key, "-rawin"]
    subprocess.run([*command, "-in", tmp_path / "signed", "-sigfile", tmp_path / "sig"], check=True)
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", key, "-outform", "DER"], check=True, capture_output=True
    ).stdout
    assert written["signatures"][0]["keyid"] == hashlib.sha256(der).hexdigest()


def test_every_changed_byte_is_found(directory, envelope):
    for name in ("engine.onnx", "inner/tokenizer.json"):
        content = (directory / name).read_bytes()
        for place in range(0, len(content), 97):
            changed = bytearray(content)
            changed[place] ^= 1
            (directory / name).write_bytes(changed)
            with pytest.raises(Unverified, match=f"File {name} of .* was changed after it was signed"):
                check(directory, envelope)
        (directory / name).write_bytes(content)
    assert check(directory, envelope).facts == FACTS


def add(directory: Path) -> None:
    (directory / "inner" / "more.py").touch()


def lose(directory: Path) -> None:
    (directory / "empty").unlink()


def grow(directory: Path) -> None:
    (directory / "empty").write_text("x")


def link(directory: Path) -> None:
    (directory / "engine.onnx").rename(directory.parent / "elsewhere")
    (directory / "engine.onnx").symlink_to(directory.parent / "elsewhere")


def link_a_folder(directory: Path) -> None:
    (directory.parent / "folder").mkdir()
    (directory / "folder").symlink_to(directory.parent / "folder")


def cache(directory: Path) -> None:
    (directory / "__pycache__").mkdir()
    (directory / "__pycache__" / "serving.cpython-311.pyc").touch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add, "got the file inner/more.py"),
        (lose, "lost its file empty"),
        (grow, "File empty of .* was changed"),
        (link, "File engine.onnx of .* was changed"),
        (link_a_folder, "got the file folder"),
        (cache, "got the file __pycache__/serving.cpython-311.pyc"),
    ],
)
def test_files_that_are_not_those_that_were_signed_are_named(directory, envelope, change, message):
    change(directory)
    with pytest.raises(Unverified, match=message):
        check(directory, envelope)


def test_what_python_writes_beside_code_that_runs_is_no_change(directory, envelope):
    cache(directory)
    assert check(directory, envelope, imported=True).facts == FACTS


def test_an_unsigned_directory_says_so(directory):
    with pytest.raises(Unverified, match=r"bundle is not signed: it has no signature.json"):
        signing.signature_of(directory)


@pytest.mark.parametrize("written", ["", "{}", "[1]", '{"payload": 1}'])
def test_a_signature_that_is_none_says_so(directory, written):
    (directory / signing.SIGNATURE).write_text(written)
    with pytest.raises(Unverified, match=r"signature.json is no DSSE envelope"):
        signing.signature_of(directory)


def test_a_key_that_is_not_trusted_is_named(directory, envelope, tmp_path, monkeypatch):
    other = make_keys(tmp_path / "other")
    monkeypatch.setenv("SLIMLINE_TRUSTED_KEYS", str(tmp_path / "other" / "trusted.pem"))
    settings.cache_clear()
    with pytest.raises(
        Unverified, match=f"must be by a trusted key .{other[:12]}.; it is by {envelope.signatures[0].keyid[:12]}"
    ):
        check(directory, envelope)
    forged = envelope.model_copy(update={"signatures": (envelope.signatures[0].model_copy(update={"keyid": other}),)})
    with pytest.raises(Unverified, match="does not fit what it signs"):
        check(directory, forged)


def test_a_changed_statement_is_found(directory, envelope):
    (directory / "empty").write_text("x")  # and the statement is made to say so
    statement = base64.b64decode(envelope.payload)
    changed = statement.replace(hashlib.sha256(b"").hexdigest().encode(), hashlib.sha256(b"x").hexdigest().encode())
    changed = changed.replace(b'"size_bytes":0', b'"size_bytes":1')
    assert changed != statement
    forged = envelope.model_copy(update={"payload": base64.b64encode(changed).decode()})
    with pytest.raises(Unverified, match="does not fit what it signs: that was changed"):
        check(directory, forged)


def test_a_sealed_text_of_another_kind_is_no_statement(directory):
    with pytest.raises(Unverified, match=r"must be application/vnd.in-toto\+json; it is text/plain"):
        check(directory, signing.seal("text/plain", b"{}"))
    with pytest.raises(Unverified, match="not one of Slimline's"):
        check(directory, signing.seal(signing.IN_TOTO, b"{}"))


def test_keys_may_be_files_or_texts_and_several_are_trusted(directory, envelope, tmp_path, monkeypatch, home):
    make_keys(tmp_path / "other")
    both = (tmp_path / "other" / "trusted.pem").read_text() + (home / "keys" / "trusted.pem").read_text()
    monkeypatch.setenv("SLIMLINE_TRUSTED_KEYS", both)
    settings.cache_clear()
    assert check(directory, envelope).facts == FACTS
    monkeypatch.setenv("SLIMLINE_SIGNING_KEY", (tmp_path / "other" / "signing.pem").read_text().replace("\n", "\\n"))
    settings.cache_clear()
    assert check(directory, sign(directory, FACTS)).facts == FACTS
    assert "SLIMLINE_SIGNING_KEY" not in shared_environment()


def test_the_home_gets_a_key_once_for_its_owner_only(home):
    first = key_id(signing_key().public_key())
    assert key_id(signing_key().public_key()) == first
    assert (home / "keys" / "signing.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match=r"has one\. Name another"):
        make_keys(home / "keys")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["genpkey", "-algorithm", "ed25519"], None),
        (["genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "pass:x"], "without a password; it is none"),
        (["genpkey", "-algorithm", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"], "an Ed25519 private key in PEM"),
    ],
)
def test_keys_of_openssl_are_taken_if_they_are_ed25519(command, message, tmp_path, monkeypatch):
    subprocess.run(["openssl", *command, "-out", tmp_path / "key.pem"], check=True, capture_output=True)
    monkeypatch.setenv("SLIMLINE_SIGNING_KEY", str(tmp_path / "key.pem"))
    settings.cache_clear()
    if message is None:
        assert signing_key()
    else:
        with pytest.raises(ValueError, match=message) as failed:
            signing_key()
        assert "PRIVATE" not in str(failed.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.pem", "it cannot be read: No such file"),
        ("signing.pem", "one is PRIVATE KEY"),
        ("text", "one is none"),
    ],
)
def test_what_is_no_public_key_is_told(value, message, directory, envelope, home, tmp_path, monkeypatch):
    (home / "keys" / "text").write_text("hello")
    monkeypatch.setenv("SLIMLINE_TRUSTED_KEYS", str(home / "keys" / value))
    settings.cache_clear()
    with pytest.raises(ValueError, match=message):
        check(directory, envelope)


def test_without_any_key_nothing_is_taken(directory, envelope, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "elsewhere"))
    settings.cache_clear()
    with pytest.raises(ValueError, match=r"none is trusted here\. Set SLIMLINE_TRUSTED_KEYS"):
        check(directory, envelope)
    assert not (tmp_path / "elsewhere" / "keys").exists()
