"""Token sets hold the text they say, the same every time, and nothing that is evaluated on is trained on."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.calibration import tokens
from tasks.calibration.checkpoints import load_tokenizer
from tasks.calibration.corpora import Data, Document, HumanEval, JsonLines, Stdlib, TextFiles
from tasks.calibration.tokens import (
    OverlapGuard,
    Window,
    check_vocabulary,
    load_record,
    load_tokens,
    more_windows,
    prepare_data,
)

WORDS = list("abcdefghijklmnopq")


def _prose(seed: int, num_words: int) -> str:
    """Words drawn at random: two texts share no passage of 50 words."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """60 documents of about 200 tokens each."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(_prose(number, 200))
    return folder


def _data(folder: Path, **changes: Any) -> Data:
    corpus = TextFiles(paths=(f"{folder}/*.txt",))
    options: dict[str, Any] = {
        "training": corpus,
        "calibration": corpus,
        "evaluation": corpus,
        "sequence_length": 32,
        "evaluation_window": 64,
        "num_training_tokens": 3200,
        "num_calibration_sequences": 10,
        "num_evaluation_windows": 12,
    }
    return Data(**(options | changes))


def _prepare(checkpoint: Path, data: Data, out: Path, seed: int = 0) -> tokens.DataSummary:
    out.mkdir()
    return prepare_data(checkpoint=checkpoint, data=data, seed=seed, out=out)


