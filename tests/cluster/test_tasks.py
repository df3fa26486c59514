"""What is done once per map: by which processes, and what happens when one of these dies."""

import os
import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import pytest
import ray
from per_map import die, die_once, refuse, threads, where

from msif_ray.cluster.jobs import QueryJob
from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.replica import Replica
from msif_ray.cluster.room import RankResources
from msif_ray.cluster.tasks import SMALL_SHARE, SMALL_TASK, for_each_map
from msif_ray.cluster.turns import Worker
from msif_ray.config import Cluster
from msif_ray.corpus.reader import Block
from msif_ray.errors import UserError

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]
MAPS = ["c", "a", "b"]


@pytest.fixture
def replicas() -> Iterator[list[Any]]:
    resources = RankResources(ranks=1, cpus=0, gpus=0)
    actors = [ray.remote(Replica).options(num_cpus=0).remote(resources) for _ in range(2)]
    yield actors
    for actor in actors:
        ray.kill(actor)


def processes(replicas: list[Any]) -> set[int]:
    return {ray.get(replica.call.remote(os.getpid)) for replica in replicas}


def test_replicas_do_what_is_little_and_results_are_in_the_maps_order(replicas: list[Any]) -> None:
    found = for_each_map(where, MAPS, "x", memory=dict.fromkeys(MAPS, SMALL_TASK), replicas=replicas)
    assert [(name, mark) for name, mark, _ in found] == [("c", "x"), ("a", "x"), ("b", "x")]
    assert {process for _, _, process in found} == processes(replicas)


@pytest.mark.parametrize(
    "memory",
    [{"a": SMALL_TASK + 1, "b": 1, "c": 1}, {f"{n}": SMALL_TASK for n in range(2 * SMALL_SHARE // SMALL_TASK + 1)}],
    ids=["one map is large", "there are many maps"],
)
def test_tasks_do_what_is_much(replicas: list[Any], memory: dict[str, int]) -> None:
    found = for_each_map(where, list(memory), "x", memory=memory, replicas=replicas)
    assert [name for name, _, _ in found] == list(memory)
    assert not {process for _, _, process in found} & (processes(replicas) | {os.getpid()})


def test_tasks_do_it_where_there_are_no_replicas_on_one_thread_each() -> None:
    assert for_each_map(threads, MAPS, memory=dict.fromkeys(MAPS, 1)) == [1, 1, 1]


def test_what_a_replica_that_dies_was_doing_another_one_does(replicas: list[Any], tmp_path: Path) -> None:
    both = processes(replicas)
    found = for_each_map(die_once, MAPS, tmp_path, memory=dict.fromkeys(MAPS, 1), replicas=replicas)
    dead = int((tmp_path / "died").read_text())
    assert dead in both
    assert [name for name, _ in found] == MAPS
    assert dict(found)["a"] in both - {dead}


def test_tasks_go_on_where_all_replicas_are_dead(replicas: list[Any]) -> None:
    only = frozenset(processes(replicas))
    assert for_each_map(die, MAPS, only, memory=dict.fromkeys(MAPS, 1), replicas=replicas) == MAPS


def test_a_users_mistake_arrives_as_itself(replicas: list[Any]) -> None:
    for there in ([], replicas):
        with pytest.raises(UserError, match="c: no good"):
            for_each_map(refuse, ["c"], memory={"c": 1}, replicas=there)


def test_a_pool_has_nobody_for_it_before_a_pass_nor_where_a_model_is_sharded() -> None:
    for ranks in (1, 2):
        with ReplicaPool(Cluster(replicas=1, ranks_per_replica=ranks, cpus_per_rank=1, gpus_per_rank=0)) as pool:
            pool.lend(Waiting())  # type: ignore[arg-type]
            assert pool.idle() == []


class Waiting:
    """Told of what happens, of which this hears nothing."""

    def wait(self, reason: str) -> None:
        pass

    def alive(self, replicas: int) -> None:
        pass

    def add(self, documents: int, tokens: int, skipped: int = 0) -> None:
        pass


class Loading:
    """In a replica's place: one that is ready for a job at once, or only when it is let."""

    def __init__(self, let: Path) -> None:
        self._let = let

    def prepare(self, setup: Any, job: Any, destination: Any = None) -> int:
        while not self._let.exists():
            time.sleep(0.05)
        return 1

    def process(self, block: Block) -> tuple[Outcome, list[Any]]:
        return Outcome({block.id: 1}, (), 1), []


class Names:
    """Blocks of no documents."""

    ids = frozenset(("1", "2"))

    def left(self, done: Set[str]) -> Iterator[Block]:
        return (Block(name, ()) for name in sorted(self.ids - done))


def test_a_replica_that_is_still_loading_when_a_pass_ends_is_not_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lets = [tmp_path / "first", tmp_path / "second"]
    actors = [ray.remote(Loading).options(num_cpus=0).remote(let) for let in lets]
    spawned = iter(actors)
    monkeypatch.setattr(ReplicaPool, "_spawn", lambda self: Worker(next(spawned)))

    def idle_after_a_pass() -> list[Any]:
        done = pool.map("setup", QueryJob(), Names(), Waiting())  # type: ignore[arg-type]
        assert sorted(block.id for block, _, _ in done) == ["1", "2"]
        return pool.idle()

    with ReplicaPool(Cluster(replicas={"min": 1, "max": 2}, cpus_per_rank=1, gpus_per_rank=0)) as pool:
        for let in lets:
            let.touch()
        while idle_after_a_pass() != actors:  # a pass may end before the second one is ready
            pass
        lets[1].unlink()  # it loads the next step's model
        assert idle_after_a_pass() == actors[:1]
