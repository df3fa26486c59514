"""A replica: one copy of a stage's model, in this process or sharded over several rank actors."""

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from msif_ray import heap
from msif_ray.cluster import partials
from msif_ray.cluster.jobs import Job, QueryJob
from msif_ray.cluster.rank import ModelSetup, Outcome, Rank
from msif_ray.cluster.sharding import ENVIRONMENT, RankGroup, RankLostError, is_lost_rank
from msif_ray.config import Cluster
from msif_ray.corpus.reader import Block
from msif_ray.errors import UserError

# What tells of the end of a replica, of a rank of it, or of a node or an object that it stood on. A worker that
# Ray's memory monitor ends is an OutOfMemoryError; a lost object's kinds (its owner's death) are ObjectLostErrors.
DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError, RankLostError)

# A replica commits when it has worked this many times as long as its last commit took: a twentieth of its time
# goes into commits, and a death loses as little as that allows.
COMMIT_EVERY = 20.0
# However long a commit takes, a death loses no more than this many seconds of work.
COMMIT_SECONDS = 900.0
# How long a replica waits for room before it says that it has none yet, and may be told of another step.
ROOM_SECONDS = 5.0


@dataclass(frozen=True)
class Destination:
    """Where a step's partial sums go, and by what beside the run they are computed (`inputs`: checksums)."""

    folder: Path
    inputs: str = ""


@dataclass(frozen=True)
class RankResources:
    """What a replica is made of."""

    ranks: int
    cpus: int
    gpus: float

    @classmethod
    def of(cls, cluster: Cluster) -> "RankResources":
        return cls(cluster.ranks_per_replica, cluster.cpus_per_rank, cluster.gpus_per_rank or 0.0)

    def __str__(self) -> str:
        of_rank = f"{self.cpus} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        return of_rank if self.ranks == 1 else f"{self.ranks} ranks of {of_rank} each"

    @property
    def actor(self) -> dict[str, Any]:
        """What the replica's own actor asks for: the one rank's share, or nothing beside its rank actors."""
        if self.ranks > 1:
            return {"num_cpus": 0}
        environment = {} if self.gpus else {"runtime_env": {"env_vars": heap.ENVIRONMENT}}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus} | environment


