"""Per-token scores and texts of each query's highest and lowest documents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
from transformers import AutoTokenizer

from msif_ray.cluster.jobs import TokenJob, WindowTokenScores
from msif_ray.cluster.pool import Progress, ReplicaPool
from msif_ray.cluster.score import ScoreTask
from msif_ray.corpus.blocks import ListedBlocks
from msif_ray.corpus.reader import Block, Document
from msif_ray.corpus.windows import Skipped, encode
from msif_ray.fetch import local_tokenizer
from msif_ray.results.top import TopPair

Row = dict[str, Any]


@dataclass(frozen=True)
class TopTask:
    """The pairs to show of one label's scores; `score` has that label alone."""

    score: ScoreTask
    pairs: Sequence[TopPair]


def top_rows(task: TopTask, pool: ReplicaPool, progress: Progress) -> Iterator[Row]:
    """One row per pair for `top.parquet`: its score, the document's text, tokens and per-token scores.

    The pass is made at once and what it found kept as arrays; a row is made when it is asked for.
    """
    queries = {query: index for index, query in enumerate(task.score.queries)}
    wanted: dict[str, set[int]] = {}
    for pair in task.pairs:
        wanted.setdefault(pair.doc_id, set()).add(queries[pair.query_id])
    queries_of = {document: tuple(sorted(indices)) for document, indices in wanted.items()}
    setup, score_job = task.score.setup, task.score.job
    job = TokenJob(score_job.directions, queries_of, (setup.max_tokens or 1) - 1, score_job.memory)
    tokenizer = AutoTokenizer.from_pretrained(local_tokenizer(setup.tokenizer), trust_remote_code=False)
    texts: dict[str, str] = {}
    tokens: dict[str, numpy.ndarray] = {}
    scores: dict[tuple[str, int], numpy.ndarray] = {}
    for block, outcome, windows in pool.map(setup, job, ListedBlocks(_blocks(task)), progress):
        for document in block.documents:
            encoded = encode(tokenizer, document, setup.append_eos)
            texts[document.id] = text_of(document)
            ids = () if isinstance(encoded, Skipped) else encoded.ids
            tokens[document.id] = numpy.array(ids, dtype=numpy.int32)
        scores |= join_windows(windows, outcome.tokens)
    decode = cache(lambda token: tokenizer.decode([token]))
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
            "text": texts[pair.doc_id],
            "tokens": [decode(token) for token in tokens[pair.doc_id].tolist()],
            "token_scores": scores[pair.doc_id, queries[pair.query_id]],
        }
        for pair in task.pairs
    )


def text_of(document: Document) -> str:
    """A scored document as one text: its prompt, where it has one, and its content."""
    return f"{document.prompt}{document.text}" if document.has_prompt else str(document.text)


def join_windows(
    windows: Sequence[WindowTokenScores], n_tokens: dict[str, int]
) -> dict[tuple[str, int], numpy.ndarray]:
    """Token scores by (document, query), one for each of the document's tokens, from its windows'.

    Windows share one token, whose scores add; a window left out for want of targets counts zero.
    """
    joined: dict[tuple[str, int], numpy.ndarray] = {}
    for window in windows:
        key = (window.document_id, window.query)
        if key not in joined:
            joined[key] = numpy.zeros(n_tokens[window.document_id], dtype=numpy.float32)
        joined[key][window.start : window.start + len(window.scores)] += window.scores
    return joined


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
