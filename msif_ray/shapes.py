"""What a JSON file is to look like: one that was edited, or is another file, is told before anything is made of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

# As JSON has them: a float that is whole may be written without a point.
NUMBER = (int, float)
OPTIONAL = "?"
"""At the end of a key: it may be left out."""


@dataclass(frozen=True)
class Each:
    """An object of any keys, whose values all have one shape."""

    shape: Any


def misfit(found: Any, shape: Any, key: str = "") -> str | None:
    """The first key of a value of JSON that has not the shape wanted, None where all have; "" stands for the value.

    A shape is a type, or several; `[shape]`, a list of such, or `[shape, shape]`, a list of just these; `Each(shape)`;
    or an object of shapes by key, beside which others may be there. A bool is no number.
    """
    if isinstance(shape, Each | Mapping):
        if not isinstance(found, dict):
            return key
        if isinstance(shape, Each):
            return _first(((name, value, shape.shape) for name, value in found.items()), key)
        return _of_object(found, shape, key)
    if isinstance(shape, list):
        if not isinstance(found, list):
            return key
        if len(shape) not in (1, len(found)):
            return key
        shapes = shape if len(shape) > 1 else repeat(shape[0])
        return _first(((str(place), *both) for place, both in enumerate(zip(found, shapes, strict=False))), key)
    return None if type(found) in (shape if isinstance(shape, tuple) else (shape,)) else key


def _of_object(found: Mapping[str, Any], shape: Mapping[str, Any], key: str) -> str | None:
    lacking = next((name for name in shape if not name.endswith(OPTIONAL) and name not in found), None)
    if lacking is not None:
        return _under(key, lacking)
    wanted = {name.removesuffix(OPTIONAL): of_value for name, of_value in shape.items()}
    return _first(((name, found[name], of_value) for name, of_value in wanted.items() if name in found), key)


def _first(parts: Iterable[tuple[str, Any, Any]], key: str) -> str | None:
    """The first misfit of values under `key`, each with its name and the shape wanted."""
    found = (misfit(value, shape, _under(key, name)) for name, value, shape in parts)
    return next((at for at in found if at is not None), None)


def _under(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
