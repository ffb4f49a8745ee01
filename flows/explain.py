"""Turn pydantic's account of what is wrong with a recipe into sentences that answer themselves."""

import difflib
import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

Location = tuple[int | str, ...]


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per problem: where, what is required, what was given, and the nearest valid option."""
    return "\n".join(_line(dict(problem), model) for problem in error.errors())


def _line(problem: dict[str, Any], model: type[BaseModel]) -> str:
    location: Location = problem["loc"]
    where = ".".join(str(part) for part in _without_tags(location, model)) or "recipe"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        valid = _options(model, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return f"  {where}: there is no such option.{hint} Allowed: {', '.join(sorted(valid))}."
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        context = problem["ctx"]
        tag = context["discriminator"].strip("'")
        if problem["type"] == "union_tag_not_found":
            return f"  {where}: {tag!r} is missing; it chooses the kind."
        expected = [name.strip(" '") for name in context["expected_tags"].split(",")]
        nearest = difflib.get_close_matches(str(context["tag"]), expected, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return f"  {where}.{tag}: {context['tag']!r} is unknown.{hint} Allowed: {', '.join(expected)}."
    given = problem.get("input")
    shown = f"; got {given!r}" if isinstance(given, str | int | float | bool) or given is None else ""
    if problem["type"] == "missing":
        shown = ""
    if problem["type"] == "value_error":
        return f"  {where}: {message}"
    return f"  {where}: {message}{shown}."


def _step(annotation: Any, part: int | str) -> tuple[Any, bool]:
    """The annotation one step further along a location, and whether `part` was only a union's tag."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _step(get_args(annotation)[0], part)
    if origin in (Union, types.UnionType):
        members = [m for m in get_args(annotation) if m is not type(None)]
        for member in members:
            if isinstance(member, type) and issubclass(member, BaseModel) and part in _tags(member):
                return member, True
            if get_origin(member) is Annotated and Tag(str(part)) in get_args(member)[1:]:
                return get_args(member)[0], True
        for member in members:
            found, tag = _step(member, part)
            if found is not None:
                return found, tag
        return None, False
    if origin in (dict, list, tuple):
        return get_args(annotation)[1 if origin is dict else 0], False
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if part in annotation.model_fields:
            field = annotation.model_fields[str(part)]
            return field.annotation, False
        if part in _tags(annotation):
            return annotation, True
        named = get_args(annotation.__annotations__.get("__pydantic_extra__"))  # dict[str, value] of free names
        return (named[1] if named else None), False
    return None, False


def _tags(model: type[BaseModel]) -> set[Any]:
    return {
        value for field in model.model_fields.values() for value in get_args(field.annotation) if field.default == value
    }


def _options(model: type[BaseModel], location: Location) -> list[str]:
    annotation: Any = model
    for part in location:
        annotation, _ = _step(annotation, part)
    while get_origin(annotation) in (Annotated, Union, types.UnionType):
        annotation = next((a for a in get_args(annotation) if a is not type(None)), None)
    return list(annotation.model_fields) if hasattr(annotation, "model_fields") else []


def _without_tags(location: Location, model: type[BaseModel]) -> list[int | str]:
    annotation: Any = model
    shown: list[int | str] = []
    for part in location:
        annotation, is_tag = _step(annotation, part) if annotation is not None else (None, False)
        if not is_tag:
            shown.append(part)
    return shown
