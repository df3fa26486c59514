"""The room that a replica takes on the cluster: its ranks' shares, and their placement groups."""

import socket
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from msif_ray import heap
from msif_ray.config import Cluster


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
    def share(self) -> "RankResources":
        """One rank's: what an actor takes that has no model to share with others."""
        return replace(self, ranks=1)

    @property
    def actor(self) -> dict[str, Any]:
        """What the replica's own actor asks for: the one rank's share, or nothing beside its rank actors."""
        if self.ranks > 1:
            return {"num_cpus": 0}
        environment = {} if self.gpus else {"runtime_env": {"env_vars": heap.ENVIRONMENT}}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus} | environment


def own_device() -> str:
    """What this process may compute on: an actor that asked Ray for no GPU sees those of the machine all the same."""
    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"


def _group_name(actor: str = "") -> str:
    return f"msif-replica-{ray.get_runtime_context().get_job_id()}-{actor}"


def reserve(resources: RankResources) -> PlacementGroup:
    """The demand for the ranks' room of the replica that is this actor, which an autoscaler sees."""
    bundle = {"CPU": float(resources.cpus)} | ({"GPU": resources.gpus} if resources.gpus else {})
    actor = ray.get_runtime_context().get_actor_id() or ""
    free_ranks_of(actor)  # of its earlier life, where Ray has restarted it
    return placement_group([bundle] * resources.ranks, strategy="PACK", name=_group_name(actor))


def free_ranks_of(actor: str) -> None:
    """Gives back what the ranks of a dead replica held, by the id of the replica's actor."""
    _remove(lambda name: name == _group_name(actor))


def free_ranks(living: Set[str] = frozenset()) -> None:
    """Gives back what the ranks of this job's replicas held, but for those whose actors have the ids `living`.

    A placement group outlives the actor that made it, and whoever comes next would wait for it.
    """
    kept = {_group_name(actor) for actor in living}
    _remove(lambda name: name.startswith(_group_name()) and name not in kept)


def _remove(ended: Callable[[str], bool]) -> None:
    for group in placement_group_table().values():
        if ended(group["name"]) and group["state"] != "REMOVED":
            with suppress(ValueError):  # it was removed meanwhile
                remove_placement_group(get_placement_group(group["name"]))


def meeting_point() -> tuple[str, int]:
    """This node's address and a port that is free there now, for a replica's ranks to meet at."""
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]
