"""The texts of each query's highest and lowest documents, and their scores by token and by map."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from transformers import AutoTokenizer

from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.score import ScoreTask
from msif_ray.cluster.score_jobs import TokenJob, WindowShares
from msif_ray.cluster.told import Progress
from msif_ray.corpus.blocks import ListedBlocks
from msif_ray.corpus.objectives import Frame, as_text, frame, framed
from msif_ray.corpus.pieces import pieces
from msif_ray.corpus.reader import Block, Document
from msif_ray.corpus.windows import Skipped
from msif_ray.fetch import local_tokenizer
from msif_ray.results.top import TopPair

Row = dict[str, Any]


@dataclass(frozen=True)
class TopTask:
    """The pairs to show of one label's scores; `score` has that label alone."""

    score: ScoreTask
    pairs: Sequence[TopPair]


def top_rows(task: TopTask, pool: ReplicaPool, progress: Progress) -> Iterator[Row]:
    """One row per pair for `top.parquet`: its score, whole, by token and by map, and the document's text and tokens.

    The pass is made at once and what it found kept as arrays; a row is made when it is asked for.
    """
    queries = {query: index for index, query in enumerate(task.score.queries)}
    wanted: dict[str, set[int]] = {}
    for pair in task.pairs:
        wanted.setdefault(pair.doc_id, set()).add(queries[pair.query_id])
    queries_of = {document: tuple(sorted(indices)) for document, indices in wanted.items()}
    setup, score_job = task.score.setup, task.score.job
    stride = (setup.max_tokens or 1) - 1
    job = TokenJob(score_job.directions, queries_of, stride, score_job.memory, tracked=task.score.maps)
    tokenizer = AutoTokenizer.from_pretrained(local_tokenizer(setup.tokenizer), trust_remote_code=False)
    documents: dict[str, Document] = {}
    tokens: dict[str, numpy.ndarray] = {}
    frames: dict[str, Frame] = {}
    shares: dict[tuple[str, int], JoinedShares] = {}
    for block, outcome, windows in pool.map(setup, job, ListedBlocks(_blocks(task)), progress):
        for document in block.documents:
            encoded = setup.encode(tokenizer, document)
            documents[document.id] = document
            frames[document.id] = frame(setup.objective, document, encoded)
            ids = () if isinstance(encoded, Skipped) else encoded.ids
            tokens[document.id] = numpy.array(ids, dtype=numpy.int32)
        shares |= join_windows(windows, outcome.tokens)
    return (
        {
            "stage": task.score.labels[0],
            "query_id": pair.query_id,
            "side": pair.side,
            "rank": pair.rank,
            "doc_id": pair.doc_id,
            "score": pair.score,
            "norm": pair.norm,
            "n_tokens": pair.n_tokens,
            "text": as_text(setup.objective, document, tokenizer),
            "tokens": framed(pieces(tokenizer, tokens[pair.doc_id].tolist()), frames[pair.doc_id]),
            "token_scores": share.by_token,
            "modules": task.score.maps,
            "module_scores": share.by_map,
        }
        | ({} if pair.curvature_norm is None else {"curvature_norm": pair.curvature_norm})
        for pair, share, document in (
            (pair, shares[pair.doc_id, queries[pair.query_id]], documents[pair.doc_id]) for pair in task.pairs
        )
    )


@dataclass(frozen=True)
class JoinedShares:
    """A document's score for one query by token, `[n_tokens]`, and by map, `[maps]`; both sum to it. In float32, as
    they are written: the driver has all of them at once."""

    by_token: numpy.ndarray
    by_map: numpy.ndarray


def join_windows(windows: Sequence[WindowShares], n_tokens: dict[str, int]) -> dict[tuple[str, int], JoinedShares]:
    """The shares of scores by (document, query), from those of the documents' windows.

    Windows share one token, whose scores add; a window left out for want of targets counts zero.
    """
    joined: dict[tuple[str, int], tuple[numpy.ndarray, numpy.ndarray]] = {}
    for window in windows:
        key = (window.document_id, window.query)
        if key not in joined:
            joined[key] = numpy.zeros(n_tokens[window.document_id]), numpy.zeros(len(window.by_map))
        by_token, by_map = joined[key]
        by_token[window.start : window.start + len(window.by_token)] += window.by_token
        by_map += window.by_map
    return {key: JoinedShares(*(part.astype(numpy.float32) for part in parts)) for key, parts in joined.items()}


def _blocks(task: TopTask) -> list[Block]:
    """The wanted documents, in blocks that are small enough to share among replicas."""
    wanted: dict[str, set[str]] = {}
    for pair in task.pairs:
        wanted.setdefault(pair.block_id, set()).add(pair.doc_id)
    found = task.score.blocks.left(task.score.blocks.ids - wanted.keys())
    return [
        Block(block.id, tuple(document for document in block.documents if document.id in wanted[block.id]))
        for block in found
    ]
