"""A corpus seen once before a run: its files, their rows and what is in them, and ids that differ."""

from array import array
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from time import monotonic

import numpy

from msif_ray.config import Documents
from msif_ray.corpus.files import CorpusFile, corpus_files
from msif_ray.corpus.reader import (
    document_columns,
    id_columns,
    read_documents,
    read_rows,
    row_id,
    row_ids,
)
from msif_ray.corpus.states import content_of, state_of
from msif_ray.errors import UserError

# Repeated hashes whose ids are looked at; a corpus with so many has a repeated id among them.
LOOKED_AT = 100_000
SECONDS_BETWEEN_LINES = 60.0

Say = Callable[[str], None]
"""Tells the user one line."""


def _nobody(_: str) -> None: ...


@dataclass(frozen=True)
class Census:
    """A corpus's files, and for each of them its documents' number and its content's `fingerprint`."""

    files: list[CorpusFile]
    rows: tuple[int, ...]
    contents: tuple[str, ...]


def take_census(documents: Documents, key: str, say: Say = _nobody) -> Census:
    """Reads a corpus through, once: the id column, where there is one, or of JSON lines all there is to read.

    Raises UserError, naming `key`, file and row, for a column that is not there, an id that is missing or repeated,
    what cannot be read, and a corpus without a document. `say` is told how far it is, once a minute.
    """
    files: list[CorpusFile] = []
    listed = corpus_files(documents, key)
    ids, told = _Ids(), monotonic()
    rows: list[int] = []
    contents: list[str] = []
    for number, file in enumerate(listed):
        if monotonic() - told > SECONDS_BETWEEN_LINES:
            told = monotonic()
            say(f"{key}: {number:,} of {len(listed):,} files are checked, {sum(rows):,} documents")
        files.append(replace(file, state=state_of(file)))
        contents.append(content_of(files[-1]))
        rows.append(_count(file, documents, key, ids))
    if sum(rows) == 0:
        raise UserError(f"{key}.path: {documents.path}: there is no document in it")
    repeated = ids.repeated(LOOKED_AT)
    if repeated:
        _refuse_repeat(files, documents, key, repeated)
    return Census(files, tuple(rows), tuple(contents))


class _Ids:
    """Ids of any number of documents, at 8 bytes each: enough to know those that may be there twice.

    Python's hash of a text has 64 bits and a key that differs between processes: of a hundred million ids two
    have the same one in three runs of ten thousand, and no corpus can be made to have many.
    """

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, document: str) -> None:
        self._hashes.append(hash(document))

    def repeated(self, at_most: int) -> frozenset[int]:
        """Hashes that are there twice, or some of them. Nothing can be added after that."""
        hashes = numpy.frombuffer(self._hashes, dtype=numpy.int64)
        hashes.sort()  # in place: a copy would double the memory
        return frozenset(hashes[1:][hashes[1:] == hashes[:-1]][:at_most].tolist())


def _count(file: CorpusFile, documents: Documents, key: str, ids: _Ids) -> int:
    """The documents of a file that has all the columns; their ids are added."""
    if documents.packed is not None:
        return _count_parts(file, documents, key, ids)
    columns = [] if documents.id is None else [documents.id]
    if file.kind == "jsonl":
        columns = document_columns(documents)  # each line is parsed whole in any case
    else:
        next(read_documents(file, documents.model_copy(update={"id": None}), key), None)
    count = 0
    for row in read_rows(file, columns, key):
        if documents.id is not None:
            ids.add(row_id(file, count, row, documents, key))
        count += 1
    return count


def _count_parts(file: CorpusFile, documents: Documents, key: str, ids: _Ids) -> int:
    """As `_count`, of packed rows, each of which is read whole."""
    count = 0
    for document in read_documents(file, documents, key):
        if documents.id is not None:
            ids.add(document.id)
        count += 1
    return count


def _refuse_repeat(files: Sequence[CorpusFile], documents: Documents, key: str, hashes: AbstractSet[int]) -> None:
    """A second look, at the ids of these hashes alone: UserError for the first that is there twice."""
    seen: dict[str, tuple[CorpusFile, int]] = {}
    for file in files:
        rows = enumerate(read_rows(file, id_columns(documents), key))
        for number, document in ((at, name) for at, row in rows for name in row_ids(file, at, row, documents, key)):
            if hash(document) not in hashes:
                continue
            if document in seen:
                first, at = seen[document]
                raise UserError(
                    f"{key}.id: {file.path} row {number} has the id {document!r} "
                    f"of {first.path} row {at}; ids must differ"
                )
            seen[document] = (file, number)
