"""The queries' gradients: computed by the replicas in blocks that fit in memory, read back one query at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from msif_ray.cluster.jobs import LOG_LIKELIHOODS, QueryJob, query_parts
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.rank import ModelSetup
from msif_ray.cluster.told import Progress
from msif_ray.corpus.blocks import Blocks
from msif_ray.corpus.reader import Block, Document, block_id
from msif_ray.errors import UserError
from msif_ray.influence.groups import Shapes
from msif_ray.influence.queries import OTHER, QueryTokens

# A block of queries is a unit of work and of loss, and its gradients are in a rank's memory together: at most so
# many queries, and so many bytes of their tokens at all maps. A single query may take more.
QUERIES_PER_BLOCK = 8
BLOCK_BYTES = 2**30


def query_blocks(queries: Sequence[Document], lengths: Sequence[int], maps: Shapes, itemsize: int) -> list[Block]:
    """The queries in order in blocks whose gradients fit in `BLOCK_BYTES`; `lengths` in tokens."""
    per_token = _token_bytes(maps, itemsize)
    blocks: list[list[Document]] = []
    tokens = 0
    for query, length in zip(queries, lengths, strict=True):
        if not blocks or len(blocks[-1]) == QUERIES_PER_BLOCK or (tokens + length) * per_token > BLOCK_BYTES:
            blocks.append([])
            tokens = 0
        blocks[-1].append(query)
        tokens += length
    return [Block(block_id(0, number), tuple(block)) for number, block in enumerate(blocks)]


def largest_block(queries: Sequence[Document], lengths: Sequence[int], maps: Shapes, itemsize: int) -> int:
    """Bytes of the largest block's gradients."""
    of_query = {query.id: length for query, length in zip(queries, lengths, strict=True)}
    blocks = query_blocks(queries, lengths, maps, itemsize)
    return max(sum(of_query[query.id] for query in block.documents) for block in blocks) * _token_bytes(maps, itemsize)


def _token_bytes(maps: Shapes, itemsize: int) -> int:
    """An activation and an output gradient at every map."""
    return sum(out + columns for out, columns in maps.values()) * itemsize


def query_gradients(setup: ModelSetup, blocks: Blocks, step: Path, pool: ReplicaPool, progress: Progress) -> Coverage:
    """Every query's gradient at the last stage, written by the replicas that computed it."""
    return pool.accumulate(setup, QueryJob(), blocks, step, progress)


def log_likelihoods(gradients: Coverage, queries: Sequence[str]) -> dict[str, float]:
    """Each query's completion log-likelihood under the last stage's model, in nats, or how much larger it is than that
    of the completion that it is asked about rather than."""
    found = gradients.total(LOG_LIKELIHOODS)
    return {query: float(found[query]) for query in queries}


def in_order(gradients: Coverage, map_name: str, queries: Sequence[str]) -> Iterator[QueryTokens]:
    """Every query's gradient at one map, in the order of `queries`; one partial's are in memory at a time.

    A partial is one block of queries, and partials are in the order of their blocks.
    """
    left = iter(queries)
    for partial in gradients.partials:
        tensors = {name: tensor for part in partial.tensors(map_name) for name, tensor in part.items()}
        for _ in {name.partition("/")[2] for name in tensors}:
            query = next(left, "")
            parts = [names for window in (0, OTHER) if (names := query_parts(query, window))[0] in tensors]
            if not parts:
                raise UserError(
                    f"{partial.folder}: of other queries than this run's, or in another order; delete the folder "
                    f"{partial.folder.parent}, and run the same command again"
                )
            yield QueryTokens.of([QueryTokens(tensors.pop(a), tensors.pop(g)) for a, g in parts])
