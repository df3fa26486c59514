"""Influence by a column of the corpus (domain, date, licence): sums over the documents that share its value."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from msif_ray.config import Documents, Score
from msif_ray.corpus.files import corpus_files
from msif_ray.corpus.reader import block_id, id_columns, row_ids
from msif_ray.corpus.reader import read_rows as read_corpus
from msif_ray.errors import UserError
from msif_ray.indexes import index_folder, read_manifest
from msif_ray.paths import exists, is_remote
from msif_ray.results.complete import check_complete
from msif_ray.results.excerpt import visible
from msif_ray.results.facts import NO_SCORE, Facts, read_facts
from msif_ray.results.parts import UNITS, part_path, read_rows

# Values of the column that are printed.
SHOWN = 30
NOTHING = "(none)"  # what is printed of documents whose column is null
ALL_ZERO = "all scores are zero, of which nothing has a share"  # what is printed where they are

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("value", pa.string()),
        ("documents", pa.int64()),
        ("mean", pa.float64()),
        ("total", pa.float64()),
        ("share", pa.float64()),
        ("net_share", pa.float64()),
        ("share_of_documents", pa.float64()),
    ],
    metadata={
        "unit": UNITS["unit"],
        "sign": UNITS["sign"],
        "value": "of the column that the documents are grouped by, as text; null: of documents where it is null",
        "mean": "mean score of the group's documents; total: their sum",
        "share": "the group's sum of |score| over that of all documents; null where all scores are zero",
        "net_share": "the group's sum of scores over the sum of |score| of all documents; null likewise",
        "share_of_documents": "what share would be if all documents had the same |score|",
    },
)


class _Sums:
    """By value of the column and by query: the number of documents, the sum of their scores and of |score|,
    `[values, queries, 3]`: 24 bytes for each."""

    def __init__(self, queries: Sequence[str]) -> None:
        self._queries = pa.array(queries, pa.string())
        self.values: dict[str | None, int] = {}
        self._sums = np.zeros((1, len(queries), 3))

    @property
    def sums(self) -> np.ndarray:
        return self._sums[: len(self.values)]

    def codes(self, values: Iterable[str | None]) -> np.ndarray:
        """The number of each value."""
        found = [self.values.setdefault(value, len(self.values)) for value in values]
        if len(self.values) > len(self._sums):  # twice as many as are needed, since more will come
            more = np.zeros((2 * len(self.values) - len(self._sums), *self._sums.shape[1:]))
            self._sums = np.concatenate([self._sums, more])
        return np.array(found, dtype=np.int64)

    def add(self, rows: pa.Table, codes: np.ndarray) -> None:
        """Adds rows whose documents have values of these numbers, `[rows]`; scores that are not numbers count none."""
        scores = rows["score"].to_numpy().astype(np.float64)
        asked = pc.index_in(rows["query_id"], value_set=self._queries).to_numpy()
        finite = np.isfinite(scores)
        scores, places = scores[finite], (codes * len(self._queries) + asked)[finite]
        cells, of_row = np.unique(places, return_inverse=True)
        sums = [np.bincount(of_row, weights, len(cells)) for weights in (None, scores, np.abs(scores))]
        self._sums.reshape(-1, 3)[cells] += np.stack(sums, axis=1)


def aggregate(run_dir: str | Path, column: str, label: str | None = None) -> pa.Table:
    """Sums of the scores of `label` (default: the run's first) by query and by the value of the corpus's `column`:
    a table of `SCHEMA`, by query and then by falling share.

    The corpus is read again, a block and its scores at a time. Raises UserError for a run that is not finished, for a
    column that the corpus does not have, and for a corpus that is no longer as it was scored.
    """
    facts = read_facts(run_dir)
    scored = facts.scored_as(label) if label is not None else facts.scored[0]
    entry = next(each for each in facts.run.score if each.label == scored.label)
    check_complete(facts, scored)
    sums = _Sums([query.id for query in facts.queries])
    for block, values in _blocks(facts, entry, column):
        path = part_path(facts.run_dir, scored.label, block)
        if not exists(path):
            if entry.candidates is not None:
                continue  # none of its documents was one
            raise UserError(f"{path}: the corpus has documents that the run has not: it has changed since")
        codes = sums.codes(values.values())
        for rows in read_rows(path, ("query_id", "doc_id", "score")):
            places = pc.index_in(rows["doc_id"], value_set=pa.array(list(values), pa.string()))
            if places.null_count:
                unknown = rows["doc_id"].filter(pc.is_null(places))[0].as_py()
                raise UserError(f"{path}: {unknown!r} is not in the block's documents: the corpus has changed since")
            sums.add(rows, codes[places.to_numpy()])
    return _table(facts, sums)


def _corpus(facts: Facts, entry: Score) -> Documents:
    """The entry's corpus where the run read it, whatever directory that was run in; as described where it is gone."""
    documents = facts.run.scored_documents(entry)
    files = list(facts.corpora.get(f"score.{facts.run.score.index(entry)}", {}))
    there = files and all(not is_remote(file) and os.path.exists(file) for file in files)
    return documents.model_copy(update={"path": files}) if there else documents


def _blocks(facts: Facts, entry: Score, column: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The id of every block, and the column's value of each of its documents by id."""
    documents, key = _corpus(facts, entry), f"score.{facts.run.score.index(entry)}.documents"
    size = facts.run.cluster.documents_per_block
    if entry.index is not None:
        size = read_manifest(index_folder(entry))["documents_per_block"]
    columns = list(dict.fromkeys([*id_columns(documents), column]))
    for index, file in enumerate(corpus_files(documents, key)):
        rows = enumerate(read_corpus(file, columns, key))
        found = (
            pair
            for place, row in rows
            for pair in _values(row_ids(file, place, row, documents, key), row[column], documents.packed is not None)
        )
        number = 0
        while some := dict(islice(found, size)):
            yield block_id(index, number), some
            number += 1


def _values(names: Sequence[str], value: object, packed: bool) -> Iterator[tuple[str, str | None]]:
    """Of each document of a row: the row's value, or of packed ones each its own where there are as many."""
    each = value if packed and isinstance(value, list) and len(value) == len(names) else [value] * len(names)
    return zip(names, map(_text, each), strict=True)


def _text(value: object) -> str | None:
    # Broken files bring lone surrogates, which no table holds.
    return None if value is None else str(value).encode(errors="backslashreplace").decode()


def _table(facts: Facts, sums: _Sums) -> pa.Table:
    values = list(sums.values)
    by_name = np.argsort(np.array([value or "" for value in values], dtype=object), kind="stable")
    names = pa.array(values, pa.string())
    tables = []
    for number, query in enumerate(facts.queries):
        own = sums.sums[by_name, number]
        count, _, size = own.sum(axis=0)
        order = np.argsort(-own[:, 2], kind="stable")
        order = order[own[order, 0] > 0]
        documents, total, absolute = own[order].T
        columns = [
            pa.array([query.id], pa.string()).take(pa.array(np.zeros(len(order), dtype=np.int32))),
            names.take(pa.array(by_name[order])),
            documents.astype(np.int64),
            total / documents,
            total,
            *(part / size if size else pa.nulls(len(order), pa.float64()) for part in (absolute, total)),
            documents / count,
        ]
        tables.append(pa.table(columns, schema=SCHEMA))
    return pa.concat_tables(tables)


def of_query(table: pa.Table, query: str) -> pa.Table:
    """One query's groups. Raises UserError for a query that is not there."""
    found = table.filter(pc.equal(table["query_id"], query))
    if not len(found):
        raise UserError(f"--query: there are no scores of {query!r}")
    return found


def print_aggregate(table: pa.Table, column: str, console: Console) -> None:
    """Prints a query's groups, or the means of their shares over several: shares have no unit, and queries' scores
    differ in size. Queries without shares, all of whose scores are zero, take no part. Where queries have scores of
    different documents (candidates), the equal share is a mean, too, and the number of documents the largest."""
    asked, table = len(pc.unique(table["query_id"])), table.filter(pc.is_valid(table["share"]))
    queries = len(pc.unique(table["query_id"]))
    if not queries:
        console.print(Text(ALL_ZERO if asked else NO_SCORE))
        return
    sums = [(name, "sum") for name in ("documents", "share", "net_share", "share_of_documents")]
    found = table.group_by("value").aggregate([("documents", "max"), *sums])
    groups = found.sort_by([("share_sum", "descending")]).to_pylist()
    shown = Table(box=None, padding=(0, 1), header_style="dim")
    shown.add_column(Text(column), overflow="fold")
    for name in ("documents", "share", "net", "per document"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in groups[:SHOWN]:
        # Both are means over as many queries: one without documents of the group counts as zero in either.
        share, equal = row["share_sum"] / queries, row["share_of_documents_sum"] / queries
        ratio = f"{share / equal:.2f}×" if equal else ""
        net = f"{row['net_share_sum'] / queries:+.1%}"
        shown.add_row(_shown(row["value"]), f"{row['documents_max']:,}", f"{share:.1%}", net, ratio)
    console.print(shown)
    if len(groups) > SHOWN:
        console.print(Text(f"and {len(groups) - SHOWN:,} more values", style="dim"))
    over = f" (mean over {queries} queries)" if queries > 1 else ""
    differ = any(row["documents_sum"] != queries * row["documents_max"] for row in groups)
    words = f"share of the sum of |score|{over}; net: supporting less opposing; per document: over an equal share"
    words += "; documents: of a query at most" if differ else ""
    words += f"; left out: queries whose scores are all zero, {asked - queries} of {asked}" if queries < asked else ""
    console.print(Text(words, style="dim"))


def _shown(value: str | None) -> Text:
    """A group's name; one that would leave its place blank in quotes."""
    if value is None or not value.strip():
        return Text(NOTHING if value is None else repr(value), style="dim")
    return Text(visible(value))
