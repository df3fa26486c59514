"""What pydantic finds wrong with a description, in one line: the key at fault, and what to give in its place."""

from collections.abc import Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from msif_ray.errors import one_line

# What is found where a mapping or a list is wanted.
_OTHER_KIND = ("model_type", "model_attributes_type", "list_type", "dict_type")
_MOST_EXAMPLES = 4
_NEAR = 0.65  # `query` is as near as that to `queries`

Model = type[BaseModel]


def first_fault(error: ValidationError, model: Model) -> str:
    """The fault to mend first, of a description of `model`: an unknown key, which is often why another is missing."""
    faults = error.errors()
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    location, value, context = list(fault["loc"]), fault["input"], fault.get("ctx", {})
    unknown = str(location.pop()) if fault["type"] == "extra_forbidden" else None
    key, types = _at(location, model)
    message = str(fault["msg"]).removeprefix("Value error, ")
    if unknown is not None:
        key, message = [*key, unknown], _unknown(unknown, types)
    elif fault["type"] == "missing":
        message = "is missing"
    elif fault["type"] == "union_tag_not_found":
        key, message = [*key, "kind"], f"is missing; give one of {', '.join(_kinds(types))}"
    elif fault["type"] == "union_tag_invalid":
        key, message = [*key, "kind"], f"give one of {', '.join(_kinds(types))}, not {_shown(context['tag'])}"
    elif fault["type"] == "too_short" and not value:
        message = "is empty; give one at least"
    elif fault["type"].startswith("byte_size"):
        message = f"give bytes, or a size as 8GiB, not {_shown(value)}"
    elif fault["type"] in _OTHER_KIND:
        wanted = f"give {_wanted(types, value)}"
        message = f"is empty; {wanted}" if value is None else f"{wanted}, not {_shown(value)}"
    elif fault["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {_shown(value)}"
    return ": ".join(filter(None, (".".join(key), message)))


def _at(location: Sequence[str | int], model: Model) -> tuple[list[str], list[Any]]:
    """The key at a location, and the types of what may be there. Of a union, pydantic's locations name the member, by
    its `kind` or its type: that is no part of a key."""
    key: list[str] = []
    types: list[Any] = [model]
    for part in location:
        below = _below(types, part)
        if below:
            key.append(str(part))
            types = below
        else:
            types = [each for each in _models(types) if part in _kinds([each])] or types
    return key, types


def _below(types: Sequence[Any], part: str | int) -> list[Any]:
    """The types of what may be under a key, or in a list, of one of the types."""
    for each in _models(types):
        if part in each.model_fields:
            return _members(each.model_fields[str(part)].annotation)
    for each in types:
        if get_origin(each) is (list if isinstance(part, int) else dict):
            return _members(get_args(each)[-1])
    return []


def _members(annotation: Any) -> list[Any]:
    """The types that an annotation is a union of, without None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [] if annotation is type(None) else [annotation]


def _models(types: Sequence[Any]) -> list[Model]:
    return [each for each in types if isinstance(each, type) and issubclass(each, BaseModel)]


def _kinds(types: Sequence[Any]) -> list[str]:
    """What tells the models apart."""
    fields = [each.model_fields["kind"] for each in _models(types) if "kind" in each.model_fields]
    return [str(kind) for field in fields for kind in get_args(field.annotation)]


def _unknown(key: str, types: Sequence[Any]) -> str:
    near = get_close_matches(key, [name for each in _models(types) for name in each.model_fields], 1, _NEAR)
    return f"unknown key; is `{near[0]}` meant?" if near else "unknown key"


def _wanted(types: Sequence[Any], value: Any) -> str:
    """What to give in place of a value: the value under the keys, or in the list, where it fits."""
    models = _models(types)
    examples = [example for each in models for example in _examples(each, value)]
    if 0 < len(examples) <= _MOST_EXAMPLES:
        return " or ".join(examples)
    if len(models) > 1:
        *first, last = _kinds(models)
        return f"a mapping with a kind: {', '.join(first)} or {last}"
    if models:
        return f"a mapping of {', '.join(models[0].model_fields)}"
    of_list = next((_members(get_args(each)[0]) for each in types if get_origin(each) is list), None)
    if of_list is None:
        return "a mapping"
    items = [f"[{item}]" for each in _models(of_list) for item in _examples(each, value)]
    items = items if _models(of_list) or isinstance(value, dict) or value is None else [_yaml([value])]
    return items[0] if items else "a list, if only of one"


def _examples(model: Model, value: Any) -> list[str]:
    """A value that is no mapping under the first key that the model must have, or under each of those that it may."""
    if value is None or isinstance(value, dict):
        return []
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    fitting = [name for name in required[:1] or model.model_fields if _fits(model, name, value)]
    more = ", …}" if required and len(model.model_fields) > 1 else "}"
    return [_yaml({name: value}).removesuffix("}") + more for name in fitting]


def _fits(model: Model, name: str, value: Any) -> bool:
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        return all(fault["loc"][:1] != (name,) for fault in error.errors())
    return True


def _yaml(value: Any) -> str:
    return one_line(yaml.dump(value, default_flow_style=True, allow_unicode=True, width=1000), 80)


def _shown(value: Any) -> str:
    return one_line(repr(value), 60)
