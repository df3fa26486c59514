"""Per-token scores and texts of each query's highest and lowest documents."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from msif_ray.cluster.fit import remaining
from msif_ray.cluster.jobs import TokenJob, WindowTokenScores
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.rank import Outcome
from msif_ray.cluster.score import ScoreTask
from msif_ray.corpus.reader import Block, Document, file_of_block, read_file_blocks
from msif_ray.corpus.windows import Skipped, encode
from msif_ray.results.top import TopPair

Row = dict[str, Any]


@dataclass(frozen=True)
class TopTask:
    """The pairs to show of one label's scores; `score` has that label alone."""

    score: ScoreTask
    pairs: Sequence[TopPair]


def top_rows(task: TopTask, pool: ReplicaPool, progress: Callable[[Outcome], None]) -> list[Row]:
    """One row per pair for `top.parquet`: its score, the document's text, tokens and per-token scores."""
    queries = {query: index for index, query in enumerate(task.score.queries)}
    wanted: dict[str, set[int]] = {}
    for pair in task.pairs:
        wanted.setdefault(pair.doc_id, set()).add(queries[pair.query_id])
    queries_of = {document: tuple(sorted(indices)) for document, indices in wanted.items()}
    stride = (task.score.setup.max_tokens or 1) - 1
    job = TokenJob(task.score.job.directions, queries_of, stride)
    texts: dict[str, str] = {}
    tokens: dict[str, list[str]] = {}
    scores: dict[tuple[str, int], list[float]] = {}
    setup = task.score.setup
    tokenizer = AutoTokenizer.from_pretrained(setup.tokenizer, trust_remote_code=False)
    for block, outcome, windows in pool.map(setup, job, remaining(lambda: _blocks(task))):
        for document in block.documents:
            encoded = encode(tokenizer, document, setup.append_eos)
            texts[document.id] = text_of(document)
            tokens[document.id] = [] if isinstance(encoded, Skipped) else [tokenizer.decode([i]) for i in encoded.ids]
        scores |= join_windows(windows, outcome.tokens)
        progress(outcome)
    return [
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
            "tokens": tokens[pair.doc_id],
            "token_scores": scores[pair.doc_id, queries[pair.query_id]],
        }
        for pair in task.pairs
    ]


def text_of(document: Document) -> str:
    """A scored document as one text: its prompt, where it has one, and its content."""
    return f"{document.prompt}{document.text}" if document.has_prompt else str(document.text)


def join_windows(windows: Sequence[WindowTokenScores], n_tokens: dict[str, int]) -> dict[tuple[str, int], list[float]]:
    """Token scores by (document, query), one for each of the document's tokens, from its windows'.

    Windows share one token, whose scores add; a window left out for want of targets counts zero.
    """
    joined: dict[tuple[str, int], list[float]] = {}
    for window in windows:
        by_token = joined.setdefault((window.document_id, window.query), [0.0] * n_tokens[window.document_id])
        for offset, value in enumerate(window.scores):
            by_token[window.start + offset] += value
    return joined


def _blocks(task: TopTask) -> Iterator[Block]:
    """The wanted documents, in blocks that are small enough to share among replicas."""
    wanted = {pair.block_id: set[str]() for pair in task.pairs}
    for pair in task.pairs:
        wanted[pair.block_id].add(pair.doc_id)
    score = task.score
    for file in sorted({file_of_block(block) for block in wanted}):
        for block in read_file_blocks(score.files, file, score.documents, score.block_size, score.key):
            if block.id in wanted:
                chosen = tuple(document for document in block.documents if document.id in wanted[block.id])
                yield Block(block.id, chosen)
