"""A replica: one copy of a stage's model, in this process or sharded over several rank actors.

PyTorch comes with the first model: whoever is given a replica's handle imports this module, and most hand blocks on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from math import sqrt
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from msif_ray.cluster.deaths import DEATHS, RankLostError
from msif_ray.cluster.room import RankResources, meeting_point, reserve
from msif_ray.corpus.reader import Block
from msif_ray.errors import UserError

if TYPE_CHECKING:
    from msif_ray.cluster.jobs import Job
    from msif_ray.cluster.outcomes import Counts, Outcome
    from msif_ray.cluster.rank import ModelSetup, Rank

# A replica commits when it has worked this many times as long as its last commit took: a hundredth of its time goes
# into commits, and a death loses as little as that allows.
COMMIT_EVERY = 100.0
# Commits that take seconds are due sooner than that: when what they cost and what a death would lose are least
# together, after √(2 · a commit's time · a replica's life) (Young 1974). One of 10 s every 380 s.
LIFE_SECONDS = 7200.0
# However long a commit takes, a death loses no more than this many seconds of work.
COMMIT_SECONDS = 900.0
# How long a replica waits for room before it says that it has none yet, and may be told of another step.
ROOM_SECONDS = 5.0
# How long a borrower that is not known to be dead has to say that it is alive; it may be in the middle of a block.
ANSWER_SECONDS = 2.0


@dataclass(frozen=True)
class Destination:
    """Where a step's partial sums go, and by what beside the run they are computed (`inputs`: checksums)."""

    folder: Path
    inputs: str = ""


@dataclass(frozen=True)
class Borrower:
    """An actor by its id, and its handle pickled: made whole it would import what the actor's class is of."""

    id: str
    handle: bytes = field(compare=False)

    @classmethod
    def current(cls) -> "Borrower":
        """The actor that this process is."""
        context = ray.get_runtime_context()
        return cls(context.get_actor_id() or "", ray.cloudpickle.dumps(context.current_actor))

    def is_alive(self) -> bool:
        """Whether it lives, or may: a dead one's end is known to Ray, a busy one's answer is late."""
        ref = ray.cloudpickle.loads(self.handle).__ray_ready__.remote()
        answered, _ = ray.wait([ref], timeout=ANSWER_SECONDS)
        try:
            ray.get(answered)
        except DEATHS:
            return False
        return True


class ModelTask(Protocol):
    """What a stage's model is to do with the blocks of a corpus: its job sees a block's captured batches, and `write`
    what that gave."""

    @property
    def setup(self) -> "ModelSetup": ...

    @property
    def job(self) -> "Job": ...

    def write(self, block: Block, outcome: "Outcome", taken: Any) -> None: ...


