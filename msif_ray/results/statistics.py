"""How the scores of each query are distributed: one row per stage and query, from one pass over the parts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from msif_ray.ordered import in_order
from msif_ray.paths import path_of
from msif_ray.results.parts import UNITS, part_files, read_rows
from msif_ray.tables import read_table, table_path, write_table

STATISTICS = "statistics.parquet"
BINS = 64
# Of a sum of squares, the share that squared distances from the mean make up where numbers differ. With less it is
# rounding, of float64 sums over up to millions of parts, and the numbers are equal.
LEAST_SPREAD = 1e-12

SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("query_id", pa.string()),
        ("documents", pa.int64()),
        ("mean", pa.float64()),
        ("deviation", pa.float64()),
        ("lowest", pa.float64()),
        ("highest", pa.float64()),
        ("total_absolute", pa.float64()),
        ("total_positive", pa.float64()),
        ("total_negative", pa.float64()),
        ("length_correlation", pa.float64()),
        ("mean_tokens", pa.float64()),
        ("histogram", pa.list_(pa.int64())),
    ],
    metadata={
        **UNITS,
        "documents": "those with a score of the query that is a number; the other columns are over these",
        "deviation": "standard deviation of the scores",
        "total_absolute": "sum of |score|: of which a document's share of the whole is a share",
        "total_positive": "sum of the scores above zero; total_negative: of those below it",
        "length_correlation": "Pearson's correlation of |score| with n_tokens; null where either is constant",
        "histogram": f"documents in {BINS} intervals of equal width from the lowest score to the highest",
    },
)

Ends = tuple[float, float]


@dataclass(frozen=True)
class _Rows:
    """Some rows of a part that are numbers: scores s and documents' lengths n, `[rows]`, of the `queries` whose first
    rows are at `starts`."""

    queries: list[str]
    starts: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray

    def of_each(self, values: Iterable[float]) -> np.ndarray:
        """A number of each query, `[rows]`."""
        return np.repeat(np.fromiter(values, float), np.diff(self.starts, append=len(self.scores)))


# 1, max(s, 0), min(s, 0), s², n, n², |s|·n, d, d², with d = s - lowest.
#
# Each sign has its own sum: from those of s and |s| a small one could not be told from the other's rounding.
# The deviation is from d: Σs² can be any number of times Σ(s - mean)², where scores are alike and far from zero,
# and so can its rounding; Σd² of N documents is no more than 2N times that, with the ends among them.
def _moments(rows: _Rows, lowest: np.ndarray) -> np.ndarray:
    """Their sums, `[queries, 9]`; `lowest` is each query's lowest score, `[rows]`."""
    s, n, d = rows.scores, rows.lengths, rows.scores - lowest
    terms = (np.ones(len(s)), np.maximum(s, 0.0), np.minimum(s, 0.0), s * s, n, n * n, np.abs(s) * n, d, d * d)
    return np.stack([np.add.reduceat(each, rows.starts) for each in terms], axis=1)


