"""Score parts: one Parquet file per scored block, all of the block or nothing (DESIGN.md §4).

A part carries its block's skipped documents in its own metadata, so that one rename publishes both.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msif_ray.ordered import in_order
from msif_ray.paths import names_matching, path_of
from msif_ray.tables import check_place, opened, writing

SKIPPED = b"skipped"

# Row groups are whole queries of the part's documents: of so many rows at the least, and no more than so many groups.
# With smaller ones less is read for one query, but the footer is a larger part of the file and each takes its time.
GROUP_ROWS = 2**10
GROUPS = 64
# Rows of `skipped.parquet` that are made at once.
SKIPPED_AT_ONCE = 2**16

UNITS = {
    "unit": "score: nats of the completion's log-likelihood per unit of weight on the document's loss inside "
    "the mean loss of its stage; leaving it out of N documents changes the log-likelihood by about -score/N; "
    "where the scored stage's own response is the identity, the product of two gradients, which says no such thing",
    "sign": "positive: training more on the document would have made the completion more likely (supports it)",
    "norm": "Frobenius norm of the gradient of the document's summed loss over the tracked maps; "
    "for several windows the root of the sum of their squares; null where the run says `detail: {norm: false}`",
    "n_tokens": "tokens of the document, with its prompt, or what comes before it in a packed row, and an appended EOS",
}

# Of the list columns that a run with `detail`, and top.parquet, have beside.
SHARES = {
    "token_scores": "each token's share of the score: what flows through its own activations; they sum to the score",
    "module_scores": "each tracked map's share of the score, in the order of modules; they sum to the score",
}

NORMALISED = {
    "score_per_token": "score / n_tokens",
    "score_per_norm": "score / norm; null where the norm is zero",
    "score_per_curvature_norm": "score / curvature_norm; null where that is zero",
}

CURVATURE_NORM = {
    "curvature_norm": "norm of that gradient g in the inverse curvature of the scored stage: the root of "
    "g'(H + c)^-1 g with H its EK-FAC factors and c its damping, in the root of nats per unit of weight; "
    "for several windows the root of the sum of their squares",
}

SCORES_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("norm", pa.float32()),
        pa.field("n_tokens", pa.int32(), nullable=False),
    ],
    metadata=UNITS,
)

SKIPPED_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("doc_id", "reason", "stage")],
    metadata={
        "reason": "why the document has no score",
        "stage": "what the scores are called; of entries that share a pass over the documents, the first",
    },
)


@dataclass(frozen=True)
class Details:
    """What scores are sums of: by map, `[documents, queries, maps]`, and by token, `[queries, tokens]` of each
    document; None where it is not wanted. `modules` names the maps. Beside these `curvature_norms`, `[documents]`, and
    the `normalised` scores."""

    modules: tuple[str, ...]
    by_map: np.ndarray | None = None
    by_token: Sequence[np.ndarray] | None = None
    normalised: bool = False
    curvature_norms: np.ndarray | None = None

    @property
    def fields(self) -> list[pa.Field]:
        wanted = {"token_scores": self.by_token, "module_scores": self.by_map}
        lists = [
            pa.field(name, pa.list_(pa.float32()), nullable=False)
            for name, shares in wanted.items()
            if shares is not None
        ]
        norms = [pa.field(name, pa.float32(), nullable=False) for name in CURVATURE_NORM]
        divided = [pa.field(name, pa.float32()) for name in list(NORMALISED)[: 2 + (self.curvature_norms is not None)]]
        return (norms if self.curvature_norms is not None else []) + lists + (divided if self.normalised else [])

    @property
    def metadata(self) -> dict[str, str]:
        names = {} if self.by_map is None else {"modules": json.dumps(self.modules)}
        return {field.name: (CURVATURE_NORM | SHARES | NORMALISED)[field.name] for field in self.fields} | names

    def columns(
        self, queries: np.ndarray, scores: np.ndarray, norms: np.ndarray | None, n_tokens: np.ndarray
    ) -> list[pa.Array]:
        """The columns of every pair of some queries, by query and then by document, from those queries' scores
        `[documents, queries]`. A score per unit of a norm of zero is null."""
        divisors, found = [n_tokens, *([] if norms is None else [norms])], []
        if self.curvature_norms is not None:
            divisors.append(np.asarray(self.curvature_norms, dtype=np.float32))
            found.append(pa.array(np.tile(divisors[-1], len(queries))))
        if self.by_token is not None:
            rows = [shares[query] for query in queries for shares in self.by_token]
            found.append(_lists(np.concatenate(rows or [np.zeros(0)]), [len(row) for row in rows]))
        if self.by_map is not None:
            shares = self.by_map[:, queries].transpose(1, 0, 2)
            found.append(_lists(shares.reshape(-1), [shares.shape[2]] * (shares.shape[0] * shares.shape[1])))
        for divisor in divisors if self.normalised else ():
            zero = np.tile(divisor == 0, len(queries))
            divided = (scores / np.where(divisor == 0, 1, divisor)[:, None]).T.reshape(-1)
            found.append(pa.array(divided.astype(np.float32), mask=zero))
        return found


def _lists(values: np.ndarray, lengths: Sequence[int]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values, dtype=np.float32)))


def stage_folder(run_dir: str | Path, stage: str) -> Path:
    return path_of(run_dir) / "scores" / f"stage={stage}"


def part_path(run_dir: str | Path, stage: str, block_id: str) -> Path:
    return stage_folder(run_dir, stage) / _part_name(block_id)


def part_files(run_dir: str | Path, stage: str) -> Iterator[tuple[str, Path]]:
    """`(block id, file)` of every finished part of the stage, in the order of block ids."""
    folder = stage_folder(run_dir, stage)
    for name in names_matching(folder, _part_name("*")):
        yield _block_of(name), folder / name


def done_blocks(run_dir: str | Path, stage: str) -> set[str]:
    """The ids of the blocks whose part is written."""
    return {_block_of(name) for name in names_matching(stage_folder(run_dir, stage), _part_name("*"))}


def _part_name(block_id: str) -> str:
    return f"part-{block_id}.parquet"


def _block_of(name: str) -> str:
    return name.removeprefix("part-").removesuffix(".parquet")


def write_part(
    path: str | Path,
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    scores: np.ndarray,
    norms: np.ndarray | None,
    n_tokens: Sequence[int],
    skipped: Iterable[tuple[str, str]],
    metadata: Mapping[str, str],
    details: Details | None = None,
    chosen: np.ndarray | None = None,
) -> None:
    """Writes one block's scores `[documents, queries]` as rows sorted by query id, then document order.

    A row group holds whole queries, and its statistics say which: whoever wants one query reads a small part. A block
    without rows has no row group.

    `norms` (None: they were not computed) and `n_tokens` are `[documents]`; `skipped` holds `(document id, reason)`;
    `metadata` is added to the file's own; `details` are columns beside the scores, and `chosen`
    `[documents, queries]` says which pairs to write (None: all). Raises ValueError for arrays of other shapes.
    """
    shape = (len(doc_ids), len(query_ids))
    norms = None if norms is None else np.asarray(norms, dtype=np.float32)
    tokens = np.asarray(n_tokens, dtype=np.int32)
    lengths = [len(each) for each in (norms, tokens) if each is not None]
    if scores.shape != shape or lengths != [shape[0]] * len(lengths):
        raise ValueError(f"scores {scores.shape}, norms and n_tokens {lengths} for {shape}")
    details = details or Details(())
    skips = {SKIPPED.decode(): json.dumps([list(skip) for skip in skipped])}
    schema = pa.schema([*SCORES_SCHEMA, *details.fields], {**UNITS, **details.metadata, **metadata, **skips})
    order = np.array(sorted(range(len(query_ids)), key=query_ids.__getitem__), dtype=np.int64)
    in_group = max(-(-GROUP_ROWS // max(1, len(doc_ids))), -(-len(order) // GROUPS), 1)
    with writing(path, schema, sorting_columns=[pq.SortingColumn(0)]) as writer:
        for start in range(0, len(order), in_group):
            some = order[start : start + in_group]
            columns = _columns([query_ids[query] for query in some], doc_ids, scores[:, some], norms, tokens)
            rows = pa.table([*columns, *details.columns(some, scores[:, some], norms, tokens)], schema)
            if chosen is not None:
                rows = rows.filter(pa.array(chosen[:, some].T.reshape(-1)))
            if len(rows):  # an empty row group is more than `datasets` can read
                writer.write_table(rows)


def _columns(
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    scores: np.ndarray,
    norms: np.ndarray | None,
    n_tokens: np.ndarray,
) -> list[pa.Array]:
    """The columns of every pair, by query and then by document."""
    queries, documents = (np.arange(len(ids), dtype=np.int32) for ids in (query_ids, doc_ids))
    return [
        pa.array(query_ids, pa.string()).take(pa.array(np.repeat(queries, len(documents)))),
        pa.array(doc_ids, pa.string()).take(pa.array(np.tile(documents, len(queries)))),
        pa.array(np.ascontiguousarray(scores.T, dtype=np.float32).reshape(-1)),
        pa.nulls(scores.size, pa.float32()) if norms is None else pa.array(np.tile(norms, len(queries))),
        pa.array(np.tile(n_tokens, len(queries))),
    ]


def write_skipped(run_dir: str | Path, stages: Iterable[str]) -> None:
    """Gathers the skipped documents of all parts of the stages into `skipped.parquet`, some at a time."""
    path = path_of(run_dir) / "skipped.parquet"
    rows = (
        {"doc_id": document, "reason": reason, "stage": stage}
        for stage in stages
        for found in in_order(skipped_of, (part for _, part in part_files(run_dir, stage)))
        for document, reason in found
    )
    with writing(path, SKIPPED_SCHEMA) as writer:
        while some := list(islice(rows, SKIPPED_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, SKIPPED_SCHEMA))


def skipped_of(path: Path) -> list[tuple[str, str]]:
    """`(document id, reason)` from a part's footer. Raises UserError for a file that is not a part."""
    with opened_part(path) as part:
        return [(document, reason) for document, reason in json.loads(part.schema_arrow.metadata[SKIPPED])]