def test_every_role_has_its_shape(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    summary = _prepare(tiny_checkpoint, _data(texts), tmp_path / "out")
    shapes = {"training": (100, 32), "calibration": (10, 32), "evaluation": (12, 64)}
    for role, shape in shapes.items():
        array = load_tokens(tmp_path / "out", role)  # type: ignore[arg-type]
        assert (array.shape, array.dtype) == (shape, np.int32)
        assert array.min() >= 0
        assert array.max() < 512
    assert (summary.num_training_tokens, summary.num_evaluation_tokens, summary.vocab_size) == (3200, 768, 512)
    assert summary.notes == ()


def test_training_is_whole_documents_separated_by_the_end_token(
    tiny_checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    _prepare(tiny_checkpoint, _data(texts), tmp_path / "out")
    tokenizer = load_tokenizer(tiny_checkpoint)
    expected: list[int] = []
    for name in load_record(tmp_path / "out")["roles"]["training"]["documents"]:
        expected += [*tokenizer((texts / name).read_text()).input_ids, tokenizer.eos_token_id]
    stream = load_tokens(tmp_path / "out", "training").ravel().tolist()
    assert stream == expected[:3200]
    assert stream.count(tokenizer.eos_token_id) > 2


def test_an_evaluation_window_is_a_stretch_of_one_document(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    summary = _prepare(tiny_checkpoint, _data(texts), tmp_path / "out")
    tokenizer = load_tokenizer(tiny_checkpoint)
    record = load_record(tmp_path / "out")
    windows = load_tokens(tmp_path / "out", "evaluation")
    owners = np.load(tmp_path / "out" / "evaluation_documents.npy")
    assert owners.dtype == np.int32
    names = record["roles"]["evaluation"]["documents"]
    for window, document, num_bytes in zip(windows, owners, record["evaluation_bytes_per_window"], strict=True):
        ids = tokenizer((texts / names[document]).read_text()).input_ids
        starts = [at for at in range(len(ids) - 63) if ids[at : at + 64] == window.tolist()]
        assert len(starts) == 1
        assert starts[0] % 64 == 0
        # the text is ASCII, so bytes are characters; a window predicts all its tokens but the first
        assert num_bytes == sum(len(tokenizer.decode([token])) for token in window[1:])
    assert summary.evaluation_bytes == sum(record["evaluation_bytes_per_window"])
    assert summary.num_windows_across_documents == 0


def test_windows_come_from_as_many_documents_as_there_are(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    data = _data(texts)
    available = len(tokens.documents(data)["evaluation"])
    summary = _prepare(tiny_checkpoint, data, tmp_path / "out")
    assert summary.num_evaluation_documents == min(available, 12)
    many = _prepare(tiny_checkpoint, _data(texts, num_evaluation_windows=2 * available), tmp_path / "many")
    assert many.num_evaluation_documents == available
    counts = np.bincount(np.load(tmp_path / "many" / "evaluation_documents.npy"))
    assert counts.max() - counts.min() <= 1
    windows = load_tokens(tmp_path / "many", "evaluation")
    assert len(np.unique(windows, axis=0)) == len(windows)


def test_short_documents_are_joined_only_when_windows_run_out_and_it_is_stated(
    tiny_checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": _prose(1000 + n, 12)}) + "\n" for n in range(40)))
    data = _data(texts, evaluation=JsonLines(paths=(str(short),)), num_evaluation_windows=5)
    summary = _prepare(tiny_checkpoint, data, tmp_path / "out")
    assert summary.num_windows_across_documents == 5
    assert summary.notes == ("5 of 5 evaluation windows hold more than one document.",)
    assert load_tokenizer(tiny_checkpoint).eos_token_id in load_tokens(tmp_path / "out", "evaluation")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    tiny_checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    _prepare(tiny_checkpoint, _data(texts), tmp_path / "a")
    moved = texts.rename(tmp_path / "moved")
    _prepare(tiny_checkpoint, _data(moved), tmp_path / "b")
    other = _prepare(tiny_checkpoint, _data(moved), tmp_path / "c", seed=1)
    a = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert a == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    assert sorted(a) == ["calibration.npy", "data.json", "evaluation.npy", "evaluation_documents.npy", "training.npy"]
    assert str(tmp_path).encode() not in a["data.json"]
    first = load_record(tmp_path / "a")["roles"]
    assert {other.training_sha256, other.calibration_sha256, other.evaluation_sha256}.isdisjoint(
        {first[role]["sha256"] for role in first}
    )
    assert set(first["evaluation"]["documents"]).isdisjoint(
        load_record(tmp_path / "c")["roles"]["training"]["documents"]
    )


def test_calibration_sees_parts_of_several_documents(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    _prepare(tiny_checkpoint, _data(texts), tmp_path / "out")
    rows = load_tokens(tmp_path / "out", "calibration")
    tokenizer = load_tokenizer(tiny_checkpoint)
    content = {
        name: tokenizer((texts / name).read_text()).input_ids
        for name in load_record(tmp_path / "out")["roles"]["calibration"]["documents"]
    }

    def sources(row: list[int]) -> set[str]:
        return {n for n, ids in content.items() for at in range(len(ids) - 11) if ids[at : at + 12] == row[:12]}

    assert len(set.union(*(sources(row.tolist()) for row in rows))) >= 3  # 10 rows in order would span at most 2


def test_training_takes_what_there_is_and_says_so(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    summary = _prepare(tiny_checkpoint, _data(texts, num_training_tokens=10**6), tmp_path / "out")
    assert 3200 < summary.num_training_tokens < 10**6
    assert f"asked for 1000000 tokens; its share of text *.txt gives {summary.num_training_tokens}" in summary.notes[0]


def test_no_training_tokens_are_none(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    assert _prepare(tiny_checkpoint, _data(texts, num_training_tokens=0), tmp_path / "out").num_training_tokens == 0
    assert load_tokens(tmp_path / "out", "training").shape == (0, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_evaluation_windows": 10_000}, r"Evaluation needs 10000 windows of 64 tokens; its share of text \*\.txt"),
        ({"evaluation_window": 100_000}, r"windows of 100000 tokens; .* documents\) gives 0"),
        ({"num_calibration_sequences": 10_000}, "Calibration needs 10000 sequences of 32 tokens; .* gives"),
        ({"sequence_length": 10**6, "num_training_tokens": 10**6, "num_calibration_sequences": 1}, "gives 0"),
    ],
)
def test_a_corpus_that_is_too_short_says_by_how_much(
    tiny_checkpoint: Path, texts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _prepare(tiny_checkpoint, _data(texts, **changes), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# Overlap


def _guard(*texts: str) -> OverlapGuard:
    used = [Document(f"evaluated {n}", text) for n, text in enumerate(texts)]
    return OverlapGuard(list(texts), [Window([], n, False, []) for n in range(len(texts))], used)


def test_shingles_are_equal_exactly_where_fifty_words_are() -> None:
    left, right = _prose(1, 80).split(), _prose(2, 70).split()
    right[10:65] = left[20:75]
    hashes = {int(h): n for n, h in enumerate(tokens._shingles(" ".join(left)))}
    found = [(hashes[int(h)], n) for n, h in enumerate(tokens._shingles(" ".join(right))) if int(h) in hashes]
    expected = [(a, b) for a in range(31) for b in range(21) if left[a : a + 50] == right[b : b + 50]]
    assert found == sorted(expected, key=lambda pair: pair[1])
    assert {(20 + n, 10 + n) for n in range(6)} <= set(found)


def test_a_document_that_is_evaluated_on_is_found_whatever_its_spacing_and_case() -> None:
    guard = _guard("Short text.", _prose(1, 300))
    assert guard.evaluated(Document("x", "  short\nTEXT. ")) == "evaluated 0"
    assert guard.evaluated(Document("x", _prose(2, 300))) is None


@pytest.mark.parametrize(("num_shared", "found"), [(49, False), (74, False), (75, True), (300, True)])
def test_a_tenth_of_a_windows_passages_is_the_limit(num_shared: int, found: bool) -> None:
    evaluated = _prose(1, 300)  # 251 passages of 50 words; 74 shared words hold 25 of them, 75 hold 26
    document = _prose(2, 500) + " " + " ".join(evaluated.split()[:num_shared]) + " " + _prose(3, 500)
    assert (_guard(_prose(9, 300), evaluated).evaluated(Document("x", document)) == "evaluated 1") is found


@pytest.mark.parametrize("role", ["training", "calibration"])
def test_text_that_is_evaluated_on_is_refused_in_other_roles(
    tiny_checkpoint: Path, texts: Path, tmp_path: Path, role: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(texts, other)
    for file in other.iterdir():
        file.write_text(_prose(5000, 30) + " " + file.read_text())  # not the same documents, but the same text
    data = _data(texts, **{role: TextFiles(paths=(f"{other}/*.txt",)), "num_training_tokens": 10**5})
    with pytest.raises(
        ValueError, match=rf"{role.capitalize()} and evaluation must not share text; '(\d\d\.txt)' of .*'\1'"
    ):
        _prepare(tiny_checkpoint, data, tmp_path / "out")


def test_copies_in_a_shared_corpus_are_refused_by_name(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    for number in range(60):
        shutil.copyfile(texts / f"{number:02}.txt", texts / f"copy-{number:02}.txt")
    with pytest.raises(ValueError, match=r"must not share text; '(copy-)?\d\d\.txt' of calibration holds text of"):
        _prepare(tiny_checkpoint, _data(texts), tmp_path / "out")


def test_copies_in_the_standard_library_are_dropped_and_counted(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def documents(self: Stdlib) -> Any:
        for number in range(200):
            yield Document(f"m{number}.py", _prose(number % 100, 150))  # every text twice

    monkeypatch.setattr(Stdlib, "documents", documents)
    stdlib = Stdlib()
    data = _data(tmp_path, training=stdlib, calibration=stdlib, evaluation=stdlib, num_training_tokens=10**5)
    summary = _prepare(tiny_checkpoint, data, tmp_path / "out")
    record = load_record(tmp_path / "out")["roles"]
    twin = {f"m{n}.py": f"m{(n + 100) % 200}.py" for n in range(200)}
    evaluated = set(record["evaluation"]["documents"])
    for role in ("training", "calibration"):
        assert evaluated.isdisjoint(twin[name] for name in record[role]["documents"])
        assert {twin[name] for name in record[role]["dropped_documents"]} <= evaluated
    assert summary.num_dropped_documents == sum(len(record[r]["dropped_documents"]) for r in record) > 0


# Vocabulary


def test_another_tokenizer_is_noticed(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    _prepare(tiny_checkpoint, _data(texts), tmp_path / "out")
    check_vocabulary(tmp_path / "out", tiny_checkpoint)
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match=r"vocabulary of 512 tokens; .*other has another tokenizer \(513 tokens\)"):
        check_vocabulary(tmp_path / "out", other)


def test_a_tokenizer_without_an_end_token(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    with pytest.raises(ValueError, match="must name an end-of-sequence token"):
        _prepare(other, _data(texts), tmp_path / "out")


# The corpora that need no download


@pytest.mark.parametrize("corpus", [Stdlib(), Stdlib(content="both"), HumanEval()])
def test_corpora_without_download_are_prepared(tiny_checkpoint: Path, tmp_path: Path, corpus: Any) -> None:
    data = _data(tmp_path, training=corpus, calibration=corpus, evaluation=corpus)
    summary = _prepare(tiny_checkpoint, data, tmp_path / "out")
    assert (summary.num_training_sequences, summary.num_evaluation_windows) == (100, 12)
    roles = load_record(tmp_path / "out")["roles"]
    assert set(roles["evaluation"]["documents"]).isdisjoint(roles["training"]["documents"])


def _more(checkpoint: Path, data: Data, prepared: Path, out: Path, num_windows: int) -> tokens.MoreWindows:
    out.mkdir()
    skip = data.num_evaluation_windows
    return more_windows(
        checkpoint=checkpoint, data=data, prepared=prepared, seed=0, skip=skip, num_windows=num_windows, out=out
    )


def test_more_windows_are_those_that_more_windows_asked_for_at_first_would_have_been(tiny_checkpoint, texts, tmp_path):
    few, many = _data(texts), _data(texts, num_evaluation_windows=18)
    _prepare(tiny_checkpoint, few, tmp_path / "few")
    _prepare(tiny_checkpoint, many, tmp_path / "many")
    summary = _more(tiny_checkpoint, few, tmp_path / "few", tmp_path / "more", 6)
    assert (summary.num_evaluation_windows, summary.num_dropped_windows) == (6, 0)
    for name in ("evaluation", "evaluation_documents"):
        first, rest, all_of_them = (np.load(tmp_path / d / f"{name}.npy") for d in ("few", "more", "many"))
        assert np.array_equal(np.concatenate([first, rest]), all_of_them)
    whole, more = load_record(tmp_path / "many"), load_record(tmp_path / "more")
    assert more["evaluation_bytes_per_window"] == whole["evaluation_bytes_per_window"][12:]


def test_more_windows_end_with_the_corpus(tiny_checkpoint, texts, tmp_path):
    data = _data(texts)
    _prepare(tiny_checkpoint, data, tmp_path / "data")
    all_left = _more(tiny_checkpoint, data, tmp_path / "data", tmp_path / "all", 100_000)
    assert 0 < all_left.num_evaluation_windows < 100_000
    none_left = more_windows(
        checkpoint=tiny_checkpoint,
        data=data,
        prepared=tmp_path / "data",
        seed=0,
        skip=12 + all_left.num_evaluation_windows,
        num_windows=5,
        out=_made(tmp_path / "none"),
    )
    assert none_left.num_evaluation_windows == 0
    assert load_tokens(tmp_path / "none", "evaluation").shape == (0, 64)


def test_more_windows_leave_out_what_was_trained_on(tiny_checkpoint, texts, tmp_path):
    data = _data(texts)
    _prepare(tiny_checkpoint, data, tmp_path / "data")
    first = _more(tiny_checkpoint, data, tmp_path / "data", tmp_path / "more", 6)
    numbers = np.load(tmp_path / "more" / "evaluation_documents.npy")
    many = _prepare(tiny_checkpoint, _data(texts, num_evaluation_windows=18), tmp_path / "many")
    name = load_record(tmp_path / "many")["roles"]["evaluation"]["documents"][numbers[0]]
    trained_on = load_record(tmp_path / "data")["roles"]["training"]["documents"][0]
    copied = next(path for path in texts.iterdir() if path.name in trained_on)
    copied.write_text(next(path for path in texts.iterdir() if path.name in name).read_text())
    again = _more(tiny_checkpoint, data, tmp_path / "data", tmp_path / "again", 6)
    assert again.num_dropped_windows >= 1
    assert again.num_evaluation_windows == first.num_evaluation_windows - again.num_dropped_windows
    assert many.num_evaluation_windows == 18


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory
