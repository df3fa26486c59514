"""How the scores of each query are distributed: one row per stage and query, from one pass over the parts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

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


@dataclass
class _Sums:
    """Running sums of one query's scores s and their documents' lengths n."""

    ends: Ends
    # 1, max(s, 0), min(s, 0), s², n, n², |s|·n, d, d², with d = s - lowest.
    #
    # Each sign has its own sum: from those of s and |s| a small one could not be told from the other's rounding.
    # The deviation is from d: Σs² can be any number of times Σ(s - mean)², where scores are alike and far from zero,
    # and so can its rounding; Σd² of N documents is no more than 2N times that, with the ends among them.
    moments: np.ndarray = field(default_factory=lambda: np.zeros(9))
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    def add(self, scores: np.ndarray, tokens: np.ndarray) -> None:
        kept = np.isfinite(scores)
        s, n = scores[kept].astype(np.float64), tokens[kept].astype(np.float64)
        size = np.abs(s)
        positive, negative = np.maximum(s, 0.0).sum(), np.minimum(s, 0.0).sum()
        lowest, highest = self.ends
        d = s - lowest
        self.moments += (len(s), positive, negative, s @ s, n.sum(), n @ n, size @ n, d.sum(), d @ d)
        places = d / ((highest - lowest) or 1.0) * BINS
        self.histogram += np.bincount(np.clip(places.astype(np.int64), 0, BINS - 1), minlength=BINS)

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
    for query, scores, _ in _by_query(run_dir, stage):
        finite = scores[np.isfinite(scores)]
        if len(finite):
            lowest, highest = ends.get(query, (np.inf, -np.inf))
            ends[query] = (min(lowest, float(finite.min())), max(highest, float(finite.max())))
    sums = {query: _Sums(found) for query, found in ends.items()}
    for query, scores, tokens in _by_query(run_dir, stage):
        if query in sums:
            sums[query].add(scores, tokens)
    return sums


def _by_query(run_dir: str | Path, stage: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """A query's scores and its documents' lengths, `[rows]`, as they lie together in a part."""
    for _, path in part_files(run_dir, stage):
        for rows in read_rows(path):
            queries = rows["query_id"].combine_chunks().dictionary_encode()
            codes = queries.indices.to_numpy()
            starts = np.flatnonzero(np.diff(codes, prepend=-1)).tolist()
            scores, tokens = rows["score"].to_numpy(), rows["n_tokens"].to_numpy()
            names = queries.dictionary.to_pylist()
            for start, stop in pairwise([*starts, len(codes)]):
                yield names[codes[start]], scores[start:stop], tokens[start:stop]
