"""What a run writes, in bytes."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msif_ray import stages
from msif_ray.corpus.reader import Document
from msif_ray.influence.groups import Shapes
from msif_ray.plan import counts
from msif_ray.plan import solves as solving
from msif_ray.plan.estimate import Estimate, PartBytes
from msif_ray.preflight import Resolved
from msif_ray.record import MEANING
from msif_ray.results.parts import write_part

# Rows of a Parquet part that is written to see how many bytes one takes, at most.
ROWS_WRITTEN = 2**20


@dataclass(frozen=True)
class Stored:
    """What takes so many `bytes` on storage."""

    name: str
    bytes: float


def stored(estimate: Estimate) -> list[Stored]:
    """What the run writes; partial sums are what it writes at most at any time."""
    cluster, resolved = estimate.run.cluster, estimate.inputs.resolved
    factors = counts.stored_factor_bytes(estimate.shapes, estimate.itemsize)
    found = [Stored(f"factors of {estimate.run.stages[index].name}", factors) for index in estimate.fitted]
    sums = [estimate.largest(index, lambda shapes: _sums_bytes(estimate, shapes)) for index in estimate.fitted]
    if sums:
        ranks = cluster.replicas.max * cluster.ranks_per_replica
        found.append(Stored("partial sums, at most", 2 * ranks * max(sums)))
    for position, entry in enumerate(estimate.run.index):
        tally = estimate.inputs.tallies[f"index.{position}"]
        size = counts.index_bytes(estimate.shapes, tally.documents - tally.skipped, entry.rank, entry.dtype)
        found.append(Stored(f"index of {entry.stage}, at most", size))
    gradients = counts.gradient_bytes(estimate.shapes, estimate.inputs.tallies["queries"].positions, estimate.itemsize)
    found.append(Stored("query gradients", gradients))
    directions = counts.directions_bytes(estimate.directions())
    found += [Stored(f"query directions for {entry.label}", directions) for entry in estimate.run.score]
    if estimate.solves:
        memory, ranks = cluster.directions_memory, cluster.replicas.max
        kept = solving.stored_bytes(estimate.shapes, len(resolved.queries), memory, estimate.itemsize, ranks)
        found.append(Stored("conjugate gradients, at most", kept))
    for entries in stages.passes(estimate.run):
        seen = estimate.scored(entries)
        pairs = len(resolved.queries) * (seen.documents - seen.skipped)
        pairs = min(pairs, estimate.candidates_at_most(entries[0]) or pairs)
        rows = resolved.rows[f"score.{estimate.run.score.index(entries[0])}"]
        parts = sum(-(-each // cluster.documents_per_block) for each in rows)
        scores = parts * estimate.inputs.part.footer + pairs * estimate.inputs.part.pair
        detail = estimate.run.detail
        tokens = seen.tokens / max(1.0, seen.documents - seen.skipped)
        lists = tokens * detail.tokens + len(resolved.maps) * detail.modules + 2 * detail.normalised
        lists += detail.curvature_norm * (1 + detail.normalised)
        scores += 4.0 * pairs * lists
        found += [Stored(f"scores of {entry.label} (Parquet)", scores) for entry in entries]
    return found


def _sums_bytes(estimate: Estimate, shapes: Shapes) -> int:
    covariance = counts.covariance_bytes(shapes, estimate.itemsize)
    return max(covariance, counts.corrected_bytes(shapes, estimate.itemsize))


def part_bytes(resolved: Resolved, block: Sequence[Document]) -> PartBytes:
    """Measured on a block, and its first pair alone, with random scores: float32 does
    not compress."""
    run = resolved.run
    documents = [document.id for document in block]
    queries = [query.id for query in resolved.queries][: max(1, ROWS_WRITTEN // len(documents))]
    random = np.random.default_rng(0)
    scores, norms = random.standard_normal((len(documents), len(queries))), random.random(len(documents))
    tokens = random.integers(2, run.score[0].max_tokens or 512, len(documents), endpoint=True).tolist()
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.parquet"
        for d, q in ((1, 1), (len(documents), len(queries))):
            write_part(part, queries[:q], documents[:d], scores[:d, :q], norms[:d], tokens[:d], [], MEANING)
            sizes.append(part.stat().st_size)
    pair = (sizes[1] - sizes[0]) / max(1, len(documents) * len(queries) - 1)
    return PartBytes(sizes[0] - pair, pair)
