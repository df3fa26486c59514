"""Candidates first: which documents of a corpus are scored for each query, chosen by BM25 or given (`listed.py`).

With models of billions of parameters a pass over a whole corpus costs as much as training on it; Bao et al. 2025 score
the documents that BM25 finds for a query. What is not a candidate has no score, and is not among those skipped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa
from bm25s.tokenization import Tokenizer

from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.chat import chat_text, turns_fault, turns_text
from msif_ray.corpus.packed import Part
from msif_ray.corpus.queries import Query
from msif_ray.corpus.reader import Block, Document
from msif_ray.corpus.states import fingerprint
from msif_ray.errors import UserError
from msif_ray.paths import path_of
from msif_ray.tables import read_table, write_table

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("block", pa.string()),
        ("rank", pa.int32()),
        ("bm25", pa.float32()),
    ],
    metadata={
        "rank": "1 is the query's first candidate",
        "bm25": "of the query's prompt and completion in the document; null of a list that was given",
        "block": "the block of the corpus that holds the document",
    },
)


Decode = Callable[[Sequence[int]], str]
"""The text of tokens."""


@dataclass(frozen=True)
class CandidateBlocks(CorpusBlocks):
    """The blocks of a corpus that hold candidates, with those alone; `chosen` is the file that says which."""

    chosen: "ChosenFile" = field(kw_only=True)

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(self._chosen.places)

    def left_in(self, file: int, done: AbstractSet[str]) -> Iterator[Block]:
        names = self._names(file)
        wanted = (self._chosen.places.keys() & names) - done
        if not wanted:
            return
        for block in super().left_in(file, set(names) - wanted):
            chosen = self._chosen.documents(block.id)
            yield Block(block.id, tuple(document for document in block.documents if document.id in chosen))

    @property
    def count(self) -> int:
        return sum(map(self.documents_in, self._chosen.places))

    def documents_in(self, block: str) -> int:
        return len(self._chosen.documents(block))

    @property
    def _chosen(self) -> "Chosen":
        return read_chosen(self.chosen)


@dataclass(frozen=True)
class Chosen:
    """The pairs to be scored: `rows` (`doc_id`, `query_id`) in the order of blocks, and the `places` of each block's,
    from the first row to before the last's next. Some fifty bytes a pair, since every process that reads has them."""

    rows: pa.Table
    places: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, table: pa.Table) -> "Chosen":
        """From a table with the columns `query_id`, `doc_id` and `block`."""
        blocks = table["block"].combine_chunks().dictionary_encode()
        codes = blocks.indices.to_numpy()
        ends = np.cumsum(np.bincount(codes, minlength=len(blocks.dictionary))).tolist()
        documents = table["doc_id"].cast(pa.large_string())  # an array of the shorter kind ends at 2 GiB
        queries = table["query_id"].dictionary_encode()
        order = pa.array(np.argsort(codes, kind="stable"))
        rows = pa.table({"doc_id": documents, "query_id": queries}).take(order)
        return cls(rows, dict(zip(blocks.dictionary.to_pylist(), pairwise([0, *ends]), strict=True)))

    def documents(self, block: str) -> frozenset[str]:
        """A block's candidates of any query."""
        return frozenset(self._of(block)["doc_id"].to_pylist())

    def pairs(self, block: str, documents: Sequence[str], queries: Sequence[str]) -> np.ndarray:
        """Which pairs of a block are to be scored, `[documents, queries]` bool."""
        wanted = np.zeros((len(documents), len(queries)), dtype=bool)
        rows, columns = ({name: place for place, name in enumerate(names)} for names in (documents, queries))
        own = self._of(block)
        for document, query in zip(own["doc_id"].to_pylist(), own["query_id"].to_pylist(), strict=True):
            if document in rows:  # it was not skipped
                wanted[rows[document], columns[query]] = True
        return wanted

    def _of(self, block: str) -> pa.Table:
        start, stop = self.places[block]
        return self.rows.slice(start, stop - start)


@dataclass(frozen=True)
class ChosenFile:
    """A table of candidates as a run found it: a process may outlive the run, and what is there then."""

    path: str
    state: str

    @classmethod
    def found(cls, path: Path) -> "ChosenFile":
        return cls(str(path), fingerprint(path))


def write_chosen(path: Path, table: pa.Table) -> None:
    """Writes the candidates of a pass, which say of which."""
    write_table(path, table.replace_schema_metadata((table.schema.metadata or {}) | _said(path)))


@lru_cache(maxsize=4)
def read_chosen(chosen: ChosenFile) -> Chosen:
    """The candidates in a file, read once per process. Raises UserError for one that is damaged, or another pass's."""
    path = path_of(chosen.path)
    return Chosen.of(read_table(path, ["query_id", "doc_id", "block"], _said(path)))


def _said(path: Path) -> dict[str, str]:
    return {"scores": path.stem}


def by_bm25(blocks: CorpusBlocks, queries: Sequence[Document], top: int, decode: Decode | None = None) -> pa.Table:
    """The `top` documents of each query's prompt and completion by BM25, those that share no word with it left out.

    `decode` gives the text of tokens, which documents of packed rows are searched by.

    The whole corpus's words are in this process's memory, some twenty bytes for each.
    """
    documents: list[tuple[str, str]] = []
    words = Tokenizer(splitter=r"(?u)\b\w+\b", stopwords=[])
    texts = _texts(blocks, documents, decode)
    index = bm25s.BM25()
    found = words.tokenize(texts, length=blocks.count, return_as="tuple", show_progress=False, allow_empty=False)
    index.index(found, create_empty_token=False, show_progress=False)
    wanted = [query.words if isinstance(query, Query) else f"{query.prompt or ''}{query.text}" for query in queries]
    asked = words.tokenize(wanted, update_vocab=False, return_as="string", show_progress=False, allow_empty=False)
    count = min(top, len(documents))
    places, scores = index.retrieve(asked, k=count, show_progress=False, n_threads=0)
    found = np.nonzero(scores > 0)  # by query, and then by rank
    if not len(found[0]):
        raise UserError("candidates: no document of the corpus shares a word with any query")
    names, of_blocks = (pa.array(column, pa.string()) for column in zip(*documents, strict=True))
    chosen = pa.array(places[found])
    of_queries = pa.array([query.id for query in queries], pa.string()).take(pa.array(found[0]))
    ranks, of_bm25 = (found[1] + 1).astype(np.int32), scores[found].astype(np.float32)
    return pa.table([of_queries, names.take(chosen), of_blocks.take(chosen), ranks, of_bm25], schema=SCHEMA)


def _texts(blocks: CorpusBlocks, documents: list[tuple[str, str]], decode: Decode | None) -> Iterator[str]:
    """The documents' texts; their ids and blocks go to `documents`."""
    for block in blocks.left(frozenset()):
        for document in block.documents:
            documents.append((document.id, block.id))
            yield _words(document, decode)


def _words(document: Document, decode: Decode | None) -> str:
    """What a document says, to be searched; nothing of one that is neither text nor a conversation."""
    if document.rejected is None:
        text = chat_text(document.text) if document.is_chat else document.text
        if isinstance(text, Part) and decode is not None:
            text = decode(text.own)
        return f"{document.prompt or ''}{text or ''}" if isinstance(text, str) else ""
    prompt, chosen, rejected = (_told(part) for part in (document.prompt, document.text, document.rejected))
    return f"{prompt}{chosen} {rejected}"


def _told(part: Any) -> str:
    if isinstance(part, str):
        return part
    return "" if turns_fault(part) is not None else turns_text(part)