class Replica:
    """Processes blocks with one model. A plain class: the pool and Ray Data make actors of it."""

    def __init__(self, resources: RankResources) -> None:
        self._resources = resources
        self._setup: ModelSetup | None = None
        self._local: Rank | None = None
        self._remote: list[Any] = []
        self._group: PlacementGroup | None = None
        self._destination: Destination | None = None
        self._sums = _Committed()
        self._by_block = False

    def has_room(self) -> bool:
        """Whether there is room for the ranks; asks for it, and waits a little. One rank has its actor's own."""
        if self._resources.ranks == 1:
            return True
        if self._group is None:
            self._group = self._reserve()
        return self._group.wait(ROOM_SECONDS)

    def prepare(self, setup: ModelSetup, job: Job, destination: Destination | None = None) -> int | None:
        """Loads the stage's model unless it is loaded, and starts the job; gives a rank's free memory in bytes.

        None where there is no room for the ranks yet: to be asked again, if the step is still under way by then.
        """
        if setup != self._setup:
            if self._setup is not None or self._remote:
                self.unload()
            if not self.has_room():
                return None
            self._load(setup)
        self._sums, self._destination = _Committed(), destination
        self._by_block = isinstance(job, QueryJob)
        self._on_ranks("start", job)
        return min(self._on_ranks("free_memory"))

    def accumulate(self, block: Block) -> Outcome:
        """Adds a block to the sums, and commits them when that costs little beside the work that it keeps.

        What is gathered and not summed grows with every block: each block of it is a partial of its own.
        """
        outcome = self._do(block)
        self._sums.outcomes.append((block.id, outcome))
        if self._destination is not None and (self._by_block or self._sums.is_due()):
            self.commit(self._destination)
            if self._by_block:
                self._sums = _Committed()
        return outcome

    def process(self, block: Block) -> tuple[Outcome, Any]:
        """What one block gives, all ranks together."""
        outcome = self._do(block)
        return outcome, list(chain.from_iterable(self._on_ranks("take")))

    def commit(self, destination: Destination) -> None:
        """Writes the sums since the job began, with the blocks that they cover, in place of the last commit."""
        if destination != self._destination:
            raise RuntimeError(f"the sums here belong in {self._destination}, not in {destination}")
        sums = self._sums
        if len(sums.outcomes) == sums.covered:
            return
        began = monotonic()
        folder = partials.new_folder(destination.folder, sums.outcomes[0][0])
        parts = self._on_ranks("write_sums", folder)
        partials.publish(folder, parts, sums.outcomes, sums.folder, destination.inputs)
        self._sums = _Committed(sums.outcomes, len(sums.outcomes), folder, monotonic() - began)

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

    def _do(self, block: Block) -> Outcome:
        """One block on all ranks: documents whose loss is not finite are skipped, and what was in a batch with one
        is done again without it."""
        outcomes = self._on_ranks("process", block.documents)
        outcome, bad, held = outcomes[0], _union(outcomes, "not_finite"), _union(outcomes, "held")
        while held := frozenset(key for key in held if key.document_id not in bad):
            again = self._on_ranks("process", block.documents, held)
            bad, held = bad | _union(again, "not_finite"), _union(again, "held")
        return outcome.without(bad) if bad else outcome

    def _on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        """What a method gives on each rank. Raises one of DEATHS when one has died, and a user's mistake as such."""
        if self._local is not None:
            return [getattr(self._local, method)(*arguments)]
        try:
            return ray.get([getattr(rank, method).remote(*arguments) for rank in self._remote])
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            if is_lost_rank(error.cause):
                raise RankLostError(" ".join(str(error.cause).split())) from None
            raise

    def _load(self, setup: ModelSetup) -> None:
        if self._resources.ranks == 1:
            self._local = Rank(setup)
        else:
            self._spawn(setup)
        self._setup = setup

    def _reserve(self) -> PlacementGroup:
        """The demand for the ranks' room, which an autoscaler sees."""
        resources = self._resources
        bundle = {"CPU": float(resources.cpus)} | ({"GPU": resources.gpus} if resources.gpus else {})
        name = _group_name(ray.get_runtime_context().get_actor_id())
        free_ranks(name)  # of this actor's earlier life, where Ray has restarted it
        return placement_group([bundle] * resources.ranks, strategy="PACK", name=name)

    def _spawn(self, setup: ModelSetup) -> None:
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
        self._on_ranks("load")


def _union(outcomes: Sequence[Outcome], what: str) -> frozenset[Any]:
    return frozenset().union(*(getattr(outcome, what) for outcome in outcomes))


@dataclass
class _Committed:
    """The blocks summed since a job began, and how many of them the partial on storage covers."""

    outcomes: list[tuple[str, Outcome]] = field(default_factory=list)
    covered: int = 0
    folder: Path | None = None
    seconds: float = 0.0
    at: float = field(default_factory=monotonic)

    def is_due(self) -> bool:
        """A commit writes all the sums, so its time decides how often it is worth it."""
        return monotonic() - self.at >= min(COMMIT_EVERY * self.seconds, COMMIT_SECONDS)


def _group_name(actor: str = "") -> str:
    return f"msif-replica-{ray.get_runtime_context().get_job_id()}-{actor}"


def free_ranks_of(actor: str) -> None:
    """Gives back what the ranks of a dead replica held, by the id of the replica's actor."""
    free_ranks(_group_name(actor))


def free_ranks(prefix: str | None = None) -> None:
    """Gives back what the ranks of ended replicas held: of this job's, or of those whose name begins so.

    A placement group outlives the actor that made it, and whoever comes next would wait for it.
    """
    prefix = prefix or _group_name()
    for group in placement_group_table().values():
        if group["name"].startswith(prefix) and group["state"] != "REMOVED":
            with suppress(ValueError):  # it was removed meanwhile
                remove_placement_group(get_placement_group(group["name"]))


def meeting_point() -> tuple[str, int]:
    """This node's address and a port that is free there now, for a replica's ranks to meet at."""
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]
