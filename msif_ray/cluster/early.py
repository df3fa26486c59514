"""Processes that later steps of a run need, started while its replicas load their model.

A replica loads on one core, and what it will wait for later are processes that import: PyTorch for tasks per map,
pandas for Ray Data's. Only on this machine's own cluster, whose idle processes stay (`connection.IDLE_SECONDS`).
"""

import importlib
from contextlib import suppress
from threading import Thread
from types import TracebackType
from typing import Self

import ray

from msif_ray.machines import cluster_address

# What tasks per map are in, and what Ray Data's processes import.
IMPORTS = ("msif_ray.cluster.carry", "msif_ray.cluster.workers", "ray.data")
# Each takes some 200 MB.
MOST_TASKS = 8


class EarlyStart:
    """Of processes for so many tasks at once, as far as there are cores, and, where the run `streams` a corpus, of what
    Ray Data runs beside its workers."""

    def __init__(self, tasks: int, streams: bool) -> None:
        self._tasks, self._streams = min(tasks, MOST_TASKS), streams
        self._thread: Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join()  # Ray Data begins a cluster of its own where there is none any more

    def start(self) -> None:
        """Starts them in the background, the first time that it is called."""
        if self._thread is None and cluster_address() is None:
            self._thread = Thread(target=self._start, daemon=True)
            self._thread.start()

    def _start(self) -> None:
        from msif_ray.cluster.stream import quiet_ray_data  # here: Ray Data's process imports this module, too

        with suppress(Exception):  # what fails here fails again where it is needed, and is told there
            importing = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_import)
            started = [importing.remote() for _ in range(min(self._tasks, int(ray.cluster_resources()["CPU"])))]
            ray.wait(started, num_returns=len(started))
            if self._streams:  # one of these processes has its tasks, too
                quiet_ray_data()
                ray.data.from_items([0]).map_batches(_same, num_cpus=0).take_all()


def _import() -> None:
    for name in IMPORTS:
        importlib.import_module(name)


def _same(batch: object) -> object:
    return batch