def _histograms(rows: _Rows, lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Each query's, `[queries, BINS]`."""
    width = np.where(highest > lowest, highest - lowest, 1.0)
    places = np.clip(((rows.scores - lowest) / width * BINS).astype(np.int64), 0, BINS - 1)
    cells = places + BINS * rows.of_each(range(len(rows.queries))).astype(np.int64)
    return np.bincount(cells, minlength=BINS * len(rows.queries)).reshape(-1, BINS)


@dataclass
class _Sums:
    """Running sums of one query."""

    ends: Ends
    moments: np.ndarray = field(default_factory=lambda: np.zeros(9))
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    def add(self, moments: np.ndarray, histogram: np.ndarray) -> None:
        self.moments += moments
        self.histogram += histogram

    def row(self, stage: str, query: str) -> dict[str, Any]:
        count, positive, negative, squares, tokens, squared_tokens, products, *distances = self.moments.tolist()
        mean, absolute = (positive + negative) / count if count else 0.0, positive - negative
        variances = _spread(squares, absolute, count) * _spread(squared_tokens, tokens, count)
        correlation = (products - absolute * tokens / count) / variances**0.5 if variances else None
        return {
            "stage": stage,
            "query_id": query,
            "documents": int(count),
            "mean": mean,
            "deviation": (_spread(distances[1], distances[0], count) / count) ** 0.5 if count else 0.0,
            "lowest": self.ends[0],
            "highest": self.ends[1],
            "total_absolute": absolute,
            "total_positive": positive,
            "total_negative": negative,
            "length_correlation": None if correlation is None else max(-1.0, min(1.0, correlation)),
            "mean_tokens": tokens / count if count else 0.0,
            "histogram": self.histogram.tolist(),
        }


def _spread(squares: float, total: float, count: float) -> float:
    """The sum of squared distances from the mean, from sums; exactly zero for equal numbers."""
    spread = squares - total**2 / count if count else 0.0
    return spread if spread > LEAST_SPREAD * squares else 0.0


def write_statistics(run_dir: str | Path, stages: Iterable[str]) -> None:
    """Writes `statistics.parquet` of the stages' scores. Two passes: the ends first, then what lies between."""
    rows = [sums.row(stage, query) for stage in stages for query, sums in _gather(run_dir, stage).items()]
    write_table(path_of(run_dir) / STATISTICS, pa.Table.from_pylist(rows, SCHEMA))


def read_statistics(run_dir: str | Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of `statistics.parquet` by stage and query. Raises UserError where it is missing or damaged."""
    rows = read_table(table_path(run_dir, STATISTICS), SCHEMA.names).to_pylist()
    return {(row["stage"], row["query_id"]): row for row in rows}


def _gather(run_dir: str | Path, stage: str) -> dict[str, _Sums]:
    ends: dict[str, Ends] = {}
    for of_part in in_order(_ends, (path for _, path in part_files(run_dir, stage))):
        for query, lowest, highest in of_part:
            low, high = ends.get(query, (lowest, highest))
            ends[query] = min(low, lowest), max(high, highest)
    sums = {query: _Sums(found) for query, found in ends.items()}
    for of_rows in in_order(lambda path: _sums(path, ends), (path for _, path in part_files(run_dir, stage))):
        for query, moments, histogram in of_rows:
            sums[query].add(moments, histogram)
    return sums


def _ends(path: Path) -> list[tuple[str, float, float]]:
    """The lowest and the highest score of each query in a part that has any."""
    found: list[tuple[str, float, float]] = []
    for rows in _by_query(path):
        ends = (np.minimum.reduceat(rows.scores, rows.starts), np.maximum.reduceat(rows.scores, rows.starts))
        found += zip(rows.queries, *(end.tolist() for end in ends), strict=True)
    return found


def _sums(path: Path, ends: Mapping[str, Ends]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The moments and the histogram of each query in a part."""
    found: list[tuple[str, np.ndarray, np.ndarray]] = []
    for rows in _by_query(path):
        lowest, highest = (rows.of_each(ends[query][side] for query in rows.queries) for side in (0, 1))
        found += zip(rows.queries, _moments(rows, lowest), _histograms(rows, lowest, highest), strict=True)
    return found


def _by_query(path: Path) -> Iterator[_Rows]:
    """A part's rows that are numbers, a row group's at a time: a query's lie together."""
    for rows in read_rows(path, ("query_id", "score", "n_tokens")):
        scores = rows["score"].to_numpy().astype(np.float64)
        queries = rows["query_id"].combine_chunks().dictionary_encode()
        kept = np.flatnonzero(np.isfinite(scores))
        codes = queries.indices.to_numpy()[kept]
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        if len(starts):
            names = queries.dictionary.take(pa.array(codes[starts])).to_pylist()
            yield _Rows(names, starts, scores[kept], rows["n_tokens"].to_numpy()[kept].astype(np.float64))
