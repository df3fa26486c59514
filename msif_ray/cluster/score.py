"""The score driver: the corpus streams through Ray Data (read → score in an actor pool → Parquet).

A row of the stream is one block. Its scores are written as one Parquet file, named after the block,
by the actor that computed them: a block is all there or not at all, and none is there twice.
"""

import gc
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

import numpy
import ray

from msif_ray.cluster.jobs import ScoreJob, WindowScores
from msif_ray.cluster.pool import WAIT_SECONDS, Progress
from msif_ray.cluster.rank import ModelSetup, Outcome
from msif_ray.cluster.replica import DEATHS, RankResources, Replica, free_ranks
from msif_ray.config import Cluster
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.reader import Block
from msif_ray.errors import UserError
from msif_ray.results.parts import done_blocks, part_path, write_part

# A block that kills the ranks this often is at fault itself.
RANK_RESTARTS = 4
# Streams begun in a row without a block scored, after which the machines are not to blame.
FRUITLESS_TRIES = 4

Columns = dict[str, numpy.ndarray]


@dataclass(frozen=True)
class ScoreTask:
    """One stage's corpus to be scored against carried-back queries: those of each label, in one pass."""

    run_dir: str
    setup: ModelSetup
    job: ScoreJob
    blocks: CorpusBlocks
    queries: tuple[str, ...]
    labels: tuple[str, ...]
    metadata: dict[str, str]


def score(task: ScoreTask, cluster: Cluster, progress: Progress) -> None:
    """Scores every block that has no part yet.

    Ray Data replaces dead replicas and redoes lost blocks by itself. Where it gives up, because what it lost
    cannot be had again, the stream is begun anew over the blocks that are left.
    """
    _quiet_ray_data()
    done = _done(task)
    progress.resume(*_documents_done(task, done))
    tries = 0
    while left := task.blocks.ids - done:
        ended = _attempt(task, cluster, frozenset(done), progress)
        # A stream that broke off keeps its replicas, and the room they take, as long as anything refers to it.
        gc.collect()
        if isinstance(ended, UserError):
            raise ended
        done = _done(task)
        tries = tries + 1 if task.blocks.ids - done == left else 0
        if tries == FRUITLESS_TRIES:
            raise UserError(f"scores: no block could be scored on this cluster; what was lost last: {ended}")


def _attempt(task: ScoreTask, cluster: Cluster, done: frozenset[str], progress: Progress) -> UserError | str | None:
    """One stream over the blocks that are not done: what the user is to mend, or what was lost, where it broke off.

    Given and not raised, because the exceptions of a stream refer to it.
    """
    try:
        _stream(task, cluster, done, progress)
        return None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            # Ray Data puts lines of its own, on its retries, after ours.
            return UserError(str(error.cause).partition("\n")[0])
        if not isinstance(error.cause, DEATHS):
            raise
        return _short(error)
    except DEATHS as error:
        return _short(error)
    finally:
        free_ranks()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _done(task: ScoreTask) -> set[str]:
    return set.intersection(*(done_blocks(task.run_dir, label) for label in task.labels))


def _documents_done(task: ScoreTask, done: set[str]) -> tuple[int, int]:
    """Documents in parts that are there already, as far as block sizes tell."""
    left = sum(task.blocks.documents_in(block) for block in task.blocks.ids - done)
    return task.blocks.count - left, 0


def _stream(task: ScoreTask, cluster: Cluster, done: frozenset[str], progress: Progress) -> None:
    resources = RankResources.of(cluster)
    files = [{"file": index} for index in range(len(task.blocks.files))]
    blocks = ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
        # One byte of memory tells the reader's resources from a replica's: were they the same, Ray Data would
        # fuse both into one task per file, and a corpus of one file would occupy one replica.
        BlockReader(task.blocks, done),
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
    with _told_to_wait(progress, f"no replica has scored a block yet; each takes {resources}") as begun:
        for row in scored.iter_rows():
            begun.set()
            progress.add(int(row["documents"]), int(row["tokens"]), int(row["skipped"]))


@contextmanager
def _told_to_wait(progress: Progress, reason: str) -> Iterator[Event]:
    """Tells the reason for waiting now and then until the event that it gives is set: Ray Data says nothing while
    the cluster has no room."""
    begun = Event()

    def tell() -> None:
        while not begun.wait(WAIT_SECONDS):
            progress.wait(reason)

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield begun
    finally:
        begun.set()
        teller.join()


def _quiet_ray_data() -> None:
    """One block of ours is one block of Ray Data's, however small, so that blocks spread and are lost singly."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # a user's mistake arrives as itself
    # It logs a fault with its traceback, where ours is told in one line; and a handler that keeps that record keeps
    # the broken-off stream, and with it the replicas and their room.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class BlockReader:
    """From file numbers to the blocks of those files that are not done, streamed."""

    blocks: CorpusBlocks
    done: frozenset[str]

    def __call__(self, batch: Columns) -> Iterator[Columns]:
        for index in batch["file"].tolist():
            for block in self.blocks.left_in(index, self.done):
                column = numpy.empty(1, dtype=object)
                column[0] = block
                yield {"block": column}


class ScoreReplica:
    """A replica in Ray Data's actor pool: scores a block and writes its part.

    It has room for its ranks when it begins, or Ray Data would give it blocks that others could do meanwhile. It
    loads with its first block: what fails in a block arrives as itself, in a constructor as a death without a cause.
    """

    def __init__(self, task: ScoreTask, resources: RankResources) -> None:
        self._task = task
        self._ready = False
        self._replica = Replica(resources)
        self._await_room()

    def __del__(self) -> None:
        self._replica.unload()  # or the ranks' room would stay taken when Ray Data drops the actor

    def __call__(self, batch: Columns) -> Columns:
        block: Block = batch["block"][0]
        outcome, windows = self._process(block)
        write_scores(self._task, block, outcome, windows)
        return {
            "documents": numpy.array([len(outcome.tokens)]),
            "tokens": numpy.array([sum(outcome.tokens.values())]),
            "skipped": numpy.array([len(outcome.skipped)]),
        }

    def _process(self, block: Block) -> tuple[Outcome, list[WindowScores]]:
        """The block's scores; ranks that die are started anew, here and not by Ray Data, which does not see them."""
        for _ in range(RANK_RESTARTS + 1):
            try:
                if not self._ready:
                    self._await_room()
                    self._replica.prepare(self._task.setup, self._task.job)
                    self._ready = True
                return self._replica.process(block)
            except DEATHS as death:
                lost = death
                self._ready = False
                self._replica.unload()
        raise lost

    def _await_room(self) -> None:
        while not self._replica.has_room():
            pass


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
