"""Token ids of fixed length for training, calibration and evaluation, from text that no two roles share."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from tasks.calibration.checkpoints import load_tokenizer, tokenizer_digest
from tasks.calibration.corpora import Data, Document, Role, Stdlib, describe, documents
from tasks.calibration.progress import Report, silent

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SHINGLE_WORDS = 50
MAX_SHARED = 0.1
"""Part of an evaluation window's runs of 50 words that another role's document may hold: a licence, a table header.
More is the same text."""

PASSAGE_TOKENS = 256
"""A shorter evaluation window is compared with its surroundings of so many tokens, or it would hold no 50 words."""

_BATCH = 64

Ids = npt.NDArray[np.int32]


class DataSummary(BaseModel, frozen=True, extra="forbid"):
    """What was prepared."""

    num_training_sequences: int
    num_training_tokens: int
    num_calibration_sequences: int
    num_evaluation_windows: int
    num_evaluation_tokens: int
    num_evaluation_documents: int
    """Clusters of a bootstrap: windows of one document are not independent."""
    num_windows_across_documents: int
    """Windows that hold more than one document, because too few are as long as a window."""
    evaluation_bytes: int
    """UTF-8 bytes of the tokens that windows predict: all but the first of each."""
    num_dropped_documents: int
    """Left out of training and calibration because an evaluation window holds the same text."""
    training_sha256: str
    calibration_sha256: str
    evaluation_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    notes: tuple[str, ...] = ()


class Window(NamedTuple):
    """One stretch of evaluation text."""

    ids: list[int]
    document: int
    """Index into the evaluation documents used; of the first token where a window holds several."""
    across: bool
    passage: list[int]
    """The window, with its surroundings if it is short: what no other role may hold."""


def prepare_data(*, checkpoint: Path, data: Data, seed: int, out: Path, report: Report = silent) -> DataSummary:
    """Write the tokens of every role to `out`, for the tokenizer of `checkpoint`.

    Files: training.npy and calibration.npy [num_sequences, sequence_length] int32, documents in a seeded order and
    separated by the end-of-sequence token; evaluation.npy [num_windows, evaluation_window] int32, whole windows at
    seeded places of as many documents as there are, without separators; evaluation_documents.npy [num_windows] int32,
    the document of each window, for a clustered bootstrap; data.json, what was used, with digests.

    Raises:
        ValueError: a corpus is empty, too short, or holds what is evaluated on; a file or field is missing.
    """
    tokenizer = load_tokenizer(checkpoint)
    eos = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id  # BERT's has the former
    if eos is None:
        raise ValueError(f"The tokenizer of {checkpoint} must name an end-of-sequence token, to separate documents.")
    report(0, 4, {})
    shares = documents(data)
    report(1, 4, {})

    evaluation = _shuffled(shares["evaluation"], seed, "evaluation")
    wanted_windows = data.num_evaluation_windows
    windows, used = _windows(tokenizer, evaluation, data, seed, eos, wanted_windows)
    if len(windows) < wanted_windows:
        raise ValueError(
            f"Evaluation needs {wanted_windows} windows of {data.evaluation_window} tokens; its share of "
            f"{describe(data.evaluation)} ({len(evaluation)} documents) gives {len(windows)}. Give more text, or "
            "shorter or fewer windows."
        )
    report(2, 4, {})
    guard = OverlapGuard([tokenizer.decode(w.passage, skip_special_tokens=True) for w in windows], windows, used)
    notes: list[str] = []
    dropped: dict[str, list[str]] = {}
    arrays: dict[str, Ids] = {"evaluation": np.array([w.ids for w in windows], np.int32)}
    names: dict[str, list[str]] = {"evaluation": [document.name for document in used]}
    for step, (role, wanted) in enumerate(
        [
            ("calibration", data.num_calibration_sequences),
            ("training", data.num_training_tokens // data.sequence_length),
        ]
    ):
        typed: Role = "training" if role == "training" else "calibration"
        # A stdlib that is shared repeats itself from file to file; any other repetition is the user's to know about.
        may_drop = isinstance(data.corpus(typed), Stdlib) and isinstance(data.evaluation, Stdlib)
        dropped[role] = []
        kept = guard.keep(_shuffled(shares[typed], seed, role), typed, dropped[role] if may_drop else None)
        # Calibration sees parts of many documents rather than all of a few.
        pool = wanted * (8 if role == "calibration" else 1)
        arrays[role], names[role] = _packed(tokenizer, kept, data.sequence_length, pool, eos)
        found = len(arrays[role])
        if found < min(wanted, 1) or (role == "calibration" and found < wanted):
            raise ValueError(
                f"{role.capitalize()} needs {wanted} sequences of {data.sequence_length} tokens; its share of "
                f"{describe(data.corpus(typed))} gives {found}. Give more text, or shorter or fewer sequences."
            )
        if role == "calibration":
            rows = sorted(random.Random(f"{seed} rows").sample(range(found), wanted))
            arrays[role] = arrays[role][rows]
        elif found < wanted:
            notes.append(
                f"Training asked for {data.num_training_tokens} tokens; its share of "
                f"{describe(data.training)} gives {found * data.sequence_length}."
            )
        report(3 + step, 4, {})

    across = sum(window.across for window in windows)
    if across:
        notes.append(f"{across} of {len(windows)} evaluation windows hold more than one document.")
    num_bytes = [_num_bytes(tokenizer, window.ids[1:]) for window in windows]
    for role, array in arrays.items():
        np.save(out / f"{role}.npy", array)
    np.save(out / "evaluation_documents.npy", np.array([w.document for w in windows], np.int32))
    digests = {role: _digest(array) for role, array in arrays.items()}
    record = {
        "seed": seed,
        "tokenizer_sha256": tokenizer_digest(checkpoint),
        "vocab_size": len(tokenizer),
        "separator_id": eos,
        "roles": {
            role: {
                "corpus": _portable(data, role),
                "num_sequences": len(array),
                "sequence_length": array.shape[1],
                "sha256": digests[role],
                "documents": names[role],
                "dropped_documents": dropped.get(role, []),
            }
            for role, array in sorted(arrays.items())
        },
        "evaluation_bytes_per_window": num_bytes,
        "num_windows_across_documents": across,
        "notes": notes,
    }
    (out / "data.json").write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return DataSummary(
        num_training_sequences=len(arrays["training"]),
        num_training_tokens=arrays["training"].size,
        num_calibration_sequences=len(arrays["calibration"]),
        num_evaluation_windows=len(windows),
        num_evaluation_tokens=arrays["evaluation"].size,
        num_evaluation_documents=len({w.document for w in windows}),
        num_windows_across_documents=across,
        evaluation_bytes=sum(num_bytes),
        num_dropped_documents=sum(map(len, dropped.values())),
        training_sha256=digests["training"],
        calibration_sha256=digests["calibration"],
        evaluation_sha256=digests["evaluation"],
        tokenizer_sha256=record["tokenizer_sha256"],
        vocab_size=len(tokenizer),
        notes=tuple(notes),
    )


class MoreWindows(BaseModel, frozen=True, extra="forbid"):
    """Further evaluation windows; none where the corpus has no more."""

    num_evaluation_windows: int
    num_dropped_windows: int
    """Left out because training or calibration saw their text."""
    evaluation_sha256: str


def more_windows(
    *, checkpoint: Path, data: Data, prepared: Path, seed: int, skip: int, num_windows: int, out: Path
) -> MoreWindows:
    """Write the evaluation windows that follow the first `skip`, of the documents that `prepare_data` chose from.

    Files: evaluation.npy, evaluation_documents.npy, whose documents are numbered on from those of `prepare_data`, and
    data.json, as `prepare_data` writes them. Windows whose text is in what candidates were trained or calibrated on are
    left out.

    Args:
        checkpoint: whose tokenizer made `prepared`.
        data: as it was for `prepared`.
        prepared: what `prepare_data` wrote.
        seed: as it was for `prepared`.
        skip: windows that were used.
        num_windows: how many more, at most.
        out: an empty directory.
    """
    tokenizer = load_tokenizer(checkpoint)
    record = load_record(prepared)
    shares = documents(data)
    evaluation = _shuffled(shares["evaluation"], seed, "evaluation")
    windows, used = _windows(tokenizer, evaluation, data, seed, record["separator_id"], skip + num_windows)
    windows = windows[skip:]
    kept = windows
    if windows:
        texts = [tokenizer.decode(window.passage, skip_special_tokens=True) for window in windows]
        guard = OverlapGuard(texts, windows, used)
        seen: set[int] = set()
        for role in ("training", "calibration"):
            names = set(record["roles"][role]["documents"])
            for document in shares[role]:
                seen |= guard.windows_in(document) if document.name in names else set()
        kept = [window for index, window in enumerate(windows) if index not in seen]
    tokens = np.array([w.ids for w in kept], np.int32).reshape(len(kept), data.evaluation_window)
    np.save(out / "evaluation.npy", tokens)
    np.save(out / "evaluation_documents.npy", np.array([w.document for w in kept], np.int32))
    more = {
        "tokenizer_sha256": record["tokenizer_sha256"],
        "vocab_size": record["vocab_size"],
        "roles": {
            "evaluation": {**record["roles"]["evaluation"], "sha256": _digest(tokens), "num_sequences": len(kept)}
        },
        "evaluation_bytes_per_window": [_num_bytes(tokenizer, window.ids[1:]) for window in kept],
    }
    (out / "data.json").write_text(json.dumps(more, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return MoreWindows(
        num_evaluation_windows=len(kept),
        num_dropped_windows=len(windows) - len(kept),
        evaluation_sha256=_digest(tokens),
    )


def load_tokens(data: Path, role: Literal["training", "calibration", "evaluation"]) -> Ids:
    """[num_sequences, length] int32 token ids of a role, from a directory that `prepare_data` wrote."""
    tokens: Ids = np.load(data / f"{role}.npy", allow_pickle=False)
    return tokens


def calibration_batches(data: Path, vocab_size: int, batch_size: int) -> "tuple[Tensor, ...]":
    """The calibration tokens of `data`, in batches [batch_size, length] int64 (the last may be smaller).

    Raises:
        ValueError: there are none, or they are no tokens of a vocabulary of `vocab_size`.
    """
    import torch

    tokens = load_tokens(data, "calibration")
    if not len(tokens):
        raise ValueError("Calibration needs at least one sequence; got none. Raise data.num_calibration_sequences.")
    if int(tokens.max()) >= vocab_size:
        raise ValueError(
            f"Calibration tokens must be below the model's {vocab_size} tokens; got {int(tokens.max())}. "
            "Prepare the data with this model's tokenizer."
        )
    return torch.split(torch.from_numpy(tokens).long(), batch_size)


def load_record(data: Path) -> dict[str, Any]:
    """The contents of data.json: corpora, documents, digests, bytes per evaluation window."""
    record: dict[str, Any] = json.loads((data / "data.json").read_text())
    return record


def check_vocabulary(data: Path, checkpoint: Path) -> None:
    """Raise ValueError unless the tokens of `data` mean to `checkpoint` what they meant when they were made."""
    record = load_record(data)
    if tokenizer_digest(checkpoint) == record["tokenizer_sha256"]:
        return
    raise ValueError(
        f"The tokens were made with a vocabulary of {record['vocab_size']} tokens; {checkpoint} has another tokenizer "
        f"({len(load_tokenizer(checkpoint))} tokens). Teacher, student and data must share one tokenizer."
    )


class OverlapGuard:
    """Recognizes text of the evaluation windows in the documents of other roles.

    A document overlaps when it is, white space and case aside, one of the documents evaluated on, or when it holds
    more than a tenth of the runs of 50 words, at every word, of an evaluation window and its surroundings.
    """

    def __init__(self, texts: list[str], windows: list[Window], used: list[Document]) -> None:
        """Index the windows' `texts`."""
        self._names = [used[window.document].name for window in windows]
        self._whole = {_normalized(document.text): document.name for document in used}
        shingles = [np.unique(_shingles(text)) for text in texts]
        self._sizes = np.array([max(1, len(s)) for s in shingles])
        keys = np.concatenate(shingles)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._windows = np.repeat(np.arange(len(shingles)), [len(s) for s in shingles])[order]

    def evaluated(self, document: Document) -> str | None:
        """The name of an evaluation document whose text `document` holds, or None."""
        if name := self._whole.get(_normalized(document.text)):
            return name
        shared = self._shared(document)
        return self._names[shared[0]] if shared else None

    def windows_in(self, document: Document) -> set[int]:
        """The windows, by index, whose text `document` holds."""
        if name := self._whole.get(_normalized(document.text)):
            return {window for window, its in enumerate(self._names) if its == name}
        return set(self._shared(document))

    def _shared(self, document: Document) -> list[int]:
        """Windows of which `document` holds too much, in order."""
        shingles = np.unique(_shingles(document.text))
        first = np.searchsorted(self._keys, shingles, "left")
        last = np.searchsorted(self._keys, shingles, "right")
        hits = Counter(int(w) for a, b in zip(first, last, strict=True) if b > a for w in self._windows[a:b])
        return [window for window, count in sorted(hits.items()) if count > MAX_SHARED * self._sizes[window]]

    def keep(self, candidates: Iterable[Document], role: Role, dropped: list[str] | None) -> Iterator[Document]:
        """The candidates without evaluated text; the names of the others go to `dropped`.

        Raises:
            ValueError: one overlaps and `dropped` is None.
        """
        for document in candidates:
            twin = self.evaluated(document)
            if twin is None:
                yield document
            elif dropped is not None:
                dropped.append(document.name)
            else:
                raise ValueError(
                    f"{role.capitalize()} and evaluation must not share text; {document.name!r} of {role} holds text "
                    f"of {twin!r}, which is evaluated on. Remove one of them, or name another corpus."
                )


