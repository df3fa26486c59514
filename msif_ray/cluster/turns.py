"""Who of a pool's replicas is asked what, in one pass over blocks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray

from msif_ray.cluster.ahead import Ahead
from msif_ray.cluster.jobs import Job
from msif_ray.cluster.rank import ModelSetup
from msif_ray.cluster.replica import Destination
from msif_ray.corpus.reader import Block


@dataclass(eq=False)
class Worker:
    """A replica, the step that it has said to be ready for (what it has summed belongs there), and the blocks that it
    has done in passes that see the same as `done_in`: the next of these may find what an earlier one kept. It
    `has_model` when it was ready for the last step, and is not still loading; `had_room` when it was lent last."""

    actor: Any
    has_model: bool = False
    had_room: bool = False
    ready_for: Destination | None = None
    done_in: object = None
    done: set[str] = field(default_factory=set)

    @property
    def id(self) -> str:
        return self.actor._actor_id.hex()


@dataclass
class Turn:
    """What a worker is asked, and where its answer will be: to get ready (no block), or to do a block."""

    worker: Worker
    ref: Any
    block: Block | None = None


@dataclass
class Pass:
    """What every replica does of a pass: `method` on each block, with the model of `setup`, for `destination`."""

    method: str
    setup: ModelSetup
    job: Job
    destination: Destination | None = None


class Turns:
    """One pass over blocks: workers are asked to get ready, and those that are get a block each as long as there are
    some. `seen` says what the pass sees of its blocks, where replicas may have kept that from an earlier pass."""

    def __init__(self, what: Pass, blocks: Iterable[Block], ahead: int, seen: object) -> None:
        self._what, self._seen = what, seen
        self._left = Ahead(iter(blocks), ahead)
        self._exhausted = False
        self._asked: dict[Any, Turn] = {}
        self._idle: list[Worker] = []
        self._alive: set[Worker] = set()
        self.ready = 0  # those that have been, dead ones among them

    @property
    def over(self) -> bool:
        return self._exhausted and all(turn.block is None for turn in self._asked.values())

    @property
    def alive(self) -> int:
        return len(self._alive)

    def prepare(self, worker: Worker) -> None:
        worker.has_model, worker.ready_for = False, None
        if worker.done_in != self._seen:  # blocks of another corpus have the same names
            worker.done_in, worker.done = self._seen, set()
        ref = worker.actor.prepare.remote(self._what.setup, self._what.job, self._what.destination)
        self._asked[ref] = Turn(worker, ref)

    def next(self, seconds: float) -> Turn | None:
        """A turn that has ended, in an answer or a death; None if none does within `seconds`."""
        done, _ = ray.wait(list(self._asked), num_returns=1, timeout=seconds)
        return self._asked.pop(done[0]) if done else None

    def prepared(self, worker: Worker) -> None:
        worker.has_model, worker.ready_for = True, self._what.destination
        self.ready += 1
        self._alive.add(worker)
        self._idle.append(worker)

    def done(self, worker: Worker) -> None:
        self._idle.append(worker)

    def lost(self, worker: Worker) -> None:
        self._alive.discard(worker)

    def hand_out(self) -> None:
        """Gives every idle worker a block."""
        while self._idle and not self._exhausted:
            worker = self._idle.pop()
            block = self._left.take(worker.done)
            self._exhausted = block is None
            if block is not None:
                ref = getattr(worker.actor, self._what.method).remote(block)
                self._asked[ref] = Turn(worker, ref, block)

    def cancel(self) -> None:
        """Takes back what has not begun, or a replica that comes later would load one step's model after another's."""
        for ref in self._asked:
            ray.cancel(ref)
