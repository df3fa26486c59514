"""Where a record of a run and the run as it is now differ, in words."""

from itertools import takewhile
from typing import Any


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """Which value of the one is another in the other, by its keys, and what it was and is; None where none is."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            where = f"{key}.{name}" if key else name
            difference = first_difference(old.get(name), new.get(name), where)
            if difference is not None:
                return difference
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next((d for i, (o, n) in pairs if (d := first_difference(o, n, f"{key}.{i}"))), None)
    if old == new:
        return None
    where, was, now = key.removeprefix("run."), _short(old), _short(new)
    if was == now and isinstance(old, list):
        return f"{where} had {len(old)} entries and has {len(new)}"
    if was == now:  # long paths that begin alike: what tells them apart, and a little before it
        whole = repr(old), repr(new)
        same = takewhile(lambda both: both[0] == both[1], zip(*whole, strict=False))
        first = sum(1 for _ in same) - 20
        was, now = (f"...{_cut(text[first:])}" for text in whole)
    return f"{where} was {was} and is {now}"


def _short(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
