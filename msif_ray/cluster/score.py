"""The score driver: the corpus streams through Ray Data (read → score in an actor pool → Parquet).

A row of the stream is one block. Its scores are written as one Parquet file, named after the block,
by the actor that computed them: a block is all there or not at all, and none is there twice.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import ray

from msif_ray.cluster.jobs import ScoreJob, WindowScores
from msif_ray.cluster.rank import ModelSetup, Outcome
from msif_ray.cluster.replica import RankResources, Replica, free_ranks
from msif_ray.config import Cluster, Documents
from msif_ray.corpus.reader import Block, CorpusFile, read_file_blocks
from msif_ray.errors import UserError
from msif_ray.results.parts import done_blocks, part_path, write_part

Columns = dict[str, numpy.ndarray]


@dataclass(frozen=True)
class ScoreTask:
    """One stage's corpus to be scored against carried-back queries: those of each label, in one pass."""

    run_dir: str
    setup: ModelSetup
    job: ScoreJob
    files: tuple[CorpusFile, ...]
    documents: Documents
    key: str
    block_size: int
    queries: tuple[str, ...]
    labels: tuple[str, ...]
    metadata: dict[str, str]


def score(task: ScoreTask, cluster: Cluster, progress: Callable[[int, int, int], None]) -> None:
    """Scores every block that has no part yet. `progress` is told documents, tokens and skips of each block."""
    done = set.intersection(*(done_blocks(task.run_dir, label) for label in task.labels))
    resources = RankResources.of(cluster)
    _quiet_ray_data()
    files = [{"file": index} for index in range(len(task.files))]
    blocks = ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
        # One byte of memory tells the reader's resources from a replica's: were they the same, Ray Data would
        # fuse both into one task per file, and a corpus of one file would occupy one replica.
        BlockReader(task, frozenset(done)),
        batch_size=1,
        num_cpus=0,
        memory=1,
    )
    scored = blocks.map_batches(
        ScoreReplica,
        fn_constructor_args=(task, resources),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=cluster.replicas.min, max_size=cluster.replicas.max),
        **resources.actor,
    )
    try:
        for row in scored.iter_rows():
            progress(int(row["documents"]), int(row["tokens"]), int(row["skipped"]))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        free_ranks()


def _quiet_ray_data() -> None:
    """One block of ours is one block of Ray Data's, however small, so that blocks spread and are lost singly."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@dataclass(frozen=True)
class BlockReader:
    """From file numbers to the blocks of those files that are not done, streamed."""

    task: ScoreTask
    done: frozenset[str]

    def __call__(self, batch: Columns) -> Iterator[Columns]:
        task = self.task
        for index in batch["file"].tolist():
            for block in read_file_blocks(task.files, index, task.documents, task.block_size, task.key):
                if block.id not in self.done:
                    column = numpy.empty(1, dtype=object)
                    column[0] = block
                    yield {"block": column}


class ScoreReplica:
    """A replica in Ray Data's actor pool: scores a block and writes its part."""

    def __init__(self, task: ScoreTask, resources: RankResources) -> None:
        self._task = task
        self._replica = Replica(resources)
        self._replica.prepare(task.setup, task.job)

    def __call__(self, batch: Columns) -> Columns:
        block: Block = batch["block"][0]
        outcome, windows = self._replica.process_and_take(block)
        write_scores(self._task, block, outcome, windows)
        return {
            "documents": numpy.array([len(outcome.tokens)]),
            "tokens": numpy.array([sum(outcome.tokens.values())]),
            "skipped": numpy.array([len(outcome.skipped)]),
        }


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
