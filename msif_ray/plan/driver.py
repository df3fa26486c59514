"""What the driver takes beside what it has once the run is checked: it grows with blocks, top documents, candidates."""

from collections.abc import Sequence

from msif_ray import stages
from msif_ray.config import Score
from msif_ray.plan.estimate import Estimate

# Of each block while it streams: what Ray Data keeps of its tasks until the stream ends (statistics, some 2 KB), the
# block's name in those that are done and those that are left (115 bytes each). Over 1,300 blocks of files of 12, 2.6 KB
# were found; of files of 100, 40 MB for the first 2,000 and nothing for the next 400.
BLOCK_BYTES = 4 * 2**10
# Of a top document of one query, beside its shares by token and by map (float32), and of each document: objects, and
# by token its text and the number of the token.
PAIR_BYTES, DOCUMENT_BYTES, TOKEN_BYTES = 600, 1000, 9
# Of a pair that is a candidate, and of every word of the corpus while BM25 chooses candidates.
CANDIDATE_BYTES, WORD_BYTES = 53, 22


def growth(estimate: Estimate) -> float:
    """Bytes at most of any of the passes over documents that are scored."""
    passes = stages.passes(estimate.run)
    found = [_streamed(estimate, entries) for entries in passes] + [_chosen(estimate, entries) for entries in passes]
    return max([*found, *(_top(estimate, entry) for entry in estimate.run.score)], default=0.0)


def blocks(estimate: Estimate, entries: Sequence[Score]) -> int:
    """The blocks of a pass, each of which is a part of the scores, were none left out."""
    rows = estimate.inputs.resolved.rows[f"score.{estimate.run.score.index(entries[0])}"]
    return sum(-(-each // estimate.run.cluster.documents_per_block) for each in rows)


def _streamed(estimate: Estimate, entries: Sequence[Score]) -> float:
    return BLOCK_BYTES * blocks(estimate, entries) + CANDIDATE_BYTES * (estimate.candidates_at_most(entries[0]) or 0)


def _chosen(estimate: Estimate, entries: Sequence[Score]) -> float:
    """While BM25 chooses; a word is a token, of the longest tokens."""
    chosen = entries[0].candidates
    if chosen is None or chosen.path is not None:
        return 0.0
    return WORD_BYTES * estimate.inputs.tallies[f"score.{estimate.run.score.index(entries[0])}"].tokens


def _top(estimate: Estimate, entry: Score) -> float:
    """The documents at both ends of each query, with their shares, until they are written."""
    entries = next(entries for entries in stages.passes(estimate.run) if entry in entries)
    tally = estimate.scored(entries)
    scored = max(1.0, tally.documents - tally.skipped)
    pairs = len(estimate.inputs.resolved.queries) * min(scored, 2 * estimate.run.top)
    tokens = tally.tokens / scored
    shares = pairs * (PAIR_BYTES + 4 * (tokens + len(estimate.shapes)))
    return shares + min(scored, pairs) * (DOCUMENT_BYTES + TOKEN_BYTES * tokens)