def _windows(
    tokenizer: "PreTrainedTokenizerBase", candidates: list[Document], data: Data, seed: int, eos: int, wanted: int
) -> tuple[list[Window], list[Document]]:
    """Up to `wanted` evaluation windows and the documents they come from.

    First one window of every document that is long enough, then a second, and so on; at a seeded place each. Only when
    whole windows run out are short documents joined. Of more windows wanted, the first are the same.
    """
    length = data.evaluation_window
    margin = max(0, (PASSAGE_TOKENS - length) // 2)
    places: list[tuple[Document, list[Window]]] = []
    short: list[tuple[Document, list[int]]] = []
    for document, ids in _tokenized(tokenizer, candidates):
        starts = list(range(0, len(ids) - length + 1, length))
        if not starts:
            short.append((document, ids))
            continue
        random.Random(f"{seed} {document.name}").shuffle(starts)
        stretches = [(ids[at : at + length], ids[max(0, at - margin) : at + length + margin]) for at in starts]
        places.append((document, [Window(window, 0, False, passage) for window, passage in stretches]))
        if len(places) == wanted:
            break
    chosen: list[tuple[Document, Window]] = []
    depth = 0
    while len(chosen) < wanted and (layer := [(d, w[depth]) for d, w in places if depth < len(w)]):
        chosen += layer[: wanted - len(chosen)]
        depth += 1
    stream: list[int] = []
    origin: list[Document] = []
    for document, ids in short if len(chosen) < wanted else []:
        stream += [*ids, eos]
        origin += [document] * (len(ids) + 1)
    for start in range(0, len(stream) - length + 1, length):
        if len(chosen) < wanted:
            ids = stream[start : start + length]
            chosen.append((origin[start], Window(ids, 0, True, ids)))
    used = list(dict.fromkeys(document for document, _ in chosen))
    if stream:  # every document that was joined counts as evaluated on
        used += [document for document in dict.fromkeys(origin) if document not in set(used)]
    index = {document.name: number for number, document in enumerate(used)}
    return [window._replace(document=index[document.name]) for document, window in chosen], used


def _packed(
    tokenizer: "PreTrainedTokenizerBase", candidates: Iterable[Document], length: int, wanted: int, eos: int
) -> tuple[Ids, list[str]]:
    """[at most `wanted`, length] ids of documents put end to end, and the documents that are in them."""
    stream: list[int] = []
    names: list[str] = []
    for document, ids in _tokenized(tokenizer, candidates) if wanted else ():
        names.append(document.name)
        stream += [*ids, eos]
        if len(stream) >= wanted * length:
            break
    rows = min(wanted, len(stream) // length)
    return np.array(stream[: rows * length], np.int32).reshape(rows, length), names


def _tokenized(
    tokenizer: "PreTrainedTokenizerBase", candidates: Iterable[Document]
) -> Iterator[tuple[Document, list[int]]]:
    """Ids of each document, without special tokens; in batches, which tokenizers encode in parallel."""
    source = iter(candidates)
    while batch := [document for _, document in zip(range(_BATCH), source, strict=False)]:
        encoded = tokenizer([d.text for d in batch], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip(batch, encoded, strict=True)


def _shuffled(candidates: list[Document], seed: int, role: str) -> list[Document]:
    ordered = sorted(candidates, key=lambda document: document.name)
    random.Random(f"{seed} {role}").shuffle(ordered)
    return ordered


def _num_bytes(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> int:
    """UTF-8 bytes of text that `ids` stand for; a character cut at either end counts as up to 3."""
    return len(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())


def _normalized(text: str) -> str:
    return " ".join(text.lower().split())


def _shingles(text: str) -> npt.NDArray[np.uint64]:
    """[num_words - 49] uint64 hashes of the passages of 50 words of `text`; equal words, equal hash."""
    words = text.lower().split()
    if len(words) < SHINGLE_WORDS:
        return np.empty(0, np.uint64)
    codes = {w: int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest(), "big") for w in set(words)}
    values = np.array([codes[word] for word in words], np.uint64)
    passages = len(words) - SHINGLE_WORDS + 1
    hashes = np.zeros(passages, np.uint64)
    for place in range(SHINGLE_WORDS):  # a polynomial in an odd number, modulo 2^64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + values[place : place + passages]
    return hashes


def _digest(array: Ids) -> str:
    header = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()


def _portable(data: Data, role: str) -> dict[str, Any]:
    """A role's corpus without directories, which differ from machine to machine."""
    corpus = data.corpus(role)  # type: ignore[arg-type]
    options = corpus.model_dump(mode="json", exclude={"paths"})
    return {**options, "description": describe(corpus)}
