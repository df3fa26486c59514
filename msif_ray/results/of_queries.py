"""All scores of some queries, from the parts' row groups that hold them."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from msif_ray.ordered import in_order
from msif_ray.results.parts import opened_part, part_files

Scores = tuple[pa.Array, np.ndarray]
"""Documents' ids and their scores."""

_IDS = pa.large_string()  # an array of the shorter kind ends at 2 GiB
_NO_IDS = pa.array([], _IDS)


def query_scores(run_dir: str | Path, stage: str, queries: Sequence[str]) -> Iterator[tuple[str, Scores]]:
    """Each of some queries with its documents and their scores, in the order of the parts, which are read through once;
    other queries' row groups are not read.

    The scores of all these queries are in memory, and their documents' ids once where they are the same.
    """
    wanted = sorted(queries)
    found: dict[str, list[Scores]] = {query: [] for query in queries}
    for of_part in in_order(lambda part: _of_queries(part[1], wanted), part_files(run_dir, stage)):
        for query, scores in of_part:
            found[query].append(scores)
    for query in queries:
        ids, scores = zip(*(found.pop(query) or [(_NO_IDS, np.zeros(0, dtype=np.float32))]), strict=True)
        yield query, (pa.concat_arrays(ids), np.concatenate(scores))


def _of_queries(path: Path, wanted: Sequence[str]) -> list[tuple[str, Scores]]:
    """The scores in a part by query, of those `wanted`, which are sorted; equal columns of ids are one array."""
    found: list[tuple[str, Scores]] = []
    ids = _NO_IDS
    with opened_part(path) as part:
        for number in range(part.num_row_groups):
            some = _may_hold(part.metadata.row_group(number), wanted)
            if not some:
                continue
            rows = part.read_row_group(number, columns=["query_id", "doc_id", "score"], use_threads=False)
            for query in some:
                own = rows.filter(pc.equal(rows["query_id"], query))
                documents = own["doc_id"].cast(_IDS).combine_chunks()
                ids = ids if ids.equals(documents) else documents
                found.append((query, (ids, own["score"].to_numpy())))
    return found


def _may_hold(group: pq.RowGroupMetaData, wanted: Sequence[str]) -> Sequence[str]:
    """Those of the sorted `wanted` queries of which a row group may have rows."""
    statistics = group.column(0).statistics
    if statistics is None or not statistics.has_min_max:
        return wanted
    return wanted[bisect_left(wanted, statistics.min) : bisect_right(wanted, statistics.max)]
