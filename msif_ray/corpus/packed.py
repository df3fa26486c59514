"""Documents in packed rows of token ids: which tokens of the row are each one's, and what each is called."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from msif_ray.config import Packed


@dataclass(frozen=True)
class Part:
    """A document in a packed row: the tokens from `start` to before `stop` of the row's `ids`. The model reads it
    `alone`, or after all that comes before it in the row."""

    ids: tuple[int, ...]
    start: int
    stop: int
    alone: bool

    @property
    def own(self) -> tuple[int, ...]:
        return self.ids[self.start : self.stop]

    @property
    def sequence(self) -> tuple[tuple[int, ...], list[bool]]:
        """The tokens that the model is given, and which of them are the document's own.

        After others, a document's first token is predicted by the last one of the document before: every token of the
        row but its first is some document's target once, and the documents' losses add up to the row's.
        """
        if self.alone:
            return self.own, [True] * len(self.own)
        return self.ids[: self.stop], [False] * self.start + [True] * len(self.own)


@dataclass(frozen=True)
class NoParts:
    """A row that cannot be told apart into documents, and why."""

    reason: str


def row_parts(row: Mapping[str, Any], packed: Packed) -> list[Part] | NoParts:
    """The documents of a row, in order."""
    try:
        ids = _numbers(row[packed.ids], packed.ids)
        if not len(ids):
            return NoParts(f"{packed.ids} is empty")
        if packed.mask is not None:
            row = _without_padding(row, packed, len(ids))
            ids = ids[: len(row[packed.ids])]
        alone = packed.attention == "document"
        values = tuple(ids.tolist())
        return [Part(values, start, stop, alone) for start, stop in _spans(ids, row, packed)]
    except ValueError as error:
        return NoParts(str(error))


def part_names(value: Any, row: str, count: int | None) -> list[str]:
    """The ids of a row's `count` documents (None: of one that cannot be told apart), from the value of the id column,
    `row` being what the row is called: a list names each, and of anything else each is a numbered part.

    Raises ValueError for a list that does not name each.
    """
    if count is None:
        return [row]
    if not isinstance(value, list):
        return [f"{row}:{number}" for number in range(count)]
    if len(value) != count:
        raise ValueError(f"has {len(value)} ids for {count} documents")
    if any(each is None or each == "" for each in value):
        raise ValueError("has an empty id")
    return [str(each) for each in value]


def _without_padding(row: Mapping[str, Any], packed: Packed, tokens: int) -> dict[str, Any]:
    """The row without the padding that it ends with, by its mask."""
    mask = row[str(packed.mask)]
    if not isinstance(mask, list):
        raise ValueError(f"{packed.mask} is {'null' if mask is None else f'not a list but {type(mask).__name__}'}")
    real = _numbers([int(each) if isinstance(each, bool) else each for each in mask], str(packed.mask)) != 0
    kept = int(_each_token(real, tokens, str(packed.mask)).sum())
    if not kept:
        raise ValueError(f"{packed.ids} are padding alone by {packed.mask}")
    if not real[:kept].all():
        raise ValueError(f"{packed.mask} has padding before other tokens; only padding at a row's end can be cut off")
    by_token = [column for column in (packed.ids, packed.positions, packed.documents) if column is not None]
    lists = {column: row[column] for column in by_token if isinstance(row[column], list)}
    return {**row, **{column: _each_token(values, tokens, column)[:kept] for column, values in lists.items()}}


def _spans(ids: numpy.ndarray, row: Mapping[str, Any], packed: Packed) -> list[tuple[int, int]]:
    if packed.lengths is not None:
        lengths = _numbers(row[packed.lengths], packed.lengths)
        if (lengths < 1).any() or (lengths > len(ids)).any() or lengths.sum() != len(ids):  # a sum may wrap around
            raise ValueError(f"{packed.lengths} are not the lengths of documents that {packed.ids} consists of")
        stops = lengths.cumsum().tolist()
        return list(zip([0, *stops[:-1]], stops, strict=True))
    if packed.eos is not None:
        return _ended(ids == packed.eos)
    if packed.positions is not None:
        positions = _each_token(_numbers(row[packed.positions], packed.positions), len(ids), packed.positions)
        begins = positions[1:] != positions[:-1] + 1
    else:
        names = row[str(packed.documents)]
        if not isinstance(names, list):
            raise ValueError(f"{packed.documents} is not a list")
        names = _each_token(names, len(ids), str(packed.documents))
        begins = numpy.array([one != other for one, other in zip(names[1:], names[:-1], strict=True)], dtype=bool)
    starts = [0, *(numpy.flatnonzero(begins) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(ids)], strict=True))


def _ended(ends: numpy.ndarray) -> list[tuple[int, int]]:
    """Documents that end with a token marked in `ends`, or with the row; such tokens alone are none."""
    stops = (numpy.flatnonzero(ends) + 1).tolist()
    stops += [] if stops and stops[-1] == len(ends) else [len(ends)]
    spans = zip([0, *stops[:-1]], stops, strict=True)
    found = [(start, stop) for start, stop in spans if not ends[start]]
    if not found:
        raise ValueError("there is no document between its EOS tokens")
    return found


def _numbers(value: Any, column: str) -> numpy.ndarray:
    if not isinstance(value, list):
        raise ValueError(f"{column} is {'null' if value is None else f'not a list but {type(value).__name__}'}")
    try:
        found = numpy.asarray(value)
    except ValueError:  # lists of several lengths
        found = numpy.zeros(0)
    whole = found.ndim == 1 and found.dtype.kind in "iu"
    if value and (not whole or (found.astype(numpy.int64) < 0).any()):  # so are those that are too large for it
        raise ValueError(f"{column} are not whole numbers from zero on")
    return found.astype(numpy.int64)


def _each_token(values: Any, tokens: int, column: str) -> Any:
    if len(values) != tokens:
        raise ValueError(f"{column} has {len(values)} values for {tokens} tokens")
    return values
