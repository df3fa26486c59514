"""A pool of replicas on Ray: blocks go to whichever is idle, and one that dies is replaced."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from msif_ray.cluster import partials
from msif_ray.cluster.jobs import Job
from msif_ray.cluster.rank import ModelSetup, Outcome
from msif_ray.cluster.replica import RankResources, Replica, free_ranks
from msif_ray.config import Cluster
from msif_ray.corpus.reader import Block
from msif_ray.errors import UserError

# A replica that dies loses at most the work of this long.
COMMIT_SECONDS = 120.0
# Deaths in one pool's life after which something is wrong with the job rather than with a machine.
MOST_DEATHS = 16

Blocks = Callable[[set[str]], Iterable[Block]]
"""From the blocks that are done to those that are left, in order."""


@dataclass(eq=False)
class _Worker:
    actor: Any
    committed: float = field(default_factory=monotonic)


class ReplicaPool:
    """Up to `replicas.max` replicas, whichever of them the cluster can place."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._workers: list[_Worker] = []
        self._deaths = 0

    def __enter__(self) -> Self:
        self._workers = [self._spawn() for _ in range(self._cluster.replicas.max)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)
        free_ranks()

    def accumulate(
        self, setup: ModelSetup, job: Job, blocks: Blocks, folder: Path, progress: Callable[[Outcome], None]
    ) -> list[partials.Partial]:
        """Sums the job over all blocks into partial files, and gives those that together cover every
        block once. Blocks that partials already cover are not done again."""
        while True:
            found = partials.read_disjoint(folder)
            left = iter(blocks(partials.covered_blocks(found)))
            first = next(left, None)
            if first is None:
                return found
            for worker, _, outcome in self._stream("process", setup, job, _after(first, left)):
                progress(outcome)
                if monotonic() - worker.committed > COMMIT_SECONDS:
                    self._commit([worker], folder)
            self._commit(self._workers, folder)

    def map(self, setup: ModelSetup, job: Job, blocks: Blocks) -> Iterator[tuple[Block, Outcome, Any]]:
        """Each block with what the job gave for it, in the order in which they are done."""
        done: set[str] = set()
        while True:
            left = iter(blocks(done))
            first = next(left, None)
            if first is None:
                return
            for _, block, (outcome, taken) in self._stream("process_and_take", setup, job, _after(first, left)):
                done.add(block.id)
                yield block, outcome, taken

    def _stream(
        self, method: str, setup: ModelSetup, job: Job, blocks: Iterable[Block]
    ) -> Iterator[tuple[_Worker, Block, Any]]:
        """One pass over the blocks. What a dead replica had is left out; its replacement goes on."""
        left = iter(blocks)
        pending: dict[Any, tuple[_Worker, Block | None]] = {}
        for worker in self._workers:
            pending[worker.actor.prepare.remote(setup, job)] = (worker, None)
        exhausted = False
        while pending and not (exhausted and all(block is None for _, block in pending.values())):
            (ref,), _ = ray.wait(list(pending), num_returns=1)
            worker, block = pending.pop(ref)
            try:
                result = self._get(ref)
            except (ActorDiedError, ActorUnavailableError) as death:
                worker = self._replace(worker, death)
                pending[worker.actor.prepare.remote(setup, job)] = (worker, None)
                continue
            if block is not None:
                yield worker, block, result
            following = next(left, None)
            if following is None:
                exhausted = True
            else:
                pending[getattr(worker.actor, method).remote(following)] = (worker, following)

    def _commit(self, workers: Iterable[_Worker], folder: Path) -> None:
        """Writes what replicas have summed; a dead one's blocks stay uncovered and are done again."""
        for worker in list(workers):
            try:
                if self._is_placed(worker):
                    self._get(worker.actor.commit.remote(folder))
                    worker.committed = monotonic()
            except (ActorDiedError, ActorUnavailableError) as death:
                self._replace(worker, death)

    def _is_placed(self, worker: _Worker) -> bool:
        """Whether the cluster has had room for the replica; one that waits has nothing to commit."""
        return bool(ray.wait([worker.actor.__ray_ready__.remote()], timeout=5.0)[0])

    def _get(self, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            if isinstance(error.cause, ActorDiedError | ActorUnavailableError):
                raise error.cause from None  # a rank of the replica died
            raise

    def _spawn(self) -> _Worker:
        resources = RankResources.of(self._cluster)
        return _Worker(ray.remote(Replica).options(**resources.actor).remote(resources))

    def _replace(self, worker: _Worker, death: Exception) -> _Worker:
        self._deaths += 1
        if self._deaths > MOST_DEATHS:
            raise UserError(f"replicas died {self._deaths} times; the last one: {' '.join(str(death).split())}")
        ray.kill(worker.actor)
        self._workers.remove(worker)
        replacement = self._spawn()
        self._workers.append(replacement)
        return replacement


def _after(first: Block, rest: Iterator[Block]) -> Iterator[Block]:
    yield first
    yield from rest
