"""A replica: one copy of a stage's model, in this process or sharded over several rank actors."""

import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from msif_ray.cluster import partials
from msif_ray.cluster.jobs import Job, PartialSums
from msif_ray.cluster.rank import ModelSetup, Outcome, Rank
from msif_ray.cluster.sharding import ENVIRONMENT, RankGroup
from msif_ray.config import Cluster
from msif_ray.corpus.reader import Block


@dataclass(frozen=True)
class RankResources:
    """What a replica is made of."""

    ranks: int
    cpus: int
    gpus: float

    @classmethod
    def of(cls, cluster: Cluster) -> "RankResources":
        return cls(cluster.ranks_per_replica, cluster.cpus_per_rank, cluster.gpus_per_rank or 0.0)

    @property
    def actor(self) -> dict[str, float]:
        """What the replica's own actor asks for: the one rank's share, or nothing beside its rank actors."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus} if self.ranks == 1 else {"num_cpus": 0}


class Replica:
    """Processes blocks with one model. A plain class: the pool and Ray Data make actors of it."""

    def __init__(self, resources: RankResources) -> None:
        self._resources = resources
        self._setup: ModelSetup | None = None
        self._local: Rank | None = None
        self._remote: list[Any] = []
        self._group: PlacementGroup | None = None
        self._uncommitted: list[tuple[str, Outcome]] = []

    def prepare(self, setup: ModelSetup, job: Job) -> None:
        """Loads the stage's model unless it is loaded, and starts the job."""
        self._uncommitted = []
        if setup != self._setup:
            self._load(setup)
        if self._local is not None:
            self._local.start(job)
        else:
            ray.get([rank.start.remote(job) for rank in self._remote])

    def process(self, block: Block) -> Outcome:
        """Adds a block to the work under way."""
        if self._local is not None:
            outcome = self._local.process(block.documents)
        else:
            outcome = ray.get([rank.process.remote(block.documents) for rank in self._remote])[0]
        self._uncommitted.append((block.id, outcome))
        return outcome

    def process_and_take(self, block: Block) -> tuple[Outcome, Any]:
        """What one block gives, all ranks together."""
        outcome = self.process(block)
        self._uncommitted = []
        return outcome, self._take()

    def commit(self, folder: Path) -> None:
        """Writes the sums since the last commit, with the blocks that they cover."""
        if self._uncommitted:
            partials.write(folder, self._take(), self._uncommitted)
            self._uncommitted = []

    def _take(self) -> Any:
        if self._local is not None:
            return self._local.take()
        return _merge(ray.get([rank.take.remote() for rank in self._remote]))

    def _load(self, setup: ModelSetup) -> None:
        self._unload()
        if self._resources.ranks == 1:
            self._local = Rank(setup)
        else:
            self._remote = self._spawn(setup)
        self._setup = setup

    def _unload(self) -> None:
        """Frees the model; sharded ranks end, since a process joins one DeepSpeed group in its life."""
        self._local = None
        for rank in self._remote:
            ray.kill(rank)
        self._remote = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        self._setup = None

    def _spawn(self, setup: ModelSetup) -> list[Any]:
        resources = self._resources
        bundle = {"CPU": float(resources.cpus)} | ({"GPU": resources.gpus} if resources.gpus else {})
        self._group = placement_group(
            [bundle] * resources.ranks, strategy="PACK", name=f"{_group_prefix()}{uuid.uuid4().hex}"
        )
        ray.get(self._group.ready())

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
        ranks = [
            actor.options(**options(index)).remote(setup, RankGroup(index, resources.ranks, address, port))
            for index in range(resources.ranks)
        ]
        ray.get([rank.__ray_ready__.remote() for rank in ranks])
        return ranks


def _group_prefix() -> str:
    return f"msif-replica-{ray.get_runtime_context().get_job_id()}-"


def free_ranks() -> None:
    """Gives back what the ranks of this job's replicas held, when those have ended.

    A placement group outlives the actor that made it, and whoever comes next would wait for it.
    """
    for group in placement_group_table().values():
        if group["name"].startswith(_group_prefix()) and group["state"] != "REMOVED":
            remove_placement_group(get_placement_group(group["name"]))


def meeting_point() -> tuple[str, int]:
    """This node's address and a port that is free there now, for a replica's ranks to meet at."""
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def _merge(taken: Sequence[Any]) -> Any:
    """What several ranks gathered, as one rank would have."""
    if isinstance(taken[0], PartialSums):
        return reduce(add, taken)
    return list(chain.from_iterable(taken))
