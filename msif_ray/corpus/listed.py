"""Candidates given as a list: the pairs of a Parquet file, each of a query and a document that are there."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import pyarrow as pa

from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.candidates import SCHEMA
from msif_ray.corpus.files import CorpusFile
from msif_ray.corpus.reader import Document, id_text, parquet_columns, read_rows
from msif_ray.errors import UserError


def by_list(blocks: CorpusBlocks, queries: Sequence[Document], path: str, key: str) -> pa.Table:
    """The pairs that a Parquet file names in `doc_id` and, unless all queries are meant, `query_id`, as a table of
    `candidates.SCHEMA`.

    Raises UserError, naming `key`, for a file that cannot be read or has not those columns, for a row without an id
    and for an id that is not there.
    """
    ids = [query.id for query in queries]
    pairs = _pairs(path, key, ids)
    if not pairs:
        raise UserError(f"{key}.path: {path}: names no document")
    known, of_document = set(ids), _blocks_of(blocks, {document for _, document in pairs})
    ranks: dict[str, int] = {}
    rows = []
    for query, document in pairs:
        if query not in known:
            raise UserError(f"{key}.path: {path}: there is no query {query!r}")
        if document not in of_document:
            raise UserError(f"{key}.path: {path}: the corpus has no document {document!r}")
        ranks[query] = ranks.get(query, 0) + 1
        rows.append((query, document, of_document[document], ranks[query], None))
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)], SCHEMA)


def _pairs(path: str, key: str, queries: Sequence[str]) -> dict[tuple[str, str], None]:
    """The pairs as they are listed, each once; of a list without queries every document with each of `queries`."""
    file = CorpusFile(path, path, "parquet")
    documents = _ids(file, "doc_id", key)
    if "query_id" in parquet_columns(file, key):
        return dict.fromkeys(zip(_ids(file, "query_id", key), documents, strict=True))
    each = dict.fromkeys(documents)
    return dict.fromkeys((query, document) for query in queries for document in each)


def _ids(file: CorpusFile, column: str, key: str) -> Iterator[str]:
    for number, row in enumerate(read_rows(file, [column], key)):
        yield id_text(row, column, f"{key}.path: {file.path} row {number}")


def _blocks_of(blocks: CorpusBlocks, wanted: AbstractSet[str]) -> dict[str, str]:
    """The block of each document that is wanted."""
    return {document: block for document, block in blocks.named() if document in wanted}
