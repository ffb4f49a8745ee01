"""Prompts from items: a template whose {names} are fields of the line, plain or as a chat."""

import string
from typing import Any

from tasks.engines.text import encode_chat
from tasks.validation.benchmarks.items import Item


def fields_of(template: str) -> tuple[str, ...]:
    """The fields that a template names; "{{" and "}}" are braces.

    Raises:
        ValueError: a brace that is not closed, or more than a plain name between braces.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"a prompt is a template with fields in braces; {error}. Write {{{{ for a brace") from None
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(
                f"a field in a prompt is a plain name as {{question}}; got {{{name}}}. Write {{{{ for a brace"
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def fill(template: str, item: Item, file_name: str) -> str:
    """The template with the item's fields in it.

    Raises:
        ValueError: it names a field that the item does not have.
    """
    for name in fields_of(template):
        if name not in item.fields:
            raise ValueError(
                f"The prompt names the field {{{name}}}; line {item.line} of {file_name} has "
                f"{', '.join(map(repr, item.fields)) or 'none'}. Name one of them."
            )
    return template.format_map(item.fields)


def encode(tokenizer: Any, text: str, *, chat: bool, system: str | None) -> list[int]:
    """The tokens of a prompt, or of a chat up to where the answer begins.

    Raises:
        ValueError: the model has no chat template.
    """
    if not chat:
        return list(tokenizer.encode(text))
    messages = [{"role": "system", "content": system}] if system else []
    return encode_chat(tokenizer, [*messages, {"role": "user", "content": text}])