class Replica:
    """Processes blocks with one model. A plain class: the pool makes actors of it, and lends them to streams."""

    def __init__(self, resources: RankResources) -> None:
        self._resources = resources
        self._setup: ModelSetup | None = None
        self._local: Rank | None = None
        self._remote: list[Any] = []
        self._group: PlacementGroup | None = None
        self._destination: Destination | None = None
        self._sums = _Committed()
        self._by_block = False
        self._borrower: Borrower | None = None
        self._task: ModelTask | None = None

    def has_room(self) -> bool:
        """Whether there is room for the ranks; asks for it, and waits a little. One rank has its actor's own."""
        if self._resources.ranks == 1:
            return True
        if self._group is None:
            self._group = reserve(self._resources)
        return self._group.wait(ROOM_SECONDS)

    def prepare(self, setup: "ModelSetup", job: "Job", destination: Destination | None = None) -> int | None:
        """Loads the stage's model unless it is loaded, and starts the job; gives a rank's free memory in bytes.

        None where there is no room for the ranks yet: to be asked again, if the step is still under way by then.
        """
        if setup != self._setup:
            if self._setup is not None or self._remote:
                self.unload()
            if not self.has_room():
                return None
            self._load(setup)
        from msif_ray.cluster.jobs import QueryJob

        self._sums, self._destination = _Committed(), destination
        self._by_block = isinstance(job, QueryJob)
        self._on_ranks("start", job)
        return min(self._on_ranks("free_memory"))

    def release(self) -> bool:
        """Takes back what was lent; gives whether there is room for the ranks, as `has_room` does."""
        self._borrower = self._task = None
        return self.has_room()

    def borrower(self) -> Borrower | None:
        """The actor that has this replica to itself."""
        return self._borrower

    def lend(self, borrower: Borrower, dead: Borrower | None = None) -> bool:
        """Whether an actor has this replica to itself from now on: unless another one has it that is not `dead`."""
        if self._borrower not in (None, dead, borrower):
            return False
        self._borrower = borrower
        return True

    def begin(self, task: ModelTask) -> bool:
        """Gets ready for a task's blocks; whether there was room for it."""
        self._task = task
        return self.prepare(task.setup, task.job) is not None

    def do(self, block: Block) -> tuple[int, int, int]:
        """Does a block of the task and writes what came of it; gives the documents, their tokens, and those skipped."""
        if self._task is None:
            raise RuntimeError("begin a task before its blocks")
        outcome, taken = self.process(block)
        self._task.write(block, outcome, taken)
        return len(outcome.tokens), sum(outcome.tokens.values()), len(outcome.skipped)

    def accumulate(self, block: Block) -> "Outcome":
        """Adds a block to the sums, and commits them when that costs little beside the work that it keeps.

        What is gathered and not summed grows with every block: each block of it is a partial of its own.
        """
        outcome = self._do(block)
        self._sums.counts.append((block.id, outcome.counts))
        if self._destination is not None and (self._by_block or self._sums.is_due()):
            self.commit(self._destination)
            if self._by_block:
                self._sums = _Committed()
        return outcome

    def process(self, block: Block) -> "tuple[Outcome, Any]":
        """What one block gives, all ranks together."""
        outcome = self._do(block)
        return outcome, list(chain.from_iterable(self._on_ranks("take")))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives that has nothing to do with the model, on this process's threads."""
        return function(*arguments)

    def commit(self, destination: Destination) -> None:
        """Writes the sums since the job began, with the blocks that they cover, in place of the last commit."""
        from msif_ray.cluster import partials

        if destination != self._destination:
            raise RuntimeError(f"the sums here belong in {self._destination}, not in {destination}")
        sums = self._sums
        if len(sums.counts) == sums.covered:
            return
        began = monotonic()
        folder = partials.new_folder(destination.folder, sums.counts[0][0])
        parts = self._on_ranks("write_sums", folder)
        partials.publish(folder, parts, sums.counts, sums.folder, destination.inputs, self._stage)
        self._sums = _Committed(sums.counts, len(sums.counts), folder, monotonic() - began)

    @property
    def _stage(self) -> str | None:
        return None if self._setup is None else self._setup.stage

    def unload(self) -> None:
        """Frees the model; sharded ranks end, since a process joins one DeepSpeed group in its life."""
        self._local = None
        for rank in self._remote:
            ray.kill(rank)
        self._remote = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        self._setup = None

    def _do(self, block: Block) -> "Outcome":
        """One block on all ranks. Documents with a loss that is not finite are skipped: what others of their windows
        have given is withdrawn, and what was in a batch with one of these is done again without it."""
        first = passed = self._on_ranks("process", block.documents)
        bad: frozenset[str] = frozenset()
        while True:
            found = frozenset().union(*(each.not_finite for each in passed))
            again = {key: finite for each in passed for key, finite in each.refused.items()}
            if found:
                bad |= found
                again |= dict.fromkeys(self._withdraw(found), True)
            again = {key: finite for key, finite in again.items() if key.document_id not in bad}
            if not again:
                return first[0].outcome(bad)
            passed = self._on_ranks("process", block.documents, again)

    def _withdraw(self, documents: frozenset[str]) -> frozenset[Any]:
        """Takes documents out of the ranks' work; gives the windows that are to be processed again."""
        steps = max(self._on_ranks("summed_with", documents))
        return frozenset().union(*self._on_ranks("withdraw", documents, steps))

    def _on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        """What a method gives on each rank. Raises one of DEATHS when one has died, and a user's mistake as such."""
        if self._local is not None:
            return [getattr(self._local, method)(*arguments)]
        try:
            return ray.get([getattr(rank, method).remote(*arguments) for rank in self._remote])
        except RayTaskError as error:
            from msif_ray.cluster.sharding import is_lost_rank

            if isinstance(error.cause, UserError):
                raise error.cause from None
            if is_lost_rank(error.cause):
                raise RankLostError(" ".join(str(error.cause).split())) from None
            raise

    def _load(self, setup: "ModelSetup") -> None:
        from msif_ray.cluster.rank import Rank

        if self._resources.ranks == 1:
            self._local = Rank(setup)
        else:
            self._spawn(setup)
        self._setup = setup

    def _spawn(self, setup: "ModelSetup") -> None:
        from msif_ray.cluster.rank import Rank
        from msif_ray.cluster.sharding import ENVIRONMENT, RankGroup

        resources = self._resources

        def options(index: int) -> dict[str, Any]:
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            return {
                "num_cpus": resources.cpus,
                "num_gpus": resources.gpus,
                "scheduling_strategy": strategy,
                "runtime_env": {"env_vars": ENVIRONMENT},
            }

        address, port = ray.get(ray.remote(meeting_point).options(**options(0)).remote())
        actor = ray.remote(Rank)
        self._remote = [
            actor.options(**options(index)).remote(setup, RankGroup(index, resources.ranks, address, port))
            for index in range(resources.ranks)
        ]
        self._on_ranks("fetch")  # by itself: one node may take longer over that than ranks wait for each other
        self._on_ranks("load")


@dataclass
class _Committed:
    """The blocks summed since a job began, and how many of them the partial on storage covers."""

    counts: "list[tuple[str, Counts]]" = field(default_factory=list)
    covered: int = 0
    folder: Path | None = None
    seconds: float = 0.0
    at: float = field(default_factory=monotonic)

    def is_due(self) -> bool:
        """A commit writes all the sums, so its time decides how often it is worth it: the first block's tells."""
        after = min(COMMIT_EVERY * self.seconds, sqrt(2 * self.seconds * LIFE_SECONDS), COMMIT_SECONDS)
        return monotonic() - self.at >= after
