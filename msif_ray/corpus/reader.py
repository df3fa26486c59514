"""Documents from Parquet, JSON lines or a saved `datasets` folder, in the corpus's own order.

Every reader streams: no file is held in memory. Blocks are cut per file, so that files can be
read side by side, and a block's documents depend on the corpus and the block size alone.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from msif_ray.config import Documents
from msif_ray.corpus.arrow import python_rows
from msif_ray.corpus.files import CorpusFile
from msif_ray.corpus.packed import NoParts, Part, part_names, row_parts
from msif_ray.errors import UserError, one_line
from msif_ray.fetch import fetched
from msif_ray.paths import is_remote, path_of, storage
from msif_ray.unicode import is_unicode

ROWS_AT_ONCE = 1024
ROWS_MADE = 64  # of those into Python values
LINE_BYTES = 2**20  # read ahead of JSON lines from object storage

Row = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A document as read: `prompt` (None without one) and `text` are whatever the corpus holds there; where
    `is_chat`, `text` is a conversation's messages, and of a packed row a `Part` of it or `NoParts`. `label` is a text's
    class, where the corpus has classes.

    Of a preference `text` was chosen over `rejected`, each a text or messages, as `prompt` is; `reference` is the
    logarithm of the ratio of their probabilities under the reference model, where that is known.
    """

    id: str
    prompt: Any
    text: Any
    has_prompt: bool = False
    is_chat: bool = False
    label: Any = None
    rejected: Any = None
    reference: float | None = None


@dataclass(frozen=True)
class Block:
    """The unit of work and of loss: consecutive documents of one file."""

    id: str
    documents: tuple[Document, ...]


def read_rows(file: CorpusFile, columns: Sequence[str], key: str) -> Iterator[Row]:
    """The named columns of every row, in order. A JSON line without a column has None there. Of Parquet and of a saved
    folder no column is no reading: as many empty rows as the file says that it has.

    Raises UserError, naming the file and the row or the `key`, for a column that the file does
    not have and for what cannot be read.
    """
    with _reading(file, key):
        if file.kind == "jsonl":
            yield from _read_json_lines(file, columns, key)
        elif file.kind == "parquet":
            yield from _read_parquet(file, columns, key)
        else:
            yield from _read_saved_dataset(file, columns, key)


def parquet_columns(file: CorpusFile, key: str) -> list[str]:
    """The names of a Parquet file's columns. Raises UserError, naming the file, for what cannot be read."""
    with _reading(file, key), _ranges(file.path) as source, pq.ParquetFile(source, memory_map=True) as table:
        return list(table.schema_arrow.names)


@contextmanager
def _reading(file: CorpusFile, key: str) -> Iterator[None]:
    with storage(f"{key}.path: {file.path}", "read"):
        try:
            yield
        # bytes of a name, of a type or of the whole; a time beyond Python's
        except (pa.ArrowException, UnicodeDecodeError, OverflowError) as error:
            raise UserError(f"{key}.path: {file.path} cannot be read: {one_line(error)}") from None


def _lines(path: str) -> BinaryIO:
    """A file to be read from its beginning to its end."""
    if not is_remote(path):
        return open(path, "rb")
    stream: Any = path_of(path).open("rb", cache_type="none")  # type: ignore[call-overload]
    return io.BufferedReader(stream, LINE_BYTES)


@contextmanager
def _ranges(path: str) -> Iterator[Any]:
    """What pyarrow reads the ranges it needs from: no more than those are fetched."""
    if not is_remote(path):
        yield path
        return
    with path_of(path).open("rb", cache_type="none") as stream:  # type: ignore[call-overload]
        yield stream


def _read_json_lines(file: CorpusFile, columns: Sequence[str], key: str) -> Iterator[Row]:
    missing = set(columns)
    rows = 0
    with _lines(file.path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                fault = f"line {number}: not JSON ({one_line(error)})"
                raise UserError(f"{key}.path: {file.path} {fault}") from None
            if not isinstance(row, dict):
                raise UserError(f"{key}.path: {file.path} line {number}: not a JSON object")
            rows += 1
            missing -= row.keys()
            yield {column: row.get(column) for column in columns}
    if rows and missing:
        raise UserError(_no_column(file, sorted(missing)[0], key, []))


def _read_parquet(file: CorpusFile, columns: Sequence[str], key: str) -> Iterator[Row]:
    with _ranges(file.path) as source, pq.ParquetFile(source, memory_map=True) as table:
        _check_columns(file, columns, table.schema_arrow.names, key)
        if not columns:
            yield from ({} for _ in range(table.metadata.num_rows))
            return
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
            for start in range(0, batch.num_rows, ROWS_MADE):  # packed rows are long
                yield from python_rows(batch.slice(start, ROWS_MADE))


def _read_saved_dataset(file: CorpusFile, columns: Sequence[str], key: str) -> Iterator[Row]:
    dataset = _load_saved(file, key)
    if dataset is None:
        return
    _check_columns(file, columns, dataset.column_names, key)
    if not columns:
        yield from ({} for _ in range(len(dataset)))
        return
    features = dataset.features  # a copy each time
    for table in dataset.with_format("arrow").select_columns(list(columns)).iter(ROWS_MADE):
        for row in python_rows(table):
            yield _decoded(features, row)


def _load_saved(file: CorpusFile, key: str) -> Any:
    """The dataset saved in a folder; None for one without rows, which `datasets` saves as no file and cannot load."""
    from datasets import Dataset, load_from_disk  # here: it takes most processes longer than their work to import

    folder = fetched(file.path) if is_remote(file.path) else Path(file.path)
    try:
        if not json.loads((folder / "state.json").read_bytes())["_data_files"]:
            return None
        dataset = load_from_disk(str(folder))
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # what it raises of files it does not know
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{key}.path: {file.path} cannot be read as a saved `datasets` folder ({reason}); save it again, or write "
            "Parquet"
        ) from None
    if not isinstance(dataset, Dataset):
        raise UserError(f"{key}.path: {file.path} holds several splits; name the folder of one")
    return dataset


