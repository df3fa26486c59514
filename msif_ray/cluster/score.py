"""The score task: a stage's corpus against carried-back queries, one Parquet file per block."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy

from msif_ray.cluster.jobs import ScoreJob, WindowScores
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

    def write(self, block: Block, outcome: Outcome, taken: Sequence[WindowScores]) -> None:
        write_scores(self, block, outcome, taken)


def write_scores(task: ScoreTask, block: Block, outcome: Outcome, windows: Sequence[WindowScores]) -> None:
    """Writes a block's part of each label: windows summed into documents, in the corpus's order."""
    scores: dict[str, numpy.ndarray] = defaultdict(lambda: numpy.zeros(len(task.labels) * len(task.queries)))
    squares: dict[str, float] = defaultdict(float)
    for window in sorted(windows, key=lambda window: (window.document_id, window.window)):
        scores[window.document_id] += window.scores.numpy()
        squares[window.document_id] += window.squared_norm
    ids = list(outcome.tokens)
    shape = (len(ids), len(task.labels), len(task.queries))
    table = numpy.array([scores[document] for document in ids]).reshape(shape)
    for index, label in enumerate(task.labels):
        write_part(
            part_path(task.run_dir, label, block.id),
            list(task.queries),
            ids,
            table[:, index],
            numpy.sqrt([squares[document] for document in ids]),
            list(outcome.tokens.values()),
            [(skip.document_id, skip.reason) for skip in outcome.skipped],
            task.metadata | {"stage": task.setup.stage, "name": label},
        )
