"""Replicas that wait for room: what they hold, what they give back and what is said meanwhile."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
import runs
from ray.util.placement_group import placement_group_table

from msif_ray.cluster import pool, stream
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.replica import RankResources, Replica
from msif_ray.cluster.score import ScoreReplica
from msif_ray.config import Cluster


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with runs.local_cluster():
        yield


class Holder:
    """Stands for the actor in which Ray Data holds a replica until it drops it."""

    def __init__(self) -> None:
        self.replica: Any = ScoreReplica(None, RankResources(2, 1, 0.0))  # type: ignore[arg-type]

    def drop(self) -> None:
        self.replica = None


def states() -> list[str]:
    return [group["state"] for group in placement_group_table().values()]


def test_a_scoring_replica_that_is_dropped_gives_back_its_ranks_room() -> None:
    holder = ray.remote(Holder).options(num_cpus=0).remote()
    ray.get(holder.__ray_ready__.remote())
    assert "CREATED" in states()
    ray.get(holder.drop.remote())
    assert set(states()) == {"REMOVED"}


def test_a_replica_without_room_says_so_instead_of_waiting_for_it() -> None:
    waiting = ray.remote(Replica).options(num_cpus=0).remote(RankResources(4, 1, 0.0))
    # What it is asked to prepare would fail: without room it does not come to it.
    assert ray.get(waiting.prepare.remote("no setup", "no job"), timeout=60) is None
    assert "PENDING" in states(), "an autoscaler does not see the demand"
    ray.kill(waiting)


class EnoughError(Exception):
    pass


def test_whoever_waits_for_a_replica_is_told_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "WAIT_SECONDS", 0.1)

    def told(reason: str) -> None:
        raise EnoughError(reason)

    with ReplicaPool(Cluster(cpus_per_rank=64, gpus_per_rank=0)) as replicas, pytest.raises(EnoughError) as enough:
        replicas.free_memory("no setup", "no job", told)  # type: ignore[arg-type]
    assert str(enough.value) == "0 of 1 replicas are ready; each takes 64 CPU"


def test_scoring_that_waits_says_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WAIT_SECONDS", 0.01)
    said: list[str] = []

    class Told:
        def wait(self, reason: str) -> None:
            said.append(reason)
            begun.set()

    with stream._told_to_wait(Told(), "for a replica") as begun:  # type: ignore[arg-type]
        assert begun.wait(10)
    assert said == ["for a replica"]
