"""The highest and lowest documents of each query, from the parts of a stage's scores."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msif_ray.errors import DamagedError
from msif_ray.ordered import in_order
from msif_ray.paths import exists, path_of
from msif_ray.results.parts import CURVATURE_NORM, SHARES, UNITS, part_files, read_rows
from msif_ray.tables import opened, other_version, table_path, writing

Side = Literal["highest", "lowest"]

# Rows of `top.parquet` made at once: each has a document's tokens.
ROWS_AT_ONCE = 100
# And read at once: of long documents each is large.
ROWS_READ = 16

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
        ("modules", pa.list_(pa.string())),
        ("module_scores", pa.list_(pa.float32())),
    ],  # and `curvature_norm`, where the scores have it
    metadata={
        **UNITS,
        "side": "highest: the documents that support the completion most; lowest: those that oppose it most, as far as "
        "scores have that sign; of few documents the two overlap",
        "rank": "1 is the highest or the lowest score of the query; equal scores are in the order of doc_id",
        "tokens": "a character that several tokens make up stands with the first of them; the others are empty; "
        "a document's label stands with its last token, and what tells two sequences apart with their first",
        **SHARES,
        "index": "where scores are from an index, both kinds of shares are of the exact score, and sum to that",
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
    norm: float | None
    n_tokens: int
    block_id: str
    curvature_norm: float | None = None


# Orders candidates: the score, negated for the highest, then the document's id.
_Candidate = tuple[float, str, float | None, int, float | None, str]


@dataclass
class _Ends:
    """The candidates of one query so far, best first, at most k at each end."""

    highest: list[_Candidate] = field(default_factory=list)
    lowest: list[_Candidate] = field(default_factory=list)


def top_pairs(run_dir: str | Path, stage: str, k: int) -> list[TopPair]:
    """The k highest and the k lowest documents of every query: by query in the order of the parts,
    highest first, then by rank.

    A few rows of one part are in memory at a time, and 2k candidates of each query. Equal scores are ordered by
    document id; a score that is not a number, or infinite, has no rank. With fewer than 2k documents the two
    ends overlap.
    """
    ends: dict[str, _Ends] = {}
    for better in in_order(lambda part: _better(ends, *part, k), part_files(run_dir, stage)):
        for query, own in better.items():
            end = ends.setdefault(query, _Ends())
            end.highest, end.lowest = _merged(end.highest, own.highest, k), _merged(end.lowest, own.lowest, k)
    return [
        TopPair(query, document, side, rank, -key if side == "highest" else key, norm, tokens, block, curvature)
        for query, end in ends.items()
        for side, kept in _sides(end)
        for rank, (key, document, norm, tokens, curvature, block) in enumerate(kept, start=1)
    ]


def _sides(end: _Ends) -> tuple[tuple[Side, list[_Candidate]], tuple[Side, list[_Candidate]]]:
    return ("highest", end.highest), ("lowest", end.lowest)


def _better(ends: Mapping[str, _Ends], block: str, path: Path, k: int) -> dict[str, _Ends]:
    """Each query of a part with its ends in the part, as far as they are better than what is found already: `ends`,
    to which other parts may be added meanwhile, only lets more through when it is looked at early."""
    found: dict[str, _Ends] = {}
    for rows in read_rows(path, also=list(CURVATURE_NORM)):
        _take_rows(found, ends, rows, block, k)
    return found


def _merged(kept: list[_Candidate], more: list[_Candidate], k: int) -> list[_Candidate]:
    return sorted([*kept, *more])[:k] if more else kept


def _take_rows(found: dict[str, _Ends], ends: Mapping[str, _Ends], part: pa.Table, block: str, k: int) -> None:
    """Takes rows of a part, which are sorted by query, into what is found in it."""
    if not len(part):
        return
    scores = part["score"].to_numpy()
    scores = np.where(np.isfinite(scores), scores, np.nan)  # which no comparison finds small
    queries = part["query_id"].combine_chunks().dictionary_encode()
    starts = np.flatnonzero(np.diff(queries.indices.to_numpy(), prepend=-1))
    names = queries.take(pa.array(starts)).to_pylist()
    own = [found.setdefault(query, _Ends()) for query in names]
    known = [ends.get(query, _NONE) for query in names]
    bounds = list(pairwise([*starts.tolist(), len(scores)]))
    for side, keys in (("highest", -scores), ("lowest", scores)):
        limits = np.array([_limit(getattr(each, side), k) for each in known])
        # Of many queries, few find anything better in a part: the others cost no more than this comparison.
        for index in np.flatnonzero(np.fmin.reduceat(keys, starts) <= limits).tolist():
            start, stop = bounds[index]
            kept, rows = getattr(own[index], side), part.slice(start, stop - start)
            best = _best(kept, min(limits[index], _limit(kept, k)), keys[start:stop], rows, block, k)
            setattr(own[index], side, best)


_NONE = _Ends()


def _limit(kept: list[_Candidate], k: int) -> float:
    """What a key must not be over to be of the k best."""
    return kept[-1][0] if len(kept) == k else np.inf


def _best(
    kept: list[_Candidate], limit: float, keys: np.ndarray, rows: pa.Table, block: str, k: int
) -> list[_Candidate]:
    """The k smallest of the kept candidates and one query's rows of a part that are no larger than `limit`."""
    within = np.flatnonzero(keys <= limit)
    if len(within) > k:
        # Every row as small as the k-th smallest, so that ties at the border are settled by document id.
        within = within[keys[within] <= np.partition(keys[within], k - 1)[k - 1]]
    if not len(within):
        return kept
    found = rows.take(pa.array(within)).to_pydict()
    columns = (found["doc_id"], found["norm"], found["n_tokens"], *_curvature_norms(found, len(within)))
    new = [(float(key), *values, block) for key, *values in zip(keys[within], *columns, strict=True)]
    return sorted([*kept, *new])[:k]


