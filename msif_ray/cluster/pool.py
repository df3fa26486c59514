"""A pool of replicas on Ray: blocks go to whichever is idle, those that die are replaced, new ones join in."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import ray
from ray.exceptions import RayTaskError

from msif_ray.cluster import partials
from msif_ray.cluster.jobs import Job
from msif_ray.cluster.rank import ModelSetup, Outcome
from msif_ray.cluster.replica import DEATHS, RankResources, Replica, free_ranks, free_ranks_of
from msif_ray.config import Cluster
from msif_ray.corpus.blocks import Blocks
from msif_ray.corpus.reader import Block
from msif_ray.errors import UserError

# Deaths per possible replica, with no block done between them, after which the job is at fault and not a machine.
MOST_DEATHS = 4
# How often somebody who waits for replicas is told so.
WAIT_SECONDS = 10.0


class Progress(Protocol):
    """Told what is done: documents, their tokens and skipped documents."""

    def add(self, documents: int, tokens: int, skipped: int = 0) -> None: ...

    def resume(self, documents: int, skipped: int = 0) -> None:
        """What an earlier run of the same command had done."""
        ...

    def wait(self, reason: str) -> None:
        """Nothing is being done, for this reason."""
        ...


@dataclass(eq=False)
class _Worker:
    actor: Any

    @property
    def id(self) -> str:
        return self.actor._actor_id.hex()


@dataclass
class _Turn:
    """What a worker is asked: to get ready (no block), or to do a block."""

    worker: _Worker
    block: Block | None = None


class ReplicaPool:
    """At most `replicas.max` replicas; those that the cluster has no room for yet wait, and join when it has."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._resources = RankResources.of(cluster)
        self._workers: list[_Worker] = []
        self._deaths = 0

    def __enter__(self) -> Self:
        # All at once: what waits for room is the demand that an autoscaler sees.
        self._workers = [self._spawn() for _ in range(self._cluster.replicas.max)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)
        free_ranks()

    def free_memory(self, setup: ModelSetup, job: Job) -> int:
        """Bytes that each rank has left with the stage's model loaded, on the first replica that is ready."""
        refs = {worker.actor.prepare.remote(setup, job): worker for worker in self._workers}
        while True:
            (ref,), _ = ray.wait(list(refs), num_returns=1)
            worker = refs.pop(ref)
            try:
                free: int = _get(ref)
                break
            except DEATHS as death:
                replacement = self._replace(worker, death)
                refs[replacement.actor.prepare.remote(setup, job)] = replacement
        for waiting in refs:
            ray.cancel(waiting)
        return free

    def accumulate(
        self, setup: ModelSetup, job: Job, blocks: Blocks, step: Path, progress: Progress
    ) -> partials.Coverage:
        """Sums the job over all blocks into partials under `step`, and gives those that together cover every
        block once. Blocks that partials already cover are not done again."""
        found = partials.read_disjoint(step)
        progress.resume(sum(p.documents for p in found), sum(len(p.skipped) for p in found))
        while blocks.ids - partials.covered_blocks(found):
            done = partials.covered_blocks(found)
            for _, outcome in self._stream("accumulate", setup, job, blocks.left(done), progress, step):
                progress.add(len(outcome.tokens), sum(outcome.tokens.values()), len(outcome.skipped))
            self._commit(step)
            found = partials.read_disjoint(step)
        return partials.Coverage(tuple(found), blocks.ids)

    def map(
        self, setup: ModelSetup, job: Job, blocks: Blocks, progress: Progress
    ) -> Iterator[tuple[Block, Outcome, Any]]:
        """Each block with what the job gave for it, in the order in which they are done."""
        done: set[str] = set()
        while blocks.ids - done:
            for block, (outcome, taken) in self._stream("process", setup, job, blocks.left(done), progress):
                done.add(block.id)
                progress.add(len(outcome.tokens), sum(outcome.tokens.values()), len(outcome.skipped))
                yield block, outcome, taken

    def _stream(
        self, method: str, setup: ModelSetup, job: Job, blocks: Iterable[Block], progress: Progress, *arguments: Any
    ) -> Iterator[tuple[Block, Any]]:
        """One pass over the blocks, begun when `replicas.min` are ready. What a dead replica had is left out."""
        left = iter(blocks)
        turns = {worker.actor.prepare.remote(setup, job): _Turn(worker) for worker in self._workers}
        idle: list[_Worker] = []
        ready, fewest = 0, self._cluster.replicas.min
        exhausted = False
        while not exhausted or any(turn.block is not None for turn in turns.values()):
            if ready < fewest:
                progress.wait(f"{ready} of {fewest} replicas are ready; each takes {self._resources}")
            done, _ = ray.wait(list(turns), num_returns=1, timeout=WAIT_SECONDS)
            if not done:
                continue
            turn = turns.pop(done[0])
            try:
                result = _get(done[0])
            except DEATHS as death:
                replacement = self._replace(turn.worker, death, turn.block)
                turns[replacement.actor.prepare.remote(setup, job)] = _Turn(replacement)
                continue
            if turn.block is None:
                ready += 1
            else:
                self._deaths = 0
                yield turn.block, result
            idle.append(turn.worker)
            while ready >= fewest and idle and not exhausted:
                following = next(left, None)
                exhausted = following is None
                if following is not None:
                    worker = idle.pop()
                    turns[getattr(worker.actor, method).remote(following, *arguments)] = _Turn(worker, following)
        for waiting in turns:
            ray.cancel(waiting)  # or a replica that comes later would load one step's model after another's

    def _commit(self, step: Path) -> None:
        """Writes what replicas have summed; a dead one's blocks stay uncovered and are done again."""
        refs = {worker.actor.commit.remote(step): worker for worker in self._workers if _is_placed(worker)}
        for ref, worker in refs.items():
            try:
                _get(ref)
            except DEATHS as death:
                self._replace(worker, death)

    def _spawn(self) -> _Worker:
        resources = self._resources
        return _Worker(ray.remote(Replica).options(**resources.actor).remote(resources))

    def _replace(self, worker: _Worker, death: Exception, block: Block | None = None) -> _Worker:
        self._deaths += 1
        if self._deaths > MOST_DEATHS * self._cluster.replicas.max:
            during = f" (the last one while it did block {block.id})" if block is not None else ""
            reason = " ".join(str(death).split())[:500]
            raise UserError(
                f"cluster: replicas died {self._deaths} times without a block done in between{during}; if they ran "
                "out of memory, lower cluster.tokens_per_batch, cluster.factor_memory or cluster.directions_memory. "
                f"The last death: {reason}"
            )
        ray.kill(worker.actor)
        free_ranks_of(worker.id)
        self._workers.remove(worker)
        replacement = self._spawn()
        self._workers.append(replacement)
        return replacement


def _is_placed(worker: _Worker) -> bool:
    """Whether the cluster has had room for the replica; one that waits has nothing to commit."""
    return bool(ray.wait([worker.actor.__ray_ready__.remote()], timeout=5.0)[0])


def _get(ref: Any) -> Any:
    """What a replica gives. Raises what ended it, a rank's death as its own, and a user's mistake as such."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, (UserError, *DEATHS)):
            raise error.cause from None
        raise
