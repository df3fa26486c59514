"""The score task: a stage's corpus against carried-back queries, one Parquet file per block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy

from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.rank import ModelSetup
from msif_ray.cluster.score_jobs import DocumentScores, ScoreJob
from msif_ray.cluster.workers import ModelReplica
from msif_ray.config import Detail
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.candidates import ChosenFile, read_chosen
from msif_ray.corpus.reader import Block
from msif_ray.results.parts import Details, done_blocks, part_path, write_part


@dataclass(frozen=True)
class ScoreTask:
    """One stage's corpus to be scored against carried-back queries: those of each label, in one pass. `candidates`
    is the file that says which pairs (None: all)."""

    what: ClassVar[str] = "scores"

    run_dir: str
    setup: ModelSetup
    job: ScoreJob
    blocks: CorpusBlocks
    queries: tuple[str, ...]
    labels: tuple[str, ...]
    maps: tuple[str, ...]
    detail: Detail
    metadata: dict[str, str]
    candidates: ChosenFile | None = None

    @property
    def replica(self) -> type[ModelReplica]:
        return ModelReplica

    def done(self) -> set[str]:
        return set.intersection(*(done_blocks(self.run_dir, label) for label in self.labels))

    def write(self, block: Block, outcome: Outcome, taken: Sequence[DocumentScores]) -> None:
        write_scores(self, block, outcome, taken)


def write_scores(task: ScoreTask, block: Block, outcome: Outcome, documents: Sequence[DocumentScores]) -> None:
    """Writes a block's part of each label, in the corpus's order; several ranks may have a document's windows."""
    ids = list(outcome.tokens)
    places = {document: place for place, document in enumerate(ids)}
    table = numpy.zeros((len(ids), len(task.labels) * len(task.queries)))
    squares, in_curvature = numpy.zeros(len(ids)), numpy.zeros(len(ids))
    for document in documents:
        table[places[document.document_id]] += document.scores.numpy()
        squares[places[document.document_id]] += document.squared_norm
        in_curvature[places[document.document_id]] += document.squared_curvature_norm
    by_map, by_token = _shares(task, outcome, documents)
    chosen = None if task.candidates is None else read_chosen(task.candidates).pairs(block.id, ids, task.queries)
    count = len(task.queries)
    for index, label in enumerate(task.labels):
        own = slice(index * count, (index + 1) * count)
        write_part(
            part_path(task.run_dir, label, block.id),
            list(task.queries),
            ids,
            table[:, own],
            numpy.sqrt(squares) if task.detail.norm else None,
            list(outcome.tokens.values()),
            [(skip.document_id, skip.reason) for skip in outcome.skipped],
            task.metadata | {"stage": task.setup.stage, "name": label, "block": block.id},
            Details(
                task.maps,
                None if by_map is None else by_map[:, own],
                None if by_token is None else [shares[own] for shares in by_token],
                task.detail.normalised,
                numpy.sqrt(in_curvature) if task.detail.curvature_norm else None,
            ),
            chosen,
        )


def _shares(
    task: ScoreTask, outcome: Outcome, documents: Sequence[DocumentScores]
) -> tuple[numpy.ndarray | None, list[numpy.ndarray] | None]:
    """The scores by map, `[documents, queries, maps]`, and by token, `[queries, tokens]` of each document, where they
    are wanted, for the queries of all labels; a document's windows are added up."""
    places = {document: place for place, document in enumerate(outcome.tokens)}
    queries = len(task.labels) * len(task.queries)
    wanted = task.detail
    by_map = numpy.zeros((len(places), queries, len(task.maps))) if wanted.modules else None
    by_token = [numpy.zeros((queries, tokens)) for tokens in outcome.tokens.values()] if wanted.tokens else None
    for document in documents:
        place = places[document.document_id]
        if by_map is not None and document.by_map is not None:
            by_map[place] += document.by_map.numpy()
        if by_token is not None:
            for start, shares in document.by_token:
                by_token[place][:, start : start + shares.shape[1]] += shares
    return by_map, by_token
