import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra import ledger, s3
from infra.ledger import BrokenLedger, append, append_after, entries
from infra.settings import environment, settings
from tests.homes import home_at
from tests.infra.fault_proxy import LoseAnswer, fault_proxy

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path):
    with home_at(tmp_path / "home") as where:
        yield where


@pytest.fixture
def bucket(client, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("SLIMLINE_STORE", "s3://models/team")
    settings.cache_clear()
    yield "s3://models/team/ledger"
    settings.cache_clear()


def three() -> list[ledger.Entry]:
    return [
        append("tiny", who="ada", what="requested", version="1", why="smaller"),
        append("tiny", who="ben", what="approved", version="1", request=1),
        append("tiny", who="ada", what="promoted", version="1", request=1, sha256="a" * 64),
    ]


def file(home: Path, number: int) -> Path:
    return home / "ledger" / "tiny" / f"{number}.json"


def rewrite(path: Path, **changes: object) -> None:
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_entries_come_back_in_order_each_naming_the_one_before(home):
    made = three()
    assert entries("tiny") == made
    assert [entry.number for entry in made] == [1, 2, 3]
    assert [entry.previous for entry in made] == ["", made[0].digest, made[1].digest]
    assert entries("other") == []
    assert ledger.models() == ["tiny"]


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_a_name_that_leads_elsewhere_is_no_ledger(home, name):
    with pytest.raises(ValueError, match=f"{name!r} is the name of none"):
        entries(name)


def test_names_with_signs_have_ledgers_of_their_own(home):
    append("a b%2f@ü", who="ada", what="requested", version="1")
    assert ledger.models() == ["a b%2f@ü"]
    assert len(entries("a b%2f@ü")) == 1


def test_a_changed_entry_is_named(home):
    three()
    rewrite(file(home, 2), who="eve")
    with pytest.raises(BrokenLedger, match=r"Entry 2 of the ledger of tiny was changed: .*/tiny/2\.json"):
        entries("tiny")


def test_an_entry_that_was_forged_with_its_digest_breaks_the_chain(home):
    forged = three()[1].model_copy(update={"who": "eve"})
    rewrite(file(home, 2), who="eve", digest=forged.computed_digest())
    with pytest.raises(BrokenLedger, match=r"Entry 3 .* does not follow.*entry 2 was changed"):
        entries("tiny")


def test_a_missing_entry_is_named(home):
    three()
    file(home, 2).unlink()
    with pytest.raises(BrokenLedger, match=r"Entry 2 of the ledger of tiny is missing"):
        entries("tiny")


def test_entries_that_changed_places_are_named(home):
    three()
    first, second = file(home, 1).read_bytes(), file(home, 2).read_bytes()
    for number, content in ((1, second), (2, first)):
        file(home, number).chmod(0o644)
        file(home, number).write_bytes(content)
    with pytest.raises(BrokenLedger, match="Entry 1 of the ledger of tiny was changed"):
        entries("tiny")


def test_what_is_no_entry_is_named_and_nothing_is_added_to_it(home):
    three()
    file(home, 3).chmod(0o644)
    file(home, 3).write_text("{}")
    with pytest.raises(BrokenLedger, match="Entry 3 of the ledger of tiny is none"):
        append("tiny", who="ada", what="requested", version="2")
    assert not file(home, 4).exists()


def test_who_knows_less_than_is_there_adds_nothing(home):
    made = three()
    assert append_after(made[:2], "tiny", who="ada", what="started", version="2") is None
    assert append_after(made, "tiny", who="ada", what="started", version="2") is not None
    assert len(entries("tiny")) == 4


def test_processes_that_append_at_once_lose_nothing(home):
    code = (
        "import sys\n"
        "from infra.ledger import append\n"
        "for i in range(20): append('tiny', who=sys.argv[1], what='requested', version=str(i))\n"
    )
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen([*command, f"p{i}"], cwd=ROOT, env=environment(SLIMLINE_HOME=str(home))) for i in range(4)
    ]
    assert [process.wait(120) for process in running] == [0] * 4
    found = entries("tiny")
    assert sorted((entry.who, int(entry.version)) for entry in found) == [
        (f"p{i}", v) for i in range(4) for v in range(20)
    ]
    assert not list(file(home, 1).parent.glob(".*"))


@pytest.mark.servers
def test_threads_that_append_to_a_bucket_at_once_lose_nothing(bucket):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: append("tiny", who=f"t{i}", what="requested", version=str(i)), range(24)))
    assert sorted(entry.number for entry in made) == list(range(1, 25))
    assert entries("tiny") == sorted(made, key=lambda entry: entry.number)
    assert ledger.models() == ["tiny"]


@pytest.mark.servers
def test_of_many_that_create_one_object_at_once_exactly_one_does(bucket):
    together = threading.Barrier(16)

    def create(i: int) -> bool:
        together.wait()
        return s3.create(f"{bucket}/race/1.json", f"{i}".encode())

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert s3.read(f"{bucket}/race/1.json") == str(won.index(True)).encode()


@pytest.mark.servers
def test_an_entry_whose_answer_was_lost_is_ours_and_added_once(bucket, s3_server, monkeypatch):
    with fault_proxy(s3_server.url) as proxy:
        cut = iter([LoseAnswer()])
        proxy.plan = lambda exchange: next(cut, None) if exchange.method == "PUT" else None
        monkeypatch.setenv("SLIMLINE_S3_ENDPOINT_URL", proxy.url)
        settings.cache_clear()
        s3._client.cache_clear()
        made = append("lost", who="ada", what="requested", version="1")
        puts = [exchange.status for exchange in proxy.log if exchange.method == "PUT"]
        assert puts == [200, 412], "stored at once, and its answer cut; the second attempt found it"
        assert entries("lost") == [made]
    s3._client.cache_clear()


@pytest.mark.servers
def test_a_changed_entry_in_a_bucket_is_named(bucket, client):
    three()
    key = "team/ledger/tiny/2.json"
    content = client.get_object(Bucket="models", Key=key)["Body"].read().replace(b"ben", b"eve")
    client.put_object(Bucket="models", Key=key, Body=content)
    with pytest.raises(BrokenLedger, match="Entry 2 of the ledger of tiny was changed: s3://models/team/ledger/tiny/2"):
        entries("tiny")
