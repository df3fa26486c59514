"""What replicas and the actors beside them ask Ray for, and compute on: without Ray, and without a GPU."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from msif_ray.cluster import room
from msif_ray.cluster import stream as streaming
from msif_ray.cluster.indexed import IndexedReplica
from msif_ray.cluster.room import RankResources, own_device
from msif_ray.config import Cluster


@pytest.mark.parametrize(
    ("connected", "given", "device"), [(True, [0], "cuda"), (True, [], "cpu"), (False, [0], "cpu")]
)
def test_a_process_computes_on_what_ray_gave_it(
    monkeypatch: pytest.MonkeyPatch, connected: bool, given: list[int], device: str
) -> None:
    monkeypatch.setattr(room.ray, "is_initialized", lambda: connected)
    monkeypatch.setattr(room.ray, "get_gpu_ids", lambda: given)
    assert own_device() == device


def test_a_sharded_replicas_own_actor_takes_nothing_and_its_share_is_a_ranks() -> None:
    resources = RankResources(4, 2, 0.5)
    assert resources.actor == {"num_cpus": 0}
    assert resources.share.actor == RankResources(1, 2, 0.5).actor == {"num_cpus": 2, "num_gpus": 0.5}


class Streamed:
    """Ray Data that has no rows, and keeps what was asked for each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def map_batches(self, function: Any, **options: Any) -> "Streamed":
        self.steps.append(options)
        return self

    def iter_rows(self) -> list[Any]:
        return []


def steps(monkeypatch: pytest.MonkeyPatch, files: int = 1, **about: Any) -> list[dict[str, Any]]:
    """What is asked for the readers and for the replicas of a stream over an index."""
    streamed = Streamed()
    monkeypatch.setattr(streaming.ray.data, "from_items", lambda *_, **__: streamed)
    monkeypatch.setattr(streaming.ray, "put", lambda task: task)
    pool = SimpleNamespace(cluster=Cluster.model_validate(about), dismiss=lambda: None)
    task = SimpleNamespace(replica=IndexedReplica, blocks=SimpleNamespace(files=("file",) * files))
    streaming._stream(cast(Any, task), cast(Any, pool), frozenset(), cast(Any, None))
    return streamed.steps


def test_scoring_from_an_index_takes_one_ranks_room_where_models_are_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    _, replicas = steps(monkeypatch, ranks_per_replica=2, gpus_per_rank=1, cpus_per_rank=3)
    assert {key: replicas[key] for key in ("num_cpus", "num_gpus")} == {"num_cpus": 3, "num_gpus": 1}


def test_readers_are_as_many_as_replicas_want_and_not_one_for_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data limits by what a task asks for, and a reader asks for nothing."""
    readers, _ = steps(monkeypatch, files=1000, replicas={"min": 1, "max": 3})
    assert readers["compute"].size == 4
    readers, _ = steps(monkeypatch, files=2, replicas={"min": 1, "max": 3})
    assert readers["compute"].size == 2, "Ray Data warns of more than there is work for"
