"""The score task: a stage's corpus against carried-back queries, one Parquet file per block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy

from msif_ray.cluster.jobs import DocumentScores, ScoreJob
from msif_ray.cluster.rank import ModelSetup, Outcome
from msif_ray.cluster.stream import ModelReplica
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.reader import Block
from msif_ray.results.parts import done_blocks, part_path, write_part


class ScoreReplica(ModelReplica):
    """Scores blocks with the stage's model."""


@dataclass(frozen=True)
class ScoreTask:
    """One stage's corpus to be scored against carried-back queries: those of each label, in one pass."""

    what: ClassVar[str] = "scores"

    run_dir: str
    setup: ModelSetup
    job: ScoreJob
    blocks: CorpusBlocks
    queries: tuple[str, ...]
    labels: tuple[str, ...]
    metadata: dict[str, str]

    @property
    def replica(self) -> type[ScoreReplica]:
        return ScoreReplica

    def done(self) -> set[str]:
        return set.intersection(*(done_blocks(self.run_dir, label) for label in self.labels))

    def write(self, block: Block, outcome: Outcome, taken: Sequence[DocumentScores]) -> None:
        write_scores(self, block, outcome, taken)


def write_scores(task: ScoreTask, block: Block, outcome: Outcome, documents: Sequence[DocumentScores]) -> None:
    """Writes a block's part of each label, in the corpus's order; several ranks may have a document's windows."""
    ids = list(outcome.tokens)
    places = {document: place for place, document in enumerate(ids)}
    table = numpy.zeros((len(ids), len(task.labels) * len(task.queries)))
    squares = numpy.zeros(len(ids))
    for document in documents:
        table[places[document.document_id]] += document.scores.numpy()
        squares[places[document.document_id]] += document.squared_norm
    for index, label in enumerate(task.labels):
        write_part(
            part_path(task.run_dir, label, block.id),
            list(task.queries),
            ids,
            table[:, index * len(task.queries) : (index + 1) * len(task.queries)],
            numpy.sqrt(squares),
            list(outcome.tokens.values()),
            [(skip.document_id, skip.reason) for skip in outcome.skipped],
            task.metadata | {"stage": task.setup.stage, "name": label},
        )