def count_documents(path: Path, queries: int) -> int:
    """The documents of a part that has scores of them for each of so many queries, with those skipped. Raises UserError
    as `skipped_of` does."""
    with opened_part(path) as part:
        return int(part.metadata.num_rows) // queries + len(json.loads(part.schema_arrow.metadata[SKIPPED]))


def read_part(path: Path) -> pa.Table:
    """A part's rows, without the list columns of `detail`.

    Raises UserError for a file that is not a part, or is damaged.
    """
    with opened_part(path) as part:
        return _as_scores(part, part.read(columns=SCORES_SCHEMA.names), SCORES_SCHEMA.names)


def read_rows(
    path: Path, columns: Sequence[str] = tuple(SCORES_SCHEMA.names), also: Sequence[str] = ()
) -> Iterator[pa.Table]:
    """Some columns of a part's rows in their order, some rows at a time, with such columns of `also` as it has. Raises
    UserError as `read_part` does."""
    with opened_part(path) as part:
        wanted = [*columns, *(name for name in also if name in part.schema_arrow.names)]
        for group in range(part.num_row_groups):
            yield _as_scores(part, part.read_row_group(group, columns=wanted, use_threads=False), wanted)


def _as_scores(part: pq.ParquetFile, rows: pa.Table, columns: Sequence[str]) -> pa.Table:
    """The columns of a part, those of scores with their types here. Raises KeyError for one that is not there."""
    found = rows.select(list(columns))
    known = [SCORES_SCHEMA.field(each.name) if each.name in SCORES_SCHEMA.names else each for each in found.schema]
    return found.cast(pa.schema(known, part.schema_arrow.metadata))


@contextmanager
def opened_part(path: Path) -> Iterator[pq.ParquetFile]:
    """A part to be read. Raises UserError for a file that is not one, is damaged, or has another block's or entry's
    scores."""
    mend = "delete it, and its block is scored again"
    with opened(path, f"not a part of this run's scores, or damaged; {mend}") as part:
        check_place(path, part, {"name": path.parent.name.removeprefix("stage="), "block": _block_of(path.name)}, mend)
        yield part
