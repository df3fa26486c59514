"""Which training stage an answer comes from: each query's influence by stage, in nats that compare between stages.

A score is per unit of weight on a document inside its stage's mean loss L_j, where each of N_j documents weighs
1/N_j: leaving one out costs score/N_j nats of the completion's log-likelihood, whatever the stage. Over all
documents z of the stage

    supports_j = Σ_z max(score, 0) / N_j,   opposes_j = Σ_z min(score, 0) / N_j,   net_j = supports_j + opposes_j

and `share_j` = supports_j / Σ_k supports_k over the stages scored. Both sums are means over the corpus, so a random
sample of a stage's training data estimates them without bias.

Shares are of the support and not of the net: at the minimum of L_j the documents' gradients cancel, and net_j is
near zero for a stage that has converged, however much of it the completion rests on. What is left of the net says
rather how far the stage was from its minimum.

What a share does not say:

* It is not a part of the log-likelihood, and a first-order cost of single documents: leaving out a whole stage is not
  what it estimates.
* Noise counts, too: of scores around zero half support. A stage whose highest documents mean nothing has a share.
* It depends on the stages' damping and α, more than the order of documents within a stage does: a stage's scores
  grow as its damping falls, and all the more where most of its eigenvalues are below it.
* It is of the stages that were scored; others are not in the sum. Nor are scores without the curvature of their own
  stage (its response is the identity): products of gradients are no such nats, and have no row.
* Where only candidates are scored, what is not one counts as zero, and the stage's share is too small. Where the
  corpus scored was chosen rather than drawn (neighbours of the queries), say of how many documents with
  `score.<n>.out_of`, or the stage's share is too large.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from msif_ray.paths import path_of
from msif_ray.results.facts import Facts, Scored
from msif_ray.results.parts import UNITS
from msif_ray.tables import write_table

STAGES = "stages.parquet"

SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("query_id", pa.string()),
        ("documents_of", pa.string()),
        ("documents", pa.int64()),
        ("out_of", pa.int64()),
        ("supports", pa.float64()),
        ("opposes", pa.float64()),
        ("net", pa.float64()),
        ("share", pa.float64()),
        ("opposing_share", pa.float64()),
    ],
    metadata={
        "stage": "what the scores are called, as in the other tables; documents_of: the stage they belong to",
        "documents": "those with a score of the query; out_of: those of the corpus that could have one, N",
        "unit": "supports, opposes, net: nats of the completion's log-likelihood, sums of max(score, 0) / N, "
        "min(score, 0) / N and score / N over the documents",
        "sign": UNITS["sign"],
        "share": "of the supports of all stages scored with the same responses; null where no other stage is, for a "
        "second entry of one stage, and where no document supports. opposing_share: likewise of the opposes",
    },
)


Key = tuple[str, str]  # of a label and a query's id


@dataclass(frozen=True)
class Row:
    """One entry of `score` and one query, as `SCHEMA` says."""

    stage: str
    query_id: str
    documents_of: str
    documents: int
    out_of: int
    supports: float
    opposes: float
    share: float | None = None
    opposing_share: float | None = None

    @property
    def net(self) -> float:
        return self.supports + self.opposes


def by_stage(facts: Facts, statistics: Mapping[Key, Mapping[str, Any]]) -> dict[Key, Row]:
    """The rows of `stages.parquet` by label and query, from those of `statistics.parquet`: none where the documents of
    one stage alone are scored."""
    weighed = [scored for scored in facts.scored if scored.of_weight]
    if len({scored.stage for scored in weighed}) < 2:
        return {}
    compared = _compared(facts)
    rows: dict[Key, Row] = {}
    for query in facts.queries:
        found = {
            scored.label: _row(facts, scored, query.id, statistics[scored.label, query.id])
            for scored in weighed
            if (scored.label, query.id) in statistics
        }
        for labels in compared:
            found |= _with_shares([found[label] for label in labels if label in found])
        rows |= {(label, query.id): row for label, row in found.items()}
    return rows


def stages_beside(facts: Facts, label: str) -> list[str]:
    """The labels whose shares are taken together with those of `label`, or with its stage's: in training order."""
    entries = dict(zip([scored.label for scored in facts.scored], facts.run.score, strict=True))
    own = entries[label].responses
    found = next((labels for labels in _compared(facts) if entries[labels[0]].responses == own), [])
    return found if facts.scored_as(label).of_weight else []


def write_by_stage(run_dir: str | Path, rows: Iterable[Row]) -> None:
    """Writes `stages.parquet`."""
    table = [vars(row) | {"net": row.net} for row in rows]
    write_table(path_of(run_dir) / STAGES, pa.Table.from_pylist(table, SCHEMA))


def _compared(facts: Facts) -> list[list[str]]:
    """The labels of each set of entries whose shares sum to one, in training order.

    Entries with different `responses` answer different questions and are not compared. Of several entries of one
    stage (other documents, other candidates) the first takes part: they may well overlap.
    """
    sets: list[tuple[Any, dict[str, str]]] = []
    for scored, entry in zip(facts.scored, facts.run.score, strict=True):
        if not scored.of_weight:
            continue
        own = next((labels for responses, labels in sets if responses == entry.responses), None)
        if own is None:
            sets.append((entry.responses, own := {}))
        own.setdefault(scored.stage, scored.label)
    order = [stage.name for stage in facts.stages]
    return [[labels[name] for name in order if name in labels] for _, labels in sets if len(labels) > 1]


def _row(facts: Facts, scored: Scored, query: str, row: Mapping[str, Any]) -> Row:
    documents = row["documents"]
    out_of = facts.weighed(scored)
    supports, opposes = row["total_positive"] / out_of, row["total_negative"] / out_of
    return Row(scored.label, query, scored.stage, documents, out_of, supports, opposes)


def _with_shares(rows: list[Row]) -> dict[str, Row]:
    """By label; a share of nothing is null, and so is one where a query has scores in one stage alone."""
    if len(rows) < 2:
        return {}
    supports, opposes = sum(row.supports for row in rows), sum(row.opposes for row in rows)
    return {
        row.stage: Row(
            **vars(row)
            | {
                "share": row.supports / supports if supports else None,
                "opposing_share": row.opposes / opposes if opposes else None,
            }
        )
        for row in rows
    }
