"""The highest and lowest documents of each query, from the parts of a stage's scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msif_ray.paths import exists, path_of, storage
from msif_ray.results.parts import UNITS, part_files, read_part
from msif_ray.store import replacing

Side = Literal["highest", "lowest"]

TOP = "top.parquet"
K = b"k"  # under which the file's metadata has the number of documents at each end

TOP_SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("query_id", pa.string()),
        ("side", pa.string()),
        ("rank", pa.int32()),
        ("doc_id", pa.string()),
        ("score", pa.float32()),
        ("norm", pa.float32()),
        ("n_tokens", pa.int32()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("token_scores", pa.list_(pa.float32())),
    ],
    metadata={
        **UNITS,
        "side": "highest: the documents that support the completion most; lowest: those that oppose it most",
        "rank": "1 is the highest or the lowest score of the query; equal scores are in the order of doc_id",
        "token_scores": "each token's share of the score, in the order of tokens",
    },
)


@dataclass(frozen=True)
class TopPair:
    """One of the `k` documents at one end of a query's scores; `rank` counts from 1."""

    query_id: str
    doc_id: str
    side: Side
    rank: int
    score: float
    norm: float
    n_tokens: int
    block_id: str


# Orders candidates: the score, negated for the highest, then the document's id.
_Candidate = tuple[float, str, float, int, str]


@dataclass
class _Ends:
    """The candidates of one query so far, best first, at most k at each end."""

    highest: list[_Candidate] = field(default_factory=list)
    lowest: list[_Candidate] = field(default_factory=list)


def top_pairs(run_dir: str | Path, stage: str, k: int) -> list[TopPair]:
    """The k highest and the k lowest documents of every query: by query in the order of the parts,
    highest first, then by rank.

    One part at a time is in memory, and 2k candidates of each query. Equal scores are ordered by
    document id; a score that is not a number has no rank. With fewer than 2k documents the two
    ends overlap.
    """
    ends: dict[str, _Ends] = {}
    for block, path in part_files(run_dir, stage):
        _merge_part(ends, read_part(path), block, k)
    return [
        TopPair(query, document, side, rank, -key if side == "highest" else key, norm, tokens, block)
        for query, end in ends.items()
        for side, kept in _sides(end)
        for rank, (key, document, norm, tokens, block) in enumerate(kept, start=1)
    ]


def _sides(end: _Ends) -> tuple[tuple[Side, list[_Candidate]], tuple[Side, list[_Candidate]]]:
    return ("highest", end.highest), ("lowest", end.lowest)


def _merge_part(ends: dict[str, _Ends], part: pa.Table, block: str, k: int) -> None:
    """Takes one part's rows, which are sorted by query, into the candidates."""
    scores = part["score"].to_numpy()
    queries = part["query_id"].combine_chunks().dictionary_encode()
    codes = queries.indices.to_numpy()
    bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)] if len(codes) else []
    for start, stop in pairwise(bounds):
        end = ends.setdefault(queries.dictionary[int(codes[start])].as_py(), _Ends())
        rows = part.slice(start, stop - start)
        end.highest = _best(end.highest, -scores[start:stop], rows, block, k)
        end.lowest = _best(end.lowest, scores[start:stop], rows, block, k)


def _best(kept: list[_Candidate], keys: np.ndarray, rows: pa.Table, block: str, k: int) -> list[_Candidate]:
    """The k smallest of the kept candidates and one query's rows of a part."""
    limit = kept[-1][0] if len(kept) == k else np.inf
    within = np.flatnonzero(keys <= limit)
    if len(within) > k:
        # Every row as small as the k-th smallest, so that ties at the border are settled by document id.
        within = within[keys[within] <= np.partition(keys[within], k - 1)[k - 1]]
    if not len(within):
        return kept
    found = rows.take(pa.array(within)).to_pydict()
    columns = (found["doc_id"], found["norm"], found["n_tokens"])
    new = [(float(key), *values, block) for key, *values in zip(keys[within], *columns, strict=True)]
    return sorted([*kept, *new])[:k]


def has_top(run_dir: str | Path, k: int) -> bool:
    """Whether `top.parquet` is there with k documents at each end; a run directory has no other run's."""
    path = path_of(run_dir) / TOP
    if not exists(path):
        return False
    with storage(path, "read"), path.open("rb") as file:
        try:
            return pq.read_schema(file).metadata.get(K) == str(k).encode()
        except (pa.ArrowException, AttributeError):  # not Parquet, or without metadata: to be written anew
            return False


def write_top(run_dir: str | Path, rows: Sequence[Mapping[str, Any]], k: int) -> None:
    """Writes `top.parquet`, of k documents at each end, from rows with the columns of `TOP_SCHEMA`, in their order.

    Raises ValueError for a row whose keys are not those columns.
    """
    for row in rows:
        if row.keys() != set(TOP_SCHEMA.names):
            raise ValueError(f"a row of top.parquet has {', '.join(row)}, not {', '.join(TOP_SCHEMA.names)}")
    table = pa.Table.from_pylist(list(rows), TOP_SCHEMA.with_metadata({**TOP_SCHEMA.metadata, K: str(k)}))
    with replacing(path_of(run_dir) / TOP) as temporary:
        pq.write_table(table, temporary)
