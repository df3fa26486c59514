"""Replicas that wait for room: what they hold, what they give back and what is said meanwhile."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray
import runs
from borrowers import Borrower, Holder, Impatient, Mapper, Working
from ray.exceptions import ActorDiedError, RayTaskError
from ray.util.placement_group import placement_group_table

from msif_ray.cluster import pool, stream
from msif_ray.cluster.deaths import NoRoomError
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.replica import Replica
from msif_ray.cluster.room import RankResources
from msif_ray.config import Cluster


@pytest.fixture(scope="module", autouse=True)
def own_cluster(no_shared_cluster: None) -> Iterator[None]:
    with runs.own_cluster():
        yield


def states() -> list[str]:
    return [group["state"] for group in placement_group_table().values()]


def test_a_scoring_replica_that_is_dropped_gives_back_its_ranks_room() -> None:
    holder = ray.remote(Holder).options(num_cpus=0).remote()
    ray.get(holder.__ray_ready__.remote())
    assert "CREATED" in states()
    ray.get(holder.drop.remote())
    assert set(states()) == {"REMOVED"}


def test_a_replica_without_room_says_so_instead_of_waiting_for_it() -> None:
    waiting = ray.remote(Impatient).options(num_cpus=0).remote(RankResources(4, 1, 0.0))
    # What it is asked to prepare would fail: without room it does not come to it.
    assert ray.get(waiting.prepare.remote("no setup", "no job"), timeout=60) is None
    assert "PENDING" in states(), "an autoscaler does not see the demand"
    ray.kill(waiting)


def test_a_lent_replica_is_one_borrowers_until_that_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    with ReplicaPool(Cluster(replicas=2, cpus_per_rank=1, gpus_per_rank=0)) as replicas:
        lent = replicas.lend(Progress())
        assert len(lent) == 2 and replicas.ids == {actor._actor_id.hex() for actor in lent}
        borrowers = [ray.remote(Borrower).options(num_cpus=0).remote() for _ in range(3)]
        have = [ray.get(borrower.borrow.remote(lent)) for borrower in borrowers]
        assert set(have[:2]) == replicas.ids and have[2] is None
        pid = ray.get(borrowers[0].pid.remote())
        os.kill(pid, signal.SIGKILL)
        assert ray.get(borrowers[2].borrow.remote(lent)) == have[0]
        assert ray.get(ray.remote(Borrower).options(num_cpus=0).remote().borrow.remote(lent)) is None, "both are taken"
        assert set(replicas.lend(Progress())) == set(lent), "what the pool lends again is nobody's"
        assert ray.get(borrowers[2].borrow.remote(lent)) in replicas.ids


def test_a_lent_replica_that_dies_is_replaced_by_its_borrower_and_then_by_the_pool() -> None:
    with ReplicaPool(Cluster(replicas=1, cpus_per_rank=1, gpus_per_rank=0)) as replicas:
        (lent,) = replicas.lend(Progress())
        ray.kill(lent)
        borrower = ray.remote(Borrower).options(num_cpus=0).remote()
        assert ray.get(borrower.borrow.remote([lent])) is None
        (again,) = replicas.lend(Progress())
        assert again != lent


def test_an_actor_that_is_restarted_takes_its_replica_back() -> None:
    resources = RankResources(1, 0, 0.0)
    lent = [ray.remote(Replica).options(num_cpus=0).remote(resources) for _ in range(2)]
    mapper = ray.remote(Mapper).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    mappers = [mapper.remote(lent, 0) for _ in lent]
    had = [ray.get(mapper.has.remote()) for mapper in mappers]
    assert set(had) == {actor._actor_id.hex() for actor in lent}
    os.kill(ray.get(mappers[0].pid.remote()), signal.SIGKILL)
    assert ray.get(mappers[0].has.remote(), timeout=60) == had[0]
    assert ray.get(mappers[1].has.remote()) == had[1]


@contextmanager
def no_room() -> Iterator[None]:
    """Somebody has the whole cluster."""
    other = ray.remote(Replica).options(num_cpus=2).remote(RankResources(1, 2, 0.0))
    ray.get(other.has_room.remote(), timeout=60)
    try:
        yield
    finally:
        ray.kill(other)


@pytest.mark.parametrize("restarted", [False, True])
def test_the_place_of_a_replica_that_was_lost_is_not_waited_for_without_end(restarted: bool) -> None:
    lent = ray.remote(Replica).options(num_cpus=0).remote(RankResources(1, 0, 0.0))
    mapper = ray.remote(Mapper).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote([lent], 1)
    assert ray.get(mapper.has.remote(), timeout=60) == lent._actor_id.hex()
    ray.kill(lent)
    with no_room():
        if restarted:
            os.kill(ray.get(mapper.pid.remote()), signal.SIGKILL)
            with pytest.raises(ActorDiedError, match="NoRoomError"):
                ray.get(mapper.do.remote(), timeout=60)
        else:
            with pytest.raises(RayTaskError) as lost:
                ray.get(mapper.do.remote(), timeout=60)
            assert isinstance(lost.value.cause, NoRoomError)
            assert "1 CPU" in str(lost.value.cause)


def test_an_actor_that_has_had_no_replica_yet_waits_for_room() -> None:
    with no_room():
        mapper = ray.remote(Mapper).options(num_cpus=0).remote([], 1)
        has = mapper.has.remote()
        assert not ray.wait([has], timeout=4)[0], "it is no longer the demand that an autoscaler sees"
    assert ray.get(has, timeout=60)


class Progress:
    """Told of a wait for replicas, which is short here."""

    def wait(self, reason: str) -> None:
        pass


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
            heard.set()

    seen, heard = stream._Seen(RankResources(1, 2, 0.0)), threading.Event()
    with stream._told_to_wait(Told(), seen.silence):  # type: ignore[arg-type]
        assert heard.wait(10)
    assert set(said) == {"no replica has done a block yet; each takes 2 CPU"}


def test_scoring_in_which_no_block_is_done_any_more_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(stream, "monotonic", lambda: now)
    seen = stream._Seen(RankResources(1, 2, 0.0))
    seen.block_of("one")
    now += 20
    assert seen.block_of("other") == 2 and seen.silence() is None
    now += 39
    assert seen.silence() is None, "two blocks may take as long"
    now += 1
    told = seen.silence()
    assert told is not None and told.startswith("no block has been done for 40 s;") and told.endswith("takes 2 CPU")
    assert seen.block_of("one") == 2 and seen.silence() is None
    now += stream.ALIVE_SECONDS
    assert seen.block_of("one") == 1


@pytest.mark.long
def test_a_replica_that_is_still_at_work_for_a_stream_that_broke_off_is_lent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "Replica", Working)
    monkeypatch.setattr(pool, "START_SECONDS", 20.0)
    with ReplicaPool(Cluster(replicas={"min": 1, "max": 2}, cpus_per_rank=1, gpus_per_rank=0)) as replicas:
        lent = replicas.lend(Progress())
        assert len(lent) == 2
        monkeypatch.setattr(pool, "START_SECONDS", 1.0)
        work = lent[0].work.remote(8)
        assert set(replicas.lend(Progress())) == set(lent)
        assert not ray.wait([work], timeout=0)[0], "the wait was for the one at work"
        ray.get(work)


def test_a_borrower_finds_the_free_replica_while_others_are_at_work() -> None:
    resources = RankResources(1, 0, 0.0)
    lent = [ray.remote(Working).options(num_cpus=0).remote(resources) for _ in range(2)]
    borrowers = [ray.remote(Borrower).options(num_cpus=0).remote() for _ in range(2)]
    first = ray.get(borrowers[0].borrow.remote(lent))
    at_work = next(actor for actor in lent if actor._actor_id.hex() == first)
    for actor in lent:
        ray.get(actor.has_room.remote())
    busy = at_work.work.remote(60)
    second = ray.get(borrowers[1].borrow.remote(lent), timeout=20)
    assert second is not None and second != first
    assert not ray.wait([busy], timeout=0)[0], "the wait was for the one at work"