def _curvature_norms(found: Mapping[str, list[Any]], count: int) -> list[list[float | None]]:
    return [found.get(name, [None] * count) for name in CURVATURE_NORM]


def _is_current(names: Sequence[str]) -> bool:
    return [name for name in names if name not in CURVATURE_NORM] == TOP_SCHEMA.names


def has_top(run_dir: str | Path, k: int) -> bool:
    """Whether `top.parquet` is there with k documents at each end and this version's columns; a run directory has no
    other run's."""
    path = path_of(run_dir) / TOP
    if not exists(path):
        return False
    try:
        with opened(path) as file:
            schema = file.schema_arrow
            return _is_current(schema.names) and schema.metadata[K] == str(k).encode()
    except DamagedError:  # not Parquet, or without that number: to be written anew
        return False


def top_k(run_dir: str | Path) -> int:
    """The number of documents at each end that `top.parquet` was made for. Raises UserError as `read_top` does."""
    with _opened(run_dir) as file:
        return int(file.schema_arrow.metadata[K])


def count_top(run_dir: str | Path) -> int:
    """The number of rows of `top.parquet`. Raises UserError as `read_top` does."""
    with _opened(run_dir) as file:
        return int(file.metadata.num_rows)


def read_top(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of `top.parquet` without the documents' texts, some at a time.

    Raises UserError where it is missing, damaged or of an earlier version.
    """
    with _opened(run_dir) as file:
        columns = [name for name in file.schema_arrow.names if name != "text"]
        for batch in file.iter_batches(ROWS_READ, columns=columns):
            yield from batch.to_pylist()


@contextmanager
def _opened(run_dir: str | Path) -> Iterator[pq.ParquetFile]:
    path = table_path(run_dir, TOP)
    with opened(path) as file:
        if not _is_current(file.schema_arrow.names):
            raise other_version(path)
        yield file


def write_top(run_dir: str | Path, rows: Iterable[Mapping[str, Any]], k: int, curvature_norm: bool = False) -> None:
    """Writes `top.parquet`, of k documents at each end, from rows with the columns of `TOP_SCHEMA`, and perhaps
    `curvature_norm`, in their order, some at a time.

    Raises ValueError for a row whose keys are not those columns.
    """
    left = iter(rows)
    more = CURVATURE_NORM if curvature_norm else {}
    schema = pa.schema([*TOP_SCHEMA, *(pa.field(name, pa.float32()) for name in more)])
    schema = schema.with_metadata({**TOP_SCHEMA.metadata, **more, K: str(k)})
    with writing(path_of(run_dir) / TOP, schema) as writer:
        while some := list(islice(left, ROWS_AT_ONCE)):
            for row in some:
                if row.keys() != set(schema.names):
                    raise ValueError(f"a row of top.parquet has {', '.join(row)}, not {', '.join(schema.names)}")
            writer.write_table(pa.Table.from_pylist(some, schema))
