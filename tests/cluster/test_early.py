"""Processes that are started before they are needed."""

from collections.abc import Iterator

import pytest
import ray
import runs

from msif_ray.cluster.early import EarlyStart
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.config import Cluster


@pytest.fixture(autouse=True)
def cluster(no_shared_cluster: None) -> Iterator[None]:
    with runs.own_cluster():
        yield


def in_a_task() -> set[str]:
    """What a process that Ray gives a task now has imported, before it has this task."""

    def imported() -> set[str]:  # of no module, which it would import
        import sys

        return {"torch", "pandas", "msif_ray.cluster.carry"} & sys.modules.keys()

    found: set[str] = ray.get(ray.remote(num_cpus=0)(imported).remote())
    return found


def named_actors() -> set[str]:
    return {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}


def test_tasks_and_streams_find_processes_that_have_imported() -> None:
    assert in_a_task() == set()
    with EarlyStart(tasks=2, streams=True) as early:
        early.start()
        early.start()
    assert in_a_task() == {"torch", "pandas", "msif_ray.cluster.carry"}
    assert named_actors(), "Ray Data has started nothing"


def test_a_run_that_streams_nothing_starts_nothing_of_ray_data() -> None:
    with EarlyStart(tasks=1, streams=False) as early:
        early.start()
    assert in_a_task() and not named_actors()


def test_another_cluster_ends_idle_processes_so_none_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with EarlyStart(tasks=2, streams=True) as early:
        early.start()
    assert in_a_task() == set() and not named_actors()


def test_it_begins_with_the_first_replicas() -> None:
    begun: list[int] = []
    with ReplicaPool(Cluster(replicas=1, cpus_per_rank=1, gpus_per_rank=0), lambda: begun.append(1)) as replicas:
        assert not begun, "a run that has nothing left to do starts processes"
        replicas.lend(Waiting())  # type: ignore[arg-type]
        assert begun


class Waiting:
    """Told of a wait for replicas, which is short here."""

    def wait(self, reason: str) -> None:
        pass
