"""Candidates first: which documents of a corpus are scored for each query, chosen by BM25 or given (`listed.py`).

With models of billions of parameters a pass over a whole corpus costs as much as training on it; Bao et al. 2025 score
the documents that BM25 finds for a query. What is not a candidate has no score, and is not among those skipped.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa
from bm25s.tokenization import Tokenizer

from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.census import fingerprint
from msif_ray.corpus.chat import chat_text, turns_fault, turns_text
from msif_ray.corpus.packed import Part
from msif_ray.corpus.queries import Query
from msif_ray.corpus.reader import Block, Document
from msif_ray.errors import UserError
from msif_ray.paths import path_of
from msif_ray.tables import read_table

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
        return frozenset(self._chosen.documents)

    def left_in(self, file: int, done: AbstractSet[str]) -> Iterator[Block]:
        wanted = {name for name in self.ids if int(name.split("-")[0]) == file} - done
        if not wanted:
            return
        for block in super().left_in(file, set(super()._names(file)) - wanted):
            names = self._chosen.documents[block.id]
            yield Block(block.id, tuple(document for document in block.documents if document.id in names))

    @property
    def count(self) -> int:
        return sum(map(len, self._chosen.documents.values()))

    def documents_in(self, block: str) -> int:
        return len(self._chosen.documents[block])

    @property
    def _chosen(self) -> "Chosen":
        return read_chosen(self.chosen)


@dataclass(frozen=True)
class Chosen:
    """The pairs to be scored."""

    table: pa.Table

    @cached_property
    def documents(self) -> dict[str, frozenset[str]]:
        """The candidates of any query by block."""
        found: dict[str, set[str]] = {}
        columns = (self.table[name].to_pylist() for name in ("block", "doc_id"))
        for block, document in zip(*columns, strict=True):
            found.setdefault(block, set()).add(document)
        return {block: frozenset(documents) for block, documents in found.items()}

    @cached_property
    def queries(self) -> dict[str, frozenset[str]]:
        """The queries of each document."""
        found: dict[str, set[str]] = {}
        columns = (self.table[name].to_pylist() for name in ("query_id", "doc_id"))
        for query, document in zip(*columns, strict=True):
            found.setdefault(document, set()).add(query)
        return {document: frozenset(queries) for document, queries in found.items()}

    def pairs(self, documents: Sequence[str], queries: Sequence[str]) -> np.ndarray:
        """Which pairs are to be scored, `[documents, queries]` bool."""
        none: frozenset[str] = frozenset()
        of = [self.queries.get(document, none) for document in documents]
        return np.array([[query in own for query in queries] for own in of], dtype=bool).reshape(-1, len(queries))


@dataclass(frozen=True)
class ChosenFile:
    """A table of candidates as a run found it: a process may outlive the run, and what is there then."""

    path: str
    state: str

    @classmethod
    def found(cls, path: Path) -> "ChosenFile":
        return cls(str(path), fingerprint(path))


@lru_cache(maxsize=4)
def read_chosen(chosen: ChosenFile) -> Chosen:
    """The candidates in a file, read once per process. Raises UserError for one that is damaged."""
    return Chosen(read_table(path_of(chosen.path), SCHEMA.names))


def by_bm25(blocks: CorpusBlocks, queries: Sequence[Document], top: int, decode: Decode | None = None) -> pa.Table:
    """The `top` documents of each query's prompt and completion by BM25, those that share no word with it left out.

    `decode` gives the text of tokens, which documents of packed rows are searched by.

    The whole corpus's words are in this process's memory, some ten bytes for each.
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
    rows = [
        (query.id, *documents[place], rank, score)
        for query, of_query, own in zip(queries, places.tolist(), scores.tolist(), strict=True)
        for rank, (place, score) in enumerate(zip(of_query, own, strict=True), start=1)
        if score > 0
    ]
    if not rows:
        raise UserError("candidates: no document of the corpus shares a word with any query")
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)], SCHEMA)


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