def _decoded(features: Any, row: Row) -> Row:
    """A row's values as their features mean them; as they are stored where one cannot be, which are then no text."""
    try:
        return dict(features.decode_example(row))
    except ValueError:
        return row


def _check_columns(file: CorpusFile, columns: Sequence[str], present: Sequence[str], key: str) -> None:
    for column in columns:
        if column not in present:
            raise UserError(_no_column(file, column, key, present))
        if present.count(column) > 1:
            raise UserError(f"{key}: {file.path} has {present.count(column)} columns {column!r}; rename all but one")


def _no_column(file: CorpusFile, column: str, key: str, present: Sequence[str]) -> str:
    has = f"; it has {', '.join(present)}" if present else ""
    return f"{key}: {file.path} has no column {column!r}{has}"


def document_columns(documents: Documents) -> list[str]:
    """The columns of a corpus that a run reads."""
    named = [documents.id, documents.prompt, *documents.content, documents.label]
    named += [] if documents.packed is None else documents.packed.columns
    return list(dict.fromkeys(column for column in named if column is not None))


def id_columns(documents: Documents) -> list[str]:
    """The columns that documents' ids are made of: of packed rows, also those that say how many there are."""
    return document_columns(documents) if documents.packed is not None else [documents.id] if documents.id else []


def row_id(file: CorpusFile, number: int, row: Row, documents: Documents, key: str) -> str:
    """A row's document id: its `id` column as text, or `file:row` (rows count from 0), as of one whose `id` is a list
    of the ids of the documents packed in it."""
    if documents.id is None or (documents.packed is not None and isinstance(row[documents.id], list)):
        return f"{file.name}:{number}"
    return id_text(row, documents.id, f"{key}.id: {file.path} row {number}")


def id_text(row: Row, column: str, where: str) -> str:
    """What a row has in a column of ids, as text. Raises UserError, naming `where`, for none and for one that is not
    valid Unicode."""
    value = row[column]
    if value is None or value == "":
        raise UserError(f"{where} has no {column!r}")
    name = str(value)
    if not is_unicode(name):
        raise UserError(f"{where}: {column!r} is not valid Unicode")
    return name


def read_documents(file: CorpusFile, documents: Documents, key: str) -> Iterator[Document]:
    """The file's documents in order. Raises UserError as `read_rows`, and for a row without an id."""
    for number, row in enumerate(read_rows(file, document_columns(documents), key)):
        if documents.packed is None:
            yield document_of(row, documents, row_id(file, number, row, documents, key))
            continue
        found = row_parts(row, documents.packed)
        parts = [found] if isinstance(found, NoParts) else found
        for name, part in zip(row_ids(file, number, row, documents, key, found), parts, strict=True):
            yield Document(name, None, part)


def document_ids(file: CorpusFile, documents: Documents, key: str) -> Iterator[str]:
    """The ids of the file's documents in order, without their content. Raises UserError as `read_documents`."""
    for number, row in enumerate(read_rows(file, id_columns(documents), key)):
        yield from row_ids(file, number, row, documents, key)


def row_ids(
    file: CorpusFile, number: int, row: Row, documents: Documents, key: str, parts: list[Part] | NoParts | None = None
) -> list[str]:
    """The ids of a row's documents, in order: of one, unless the rows are packed.

    Raises UserError, naming file and row, where one has none.
    """
    name = row_id(file, number, row, documents, key)
    if documents.packed is None:
        return [name]
    found = row_parts(row, documents.packed) if parts is None else parts
    value = row[documents.id] if documents.id is not None else None
    try:
        names = part_names(value, name, None if isinstance(found, NoParts) else len(found))
    except ValueError as error:
        raise UserError(f"{key}.id: {file.path} row {number}: {documents.id!r} {error}") from None
    if not all(map(is_unicode, names)):
        raise UserError(f"{key}.id: {file.path} row {number}: {documents.id!r} is not valid Unicode")
    return names


def document_of(row: Row, documents: Documents, name: str) -> Document:
    """A row's document, of that name."""
    content, chat, label = documents.content, documents.messages is not None, documents.label
    prompt = row[documents.prompt] if documents.prompt is not None else None
    of_class = None if label is None else row[label]
    rejected = row[content[1]] if len(content) > 1 else None
    return Document(name, prompt, row[content[0]], documents.prompt is not None, chat, of_class, rejected)


def read_file_blocks(
    files: Sequence[CorpusFile],
    index: int,
    documents: Documents,
    size: int,
    key: str,
    limit: int | None = None,
) -> Iterator[Block]:
    """Blocks of `size` documents of the corpus's `index`-th file, up to `limit` documents."""
    rows = islice(read_documents(files[index], documents, key), limit)
    number = 0
    while block := tuple(islice(rows, size)):
        yield Block(block_id(index, number), block)
        number += 1


def block_id(file: int, number: int) -> str:
    """The name of the `number`-th block of the corpus's `file`-th file; sorting names sorts blocks."""
    return f"{file:05d}-{number:07d}"
