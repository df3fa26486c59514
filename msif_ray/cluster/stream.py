"""A corpus streamed through Ray Data: read → do in an actor pool → one file per block.

A row of the stream is one block. What comes of it is written as one file, named after the block, by the
actor that computed it: a block is all there or not at all, and none is there twice.
"""

import gc
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from time import monotonic
from typing import ClassVar, Protocol

import ray

from msif_ray.cluster.deaths import DEATHS, NoRoomError
from msif_ray.cluster.pool import FRUITLESS_TRIES, WAIT_SECONDS, ReplicaPool
from msif_ray.cluster.room import RankResources, free_ranks
from msif_ray.cluster.told import Progress
from msif_ray.cluster.workers import BlockReader, BlockReplica, ModelReplica
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.errors import UserError, one_line
from msif_ray.repeated import repeated

# Ray Data does not say which of its actors are alive: those are that have done a block within so many seconds.
ALIVE_SECONDS = 300.0

# For how long it is no news that no block is done.
QUIET_SECONDS = 30.0


class BlockTask(Protocol):
    """What is to be done with the blocks of a corpus. `what` names it in errors."""

    what: ClassVar[str]

    @property
    def blocks(self) -> CorpusBlocks: ...

    @property
    def replica(self) -> type[BlockReplica]:
        """The class that Ray Data's actor pool is made of; of a `ModelReplica`, the task is a `ModelTask`, too."""
        ...

    def done(self) -> set[str]:
        """The blocks whose files are written."""
        ...


def stream(task: BlockTask, pool: ReplicaPool, progress: Progress) -> None:
    """Does every block that has no file yet, with the pool's replicas where the task takes a model.

    Dead replicas are replaced, and lost blocks redone, while it lasts. Where it breaks off, because what was lost
    cannot be had again or a replica's place stays empty, it is begun anew over the blocks that are left.
    """
    quiet_ray_data()
    done = task.done()
    progress.resume(*_documents_done(task, done))
    tries = 0
    while left := task.blocks.ids - done:
        ended = _attempt(task, pool, frozenset(done), progress)
        # A stream that broke off keeps its replicas, and the room they take, as long as anything refers to it.
        gc.collect()
        if isinstance(ended, UserError):
            raise ended
        done = task.done()
        tries = tries + 1 if task.blocks.ids - done == left else 0
        if tries == FRUITLESS_TRIES:
            raise UserError(f"{task.what}: no block could be done on this cluster; what was lost last: {ended}")


def _attempt(task: BlockTask, pool: ReplicaPool, done: frozenset[str], progress: Progress) -> UserError | str | None:
    """One stream over the blocks that are not done: what the user is to mend, or what was lost, where it broke off.

    Given and not raised, because the exceptions of a stream refer to it.
    """
    try:
        _stream(task, pool, done, progress)
        return None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            # Ray Data puts lines of its own, on its retries, after ours.
            return UserError(str(error.cause).partition("\n")[0])
        if not isinstance(error.cause, (NoRoomError, *DEATHS)):
            raise
        return one_line(error, 500)
    except DEATHS as error:
        return one_line(error, 500)
    finally:
        free_ranks(living=pool.ids)


def _documents_done(task: BlockTask, done: set[str]) -> tuple[int, int]:
    """Documents in files that are there already, as far as block sizes tell."""
    blocks = task.blocks
    return blocks.count - sum(map(blocks.documents_in, blocks.ids - done)), 0


def _stream(task: BlockTask, pool: ReplicaPool, done: frozenset[str], progress: Progress) -> None:
    resources, replicas = RankResources.of(pool.cluster), pool.cluster.replicas
    if issubclass(task.replica, ModelReplica):
        lent, takes = pool.lend(progress), {"num_cpus": 0}
    else:
        pool.dismiss()  # it has the room that these need
        resources = resources.share
        # One that was lost gets a place when all other blocks are done: Ray Data ends those that are idle.
        lent, takes = [], resources.actor
    files = [{"file": index} for index in range(len(task.blocks.files))]
    blocks = ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
        # One byte of memory tells the reader's resources from a replica's: were they the same, Ray Data would
        # fuse both into one task per file, and a corpus of one file would occupy one replica.
        BlockReader(task.blocks, done),
        batch_size=1,
        # A file's reader costs nothing that Ray Data counts, so it would start one for every file, each a process.
        compute=ray.data.TaskPoolStrategy(size=min(len(files), replicas.max + 1)),
        num_cpus=0,
        memory=1,
    )
    finished = blocks.map_batches(
        task.replica,
        fn_constructor_args=([ray.put(task)], resources, lent),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=replicas.min, max_size=replicas.max),
        **takes,
    )
    seen = _Seen(resources)
    with _told_to_wait(progress, seen.silence):
        for row in finished.iter_rows():
            progress.alive(seen.block_of(str(row["replica"])))
            progress.add(int(row["documents"]), int(row["tokens"]), int(row["skipped"]))


class _Seen:
    """Which replicas have done a block and when: Ray Data says neither, and nothing while the cluster has no room."""

    def __init__(self, resources: RankResources) -> None:
        self._resources = resources
        self._by_replica: dict[str, float] = {}
        self._last = monotonic()
        self._longest = 0.0

    def block_of(self, replica: str) -> int:
        """Takes down that a replica has done a block; gives how many are alive."""
        now = monotonic()
        if self._by_replica:
            self._longest = max(self._longest, now - self._last)
        self._last = self._by_replica[replica] = now
        return sum(now - last < ALIVE_SECONDS for last in self._by_replica.values())

    def silence(self) -> str | None:
        """Why no block is done, where it takes longer than blocks did so far."""
        quiet = monotonic() - self._last
        if not self._by_replica:
            return f"no replica has done a block yet; each takes {self._resources}"
        if quiet < max(QUIET_SECONDS, 2 * self._longest):
            return None
        return (
            f"no block has been done for {quiet:.0f} s; where a replica was lost, another one needs room: "
            f"each takes {self._resources}"
        )


def _told_to_wait(progress: Progress, reason: Callable[[], str | None]) -> AbstractContextManager[None]:
    """Tells the reason for waiting now and then, while there is one."""

    def tell() -> None:
        if (why := reason()) is not None:
            progress.wait(why)

    return repeated(tell, WAIT_SECONDS)


def quiet_ray_data() -> None:
    """One block of ours is one block of Ray Data's, however small, so that blocks spread and are lost singly."""
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")  # or it starts a process to count what its users use
    # Nobody asks for the answers of an actor of its own that counts, and Ray prints a traceback where that is behind.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # a user's mistake arrives as itself
    # It logs a fault with its traceback, where ours is told in one line; and a handler that keeps that record keeps
    # the broken-off stream, and with it the replicas and their room.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
