import pytest
from pydantic import ValidationError

from tasks.validation.benchmarks import QuestionAnswering, Translation
from tasks.validation.benchmarks.items import Item
from tasks.validation.benchmarks.prompts import fields_of, fill


def test_fields_fill_a_template_and_braces_can_be_written():
    item = Item(7, {"source": "Guten {Tag}", "target": "English"}, 0)
    assert fields_of("{{x}} {source} in {target}, {source}") == ("source", "target")
    assert fill("{{x}} {source} in {target}", item, "a.jsonl") == "{x} Guten {Tag} in English"


def test_a_field_that_an_item_lacks_is_named_with_its_line():
    with pytest.raises(ValueError, match=r"names the field \{contxt\}; line 7 of a.jsonl has 'context', 'question'"):
        fill("{contxt}", Item(7, {"context": "", "question": ""}, 0), "a.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Translate!"}, "ask the same of every item"),
        ({"prompt": "{source.upper}"}, "plain name"),
        ({"prompt": "{source!r}"}, "plain name"),
        ({"prompt": "{source"}, "Write {{ for a brace"),
        ({"prompt": "{source}", "system": "You translate."}, "`system` is a message of a chat"),
        ({"prompt": "{source}", "stop": [""]}, "`stop` must have a character"),
        ({}, "prompt"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Translation.model_validate({"task": "translation", "data": "a.jsonl", **changes})


def test_a_prompt_is_held_against_every_item_before_anything_is_asked(write_lines):
    file = write_lines([{"question": "a", "answers": "b", "context": "c"}, {"question": "a", "answers": "b"}])
    benchmark = QuestionAnswering(task="question_answering", data=str(file))
    with pytest.raises(ValueError, match=r"names the field \{context\}; line 2 of items.jsonl has"):
        benchmark.items(file)
