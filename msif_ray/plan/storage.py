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
from msif_ray.plan.driver import blocks
from msif_ray.plan.estimate import Estimate
from msif_ray.plan.inputs import PartBytes
from msif_ray.preflight import Resolved
from msif_ray.record import MEANING
from msif_ray.results.parts import Details, write_part

# Rows, or values of their lists, of a Parquet part that is written to see how many bytes one takes, at most.
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
        groups = len(estimate.groups(estimate.run.stage_index(entry.stage)))
        documents = tally.documents - tally.skipped
        size = counts.index_bytes(estimate.shapes, documents, entry.rank, entry.dtype, estimate.itemsize, groups)
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
        seen, pairs = estimate.scored(entries), estimate.pairs(entries)
        part, parts, detail = estimate.inputs.part, blocks(estimate, entries), estimate.run.detail
        tokens = seen.tokens / max(1.0, seen.documents - seen.skipped)
        values = tokens * detail.tokens + len(resolved.maps) * detail.modules
        scores = parts * part.footer + pairs * (part.pair + values * part.value)
        found += [Stored(f"scores of {entry.label} (Parquet)", scores) for entry in entries]
    return found


def _sums_bytes(estimate: Estimate, shapes: Shapes) -> int:
    covariance = counts.covariance_bytes(shapes, estimate.itemsize)
    return max(covariance, counts.corrected_bytes(shapes, estimate.itemsize))


def part_bytes(resolved: Resolved, block: Sequence[Document]) -> PartBytes:
    """Measured on a block, and its first pair alone, with random scores: float32 does not compress. Lists have one
    value each there, and what more take is measured on the block with all of them."""
    run = resolved.run
    documents = [document.id for document in block]
    random = np.random.default_rng(0)
    tokens = random.integers(2, run.score[0].max_tokens or 512, len(documents), endpoint=True).tolist()
    values = run.detail.tokens * sum(tokens) + run.detail.modules * len(documents) * len(resolved.maps)
    most = ROWS_WRITTEN // max(len(documents), values)  # queries
    queries = [query.id for query in resolved.queries][: max(1, most)]
    sample = _Sample(resolved, queries, documents, tokens)
    pairs = len(documents) * len(queries)
    first, short = sample.size(1, 1, False), sample.size(len(documents), len(queries), False)
    lists = (run.detail.tokens + run.detail.modules) * pairs
    more = values * len(queries) - lists
    value = (sample.size(len(documents), len(queries), True) - short) / more if more else 0.0
    pair = (short - first) / max(1, pairs - 1)
    return PartBytes(first - pair, pair - value * lists / pairs, value)


@dataclass(frozen=True)
class _Sample:
    """A part as the run writes them, of some queries and `documents` with so many `tokens`, its numbers random."""

    resolved: Resolved
    queries: list[str]
    documents: list[str]
    tokens: list[int]

    def size(self, documents: int, queries: int, long: bool) -> int:
        """Bytes of the first so many; `long`: with a value for every token and map, else with one of each."""
        random, detail = np.random.default_rng(0), self.resolved.run.detail
        tokens, maps = self.tokens[:documents], tuple(self.resolved.maps)
        scores, norms = random.standard_normal((documents, queries)), random.random(documents)
        by_map = random.standard_normal((documents, queries, len(maps) if long else 1))
        details = Details(
            maps,
            by_map if detail.modules else None,
            [random.standard_normal((queries, n if long else 1)) for n in tokens] if detail.tokens else None,
            detail.normalised,
            random.random(documents) if detail.curvature_norm else None,
        )
        with tempfile.TemporaryDirectory() as folder:
            part, ids = Path(folder) / "part.parquet", (self.queries[:queries], self.documents[:documents])
            write_part(part, *ids, scores, norms, tokens, [], MEANING, details)
            return part.stat().st_size
