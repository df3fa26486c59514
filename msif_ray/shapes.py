"""What a JSON file is to look like: one that was edited, or is another file, is told before anything is made of it."""

from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

Element = TypeVar("Element")
Pair = Annotated[list[Element], Field(min_length=2, max_length=2)]
"""A list of two, which JSON has for a tuple."""


def misfit(found: Any, shape: Any) -> str | None:
    """The first key of a value of JSON that is not of a type, None where all are; "" stands for the value.

    `shape` is a type, or a class of pydantic's: a field with a default may be left out, and other keys may be there. A
    bool is no number, and a number no text.
    """
    try:
        _adapter(shape).validate_python(found, strict=True)
    except ValidationError as error:
        return ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
    return None


@lru_cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
