"""What stands for Ray Data's actors and for replicas in tests of lending: no PyTorch, which each process of them would
take seconds to import."""

import os
import time
from typing import Any

from msif_ray.cluster import replica, workers
from msif_ray.cluster.replica import Replica
from msif_ray.cluster.room import RankResources
from msif_ray.cluster.workers import ModelReplica
from msif_ray.corpus.reader import Block


class Holder:
    """Stands for the actor in which Ray Data holds a replica until it drops it."""

    def __init__(self) -> None:
        self.replica: Any = ModelReplica([None], RankResources(2, 1, 0.0), [])

    def drop(self) -> None:
        self.replica = None


class Borrower:
    """Stands for an actor in which Ray Data holds a scoring replica: takes one of those lent, if it can."""

    def __init__(self) -> None:
        self.replica: Any = None

    def pid(self) -> int:
        return os.getpid()

    def borrow(self, lent: list[Any]) -> str | None:
        """The id of the lent replica that it has now; None where it had to start one of its own."""
        self.replica = ModelReplica([None], RankResources(1, 0, 0.0), lent)
        return None if self.replica._own is not None else self.replica._replica._actor_id.hex()


class Mapper:
    """Stands for Ray Data's own actor, which is lost and restarted with what it was made from."""

    def __init__(self, lent: list[Any], cpus: int) -> None:
        workers.UNFILLED_SECONDS = 1.0
        self.replica = ModelReplica([None], RankResources(1, cpus, 0.0), lent)

    def pid(self) -> int:
        return os.getpid()

    def has(self) -> str:
        """The id of its replica."""
        return str(self.replica._replica._actor_id.hex())

    def do(self) -> None:
        self.replica.do(Block("00000-0000000", ()))


class Impatient(Replica):
    """A replica that does not wait long for room."""

    def __init__(self, resources: RankResources) -> None:
        replica.ROOM_SECONDS = 0.5
        super().__init__(resources)


class Working(Replica):
    """A replica that can be at work."""

    def work(self, seconds: float) -> None:
        time.sleep(seconds)
