"""A pool of replicas on Ray: blocks go to whichever is idle, those that die are replaced, new ones join in."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray

from msif_ray.cluster import partials
from msif_ray.cluster.deaths import DEATHS, answer
from msif_ray.cluster.jobs import FitJob, Job
from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.rank import ModelSetup
from msif_ray.cluster.replica import Destination, Replica
from msif_ray.cluster.room import RankResources, free_ranks, free_ranks_of
from msif_ray.cluster.told import Progress
from msif_ray.cluster.turns import Pass, Turns, Worker
from msif_ray.config import Cluster
from msif_ray.corpus.blocks import Blocks
from msif_ray.corpus.reader import Block
from msif_ray.errors import UserError, one_line

# Deaths per possible replica, with no block done between them, after which the job is at fault and not a machine.
MOST_DEATHS = 4
# Tries in a row with no block more done after them, after which the machines are not to blame: every replica writes
# its first block at once.
FRUITLESS_TRIES = 4
# How often somebody who waits for replicas is told so.
WAIT_SECONDS = 10.0
# How long a replica that is being started is waited for where there are others to lend.
START_SECONDS = 3.0


class ReplicaPool:
    """At most `replicas.max` replicas; those that the cluster has no room for yet wait, and join when it has.

    They are asked for when there is work: a run that has none left takes no machine.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._resources = RankResources.of(cluster)
        self._workers: list[Worker] = []
        self._deaths = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dismiss()

    @property
    def cluster(self) -> Cluster:
        return self._cluster

    def dismiss(self) -> None:
        """Ends all replicas, and gives their room back; the next work asks for it anew."""
        for worker in self._workers:
            ray.kill(worker.actor)
        if self._workers:
            free_ranks()
        self._workers = []

    def lend(self, progress: Progress) -> list[Any]:
        """The actors of those replicas that have started, `replicas.min` at least, for others to work with until this
        pool is used again. Those that wait for room are given up: whoever borrows asks for more. One that is at work
        on a block of a stream that broke off is lent before it has ended that: its borrower waits for it."""
        self._deaths = 0  # those that died while they were lent have done blocks, of which this pool is not told
        self._fill()
        refs = {worker.actor.release.remote(): worker for worker in self._workers}
        started, fewest = 0, self._cluster.replicas.min
        while refs:
            done, _ = ray.wait(list(refs), timeout=WAIT_SECONDS if started < fewest else START_SECONDS)
            if not done and started >= fewest:
                break
            if not done:
                progress.wait(self._wanted(started, fewest))
                continue
            worker, room = refs.pop(done[0]), False
            try:
                room = answer(done[0])
            except DEATHS as death:
                worker = self._replace(worker, death)
            worker.had_room = room
            if room:
                started += 1
            else:
                refs[worker.actor.release.remote()] = worker
        for worker in refs.values():
            if not worker.had_room:
                self._drop(worker)
        return [worker.actor for worker in self._workers]

    def idle(self) -> list[Any]:
        """The actors that have a model in their own process, and so PyTorch: for what is to be done between passes."""
        if self._resources.ranks > 1:
            return []
        return [worker.actor for worker in self._workers if worker.has_model]

    @property
    def ids(self) -> frozenset[str]:
        """The ids of the replicas' actors."""
        return frozenset(worker.id for worker in self._workers)

    def free_memory(self, setup: ModelSetup, job: Job, waiting: Callable[[str], None]) -> int:
        """Bytes that each rank has left with the stage's model loaded, on the first replica that is ready.

        Tells `waiting` what it waits for while there is none.
        """
        self._fill()
        refs = {worker.actor.prepare.remote(setup, job): worker for worker in self._workers}
        free: int | None = None
        while free is None:
            done, _ = ray.wait(list(refs), num_returns=1, timeout=WAIT_SECONDS)
            if not done:
                waiting(self._wanted(0, 1))
                continue
            worker = refs.pop(done[0])
            try:
                free = answer(done[0])
            except DEATHS as death:
                worker = self._replace(worker, death)
            if free is None:
                refs[worker.actor.prepare.remote(setup, job)] = worker
        for ref in refs:
            ray.cancel(ref)
        return free

    def accumulate(
        self, setup: ModelSetup, job: Job, blocks: Blocks, step: Path, progress: Progress, inputs: str = ""
    ) -> partials.Coverage:
        """Sums the job over all blocks into partials under `step`, and gives those that together cover every
        block once. Blocks that partials of the same `inputs` already cover are not done again; what dead replicas
        left uncovered is. Raises UserError where passes in a row leave no block more covered."""
        destination = Destination(step, inputs)
        found = partials.read_disjoint(step, inputs, setup.stage)
        progress.resume(sum(p.documents for p in found), sum(len(p.skipped) for p in found))
        tries = 0
        while left := blocks.ids - partials.covered_blocks(found):
            if tries == FRUITLESS_TRIES:
                raise UserError(
                    f"{step}: {tries} passes in a row over {len(left)} blocks left no partial sum of any here; see "
                    "that the storage lists what is written to it, or that replicas live, and run the command again"
                )
            undone = blocks.left(blocks.ids - left)
            for _, outcome in self._stream(Pass("accumulate", setup, job, destination), undone, progress):
                progress.add(len(outcome.tokens), sum(outcome.tokens.values()), len(outcome.skipped))
            self._commit(destination)
            found = partials.read_disjoint(step, inputs, setup.stage)
            tries = tries + 1 if left.isdisjoint(partials.covered_blocks(found)) else 0
        return partials.Coverage(tuple(found), blocks.ids)

    def map(
        self, setup: ModelSetup, job: Job, blocks: Blocks, progress: Progress
    ) -> Iterator[tuple[Block, Outcome, Any]]:
        """Each block with what the job gave for it, in the order in which they are done."""
        done: set[str] = set()
        while blocks.ids - done:
            for block, (outcome, taken) in self._stream(Pass("process", setup, job), blocks.left(done), progress):
                done.add(block.id)
                progress.add(len(outcome.tokens), sum(outcome.tokens.values()), len(outcome.skipped))
                yield block, outcome, taken

    def _stream(self, what: Pass, blocks: Iterable[Block], progress: Progress) -> Iterator[tuple[Block, Any]]:
        """One pass over the blocks, begun when `replicas.min` are ready. What a dead replica had is left out."""
        self._fill()
        fewest, job = self._cluster.replicas.min, what.job
        keeps = isinstance(job, FitJob) and not self._cluster.gpus_per_rank
        seen = (what.setup, job.sampled_labels, job.tracked) if keeps else None
        turns = Turns(what, blocks, 2 * len(self._workers) if keeps else 1, seen)
        for worker in self._workers:
            turns.prepare(worker)
        while not turns.over:
            if turns.ready < fewest:
                progress.wait(self._wanted(turns.ready, fewest))
            turn = turns.next(WAIT_SECONDS)
            if turn is None:
                continue
            try:
                result = answer(turn.ref)
            except DEATHS as death:
                turns.lost(turn.worker)
                turns.prepare(self._replace(turn.worker, death, turn.block))
                progress.alive(turns.alive)
                continue
            if turn.block is not None:
                self._deaths = 0
                turn.worker.done.add(turn.block.id)
                yield turn.block, result
                turns.done(turn.worker)
            elif result is not None:
                turns.prepared(turn.worker)
                progress.alive(turns.alive)
            else:  # no room yet
                turns.prepare(turn.worker)
            if turns.ready >= fewest:
                turns.hand_out()
        turns.cancel()

    def _commit(self, destination: Destination) -> None:
        """Writes what replicas have summed; a dead one's blocks stay uncovered and are done again."""
        ready = [worker for worker in self._workers if worker.ready_for == destination]
        refs = {worker.actor.commit.remote(destination): worker for worker in ready}
        for ref, worker in refs.items():
            try:
                answer(ref)
            except DEATHS as death:
                self._replace(worker, death)

    def _fill(self) -> None:
        """Asks for all replicas at once: what waits for room is the demand that an autoscaler sees."""
        while len(self._workers) < self._cluster.replicas.max:
            self._workers.append(self._spawn())

    def _wanted(self, ready: int, fewest: int) -> str:
        return f"{ready} of {fewest} replicas are ready; each takes {self._resources}"

    def _spawn(self) -> Worker:
        resources = self._resources
        return Worker(ray.remote(Replica).options(**resources.actor).remote(resources))

    def _replace(self, worker: Worker, death: Exception, block: Block | None = None) -> Worker:
        self._deaths += 1
        if self._deaths > MOST_DEATHS * self._cluster.replicas.max:
            during = f" (the last one while it did block {block.id})" if block is not None else ""
            raise UserError(
                f"cluster: replicas died {self._deaths} times without a block done in between{during}; if they ran "
                "out of memory, lower cluster.tokens_per_batch, cluster.factor_memory or cluster.directions_memory. "
                f"The last death: {one_line(death, 500)}"
            )
        self._drop(worker)
        replacement = self._spawn()
        self._workers.append(replacement)
        return replacement

    def _drop(self, worker: Worker) -> None:
        ray.kill(worker.actor)
        free_ranks_of(worker.id)
        self._workers.remove(worker)
