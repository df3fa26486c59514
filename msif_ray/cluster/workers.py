"""What the processes of a stream are: one that reads, and those that hand blocks to replicas.

They import no PyTorch, which would take them longer than their work: nor may a subclass of `ModelReplica` that Ray
Data is to make actors of be in a module that does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import numpy
import ray

from msif_ray.cluster.deaths import DEATHS, NoRoomError, answer
from msif_ray.cluster.replica import Borrower, Replica
from msif_ray.cluster.room import RankResources, free_ranks_of
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.reader import Block

Columns = dict[str, numpy.ndarray]

# A block that ends its replica this often is at fault itself.
RESTARTS = 4

# How long the place of a lost replica may stay empty before the stream is begun anew with the others. Ray Data gives
# an actor's blocks to no other one, so they wait as long as it does, which costs nothing while the others have work;
# a new beginning costs each of them a block at most, and those that were started meanwhile the load of the model. A
# process starts within seconds, and a machine that is to come at all mostly within minutes.
UNFILLED_SECONDS = 300.0


@dataclass(frozen=True)
class Counted:
    """What a block held, and the id of the replica that did it."""

    documents: int
    tokens: int
    skipped: int
    replica: str = ""


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


class BlockReplica(ABC):
    """An actor of Ray Data's pool: does a block and writes its file.

    It is made from a reference to the stream's task (in a list, or Ray would put the task in its place), a replica's
    resources and the replicas lent to all such actors. What may fail is for `do`: it arrives as itself from there, from
    a constructor as a death without a cause.
    """

    def __call__(self, batch: Columns) -> Columns:
        counted = replace(self.do(batch["block"][0]), replica=ray.get_runtime_context().get_actor_id() or "")
        return {name: numpy.array([value]) for name, value in vars(counted).items()}

    @abstractmethod
    def do(self, block: Block) -> Counted: ...


class ModelReplica(BlockReplica):
    """Has a `ModelTask` done by a replica that it has to itself: one of the lent ones, or else one that it starts.

    It asks Ray for nothing: the replica has the room, or waits for it, which is the demand that an autoscaler sees.
    Its replica has room when this actor begins, or Ray Data would give it blocks that others could do meanwhile. It
    loads with the first block. Where it has blocks and its replica is lost, it waits UNFILLED_SECONDS for the room of
    another, and raises NoRoomError.
    """

    def __init__(self, task: list[Any], resources: RankResources, lent: list[Any]) -> None:
        self._task, self._resources = task[0], resources
        self._begun = False
        self._own: Any = None
        self._replica = _borrowed(lent) or self._start()
        # Where Ray has restarted this actor, it has blocks.
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._surviving(lambda: self._await_room(UNFILLED_SECONDS if restarted else None))

    def __del__(self) -> None:
        self._end_own()  # or its ranks' room would stay taken when Ray Data drops this actor

    def do(self, block: Block) -> Counted:
        return Counted(*self._surviving(lambda: self._process(block)))

    def _process(self, block: Block) -> tuple[int, int, int]:
        while not self._begun:
            self._await_room(UNFILLED_SECONDS)
            self._begun = answer(self._replica.begin.remote(self._task))
        done: tuple[int, int, int] = answer(self._replica.do.remote(block))
        return done

    def _surviving(self, work: Callable[[], Any]) -> Any:
        """What `work` gives. A replica that dies meanwhile, or loses ranks, is replaced here and not by Ray Data, which
        does not see it."""
        for _ in range(RESTARTS + 1):
            try:
                return work()
            except DEATHS as death:
                lost = death
                self._begun = False
                ray.kill(self._replica)
                free_ranks_of(_id(self._replica))
                self._replica = self._start()
        raise lost

    def _await_room(self, seconds: float | None) -> None:
        until = None if seconds is None else monotonic() + seconds
        while True:
            asked = self._replica.has_room.remote()
            if not ray.wait([asked], timeout=None if until is None else max(0.0, until - monotonic()))[0]:
                self._end_own()  # or this process, where it is to end, would wait for its answer
                raise NoRoomError(f"no room for another replica of {self._resources} in {seconds:.0f} s")
            if answer(asked):
                return

    def _start(self) -> Any:
        self._own = ray.remote(Replica).options(**self._resources.actor).remote(self._resources)
        return self._own

    def _end_own(self) -> None:
        if self._own is not None:
            ray.kill(self._own)
            free_ranks_of(_id(self._own))
            self._own = None


def _borrowed(lent: list[Any]) -> Any:
    """One of the lent replicas, this actor's from now on: one that nobody has, or that it had itself before Ray
    restarted it, or else whose borrower is dead.

    All are asked at once, since one at work answers after its block, and one without work need not wait for that.
    """
    current, taken = Borrower.current(), []
    asked = {actor.borrower.remote(): actor for actor in lent}
    while asked:
        (ref,), _ = ray.wait(list(asked), num_returns=1)
        actor = asked.pop(ref)
        with suppress(*DEATHS):
            holder = answer(ref)
            if holder in (None, current) and answer(actor.lend.remote(current)):
                return actor
            taken.append((actor, holder))
    for actor, holder in taken:
        with suppress(*DEATHS):
            if holder is not None and not holder.is_alive() and answer(actor.lend.remote(current, holder)):
                return actor
    return None


def _id(actor: Any) -> str:
    found: str = actor._actor_id.hex()
    return found
