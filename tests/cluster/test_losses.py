"""Streams that lose a replica whose place nothing fills, or the process that hands blocks to it."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
import ray
from cluster import losses, runs

from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.replica import Replica
from msif_ray.cluster.room import RankResources
from msif_ray.cluster.stream import stream
from msif_ray.cluster.workers import BlockReplica, ModelReplica
from msif_ray.config import Cluster, Documents
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.files import corpus_files

DOCUMENTS = 24
REPLICAS = Cluster(replicas={"min": 1, "max": 2}, cpus_per_rank=1, gpus_per_rank=0)


@pytest.fixture(scope="module", autouse=True)
def own_cluster(no_shared_cluster: None) -> Iterator[None]:
    with runs.own_cluster(losses.install):
        yield


class Progress:
    """Told of blocks; nobody listens."""

    def add(self, documents: int, tokens: int, skipped: int = 0) -> None: ...

    def resume(self, documents: int, skipped: int = 0) -> None: ...

    def alive(self, replicas: int) -> None: ...

    def wait(self, reason: str) -> None: ...


def task(folder: Path, replica: type[BlockReplica]) -> losses.Task:
    path = runs.write_lines(folder / "documents.jsonl", [{"text": str(number)} for number in range(DOCUMENTS)])
    documents = Documents(path=path, text="text")
    return losses.Task(
        CorpusBlocks(tuple(corpus_files(documents, "k")), (DOCUMENTS,), documents, 1, "k"), folder, replica
    )


def streamed(found: losses.Task, lose: Callable[[losses.Task], None]) -> None:
    """All blocks are done, none more than twice, though something is lost once two replicas have done some."""

    def when_two_work() -> None:
        while len(set(found.pids("block-*"))) < 2:
            time.sleep(0.05)
        lose(found)

    losing = Thread(target=when_two_work, daemon=True)
    losing.start()
    with ReplicaPool(REPLICAS) as pool:
        stream(found, pool, Progress())
    losing.join()
    times = [len(path.read_text().split()) for path in found.folder.glob("block-*")]
    assert len(times) == DOCUMENTS and max(times) <= 2


def kill_a_replica(found: losses.Task) -> None:
    os.kill(found.pids("block-*")[0], signal.SIGKILL)


def kill_who_hand_on(found: losses.Task) -> None:
    for pid in set(found.pids("hands-on")):
        os.kill(pid, signal.SIGKILL)


def kill_both(found: losses.Task) -> None:
    kill_a_replica(found)
    kill_who_hand_on(found)


def test_who_hands_blocks_on_may_die(tmp_path: Path) -> None:
    streamed(task(tmp_path, ModelReplica), kill_who_hand_on)


@pytest.mark.parametrize(
    ("replica", "lose"),
    [
        pytest.param(ModelReplica, kill_a_replica, id="model"),
        pytest.param(ModelReplica, kill_both, id="model-and-who-hands-on", marks=pytest.mark.long),
        pytest.param(losses.PlainReplica, kill_a_replica, id="plain"),
    ],
)
def test_a_stream_goes_on_without_a_replica_whose_place_stays_empty(
    replica: type[BlockReplica], lose: Callable[[losses.Task], None], tmp_path: Path
) -> None:
    others: list[ray.actor.ActorHandle] = []

    def lose_for_good(found: losses.Task) -> None:
        # It gets the room that is freed before whoever asks later.
        others.append(ray.remote(Replica).options(num_cpus=1).remote(RankResources(1, 1, 0.0)))
        time.sleep(1)
        lose(found)

    try:
        streamed(task(tmp_path, replica), lose_for_good)
        assert ray.get(others[0].has_room.remote(), timeout=1), "the place was not taken"
    finally:
        for other in others:
            ray.kill(other)
