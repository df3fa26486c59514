"""Put into Ray's workers: writes down what each process begins, and makes small steps last long enough to be hit.

An event is a JSON line in the file that MSIF_TEST_EVENTS names: the step, the unit of work and the process.
"""

import json
import os
import time
from typing import Any

EVENTS = "MSIF_TEST_EVENTS"
# Seconds that each unit of work takes at least.
SECONDS = "MSIF_TEST_SECONDS"


def install() -> None:
    """Ray's worker_process_setup_hook."""
    from msif_ray.cluster import carry, fit, rank, replica

    wrap_rank(rank.Rank)
    wrap_replica(replica.Replica)
    for module, name, step in (
        (fit, "write_basis", "eigendecomposition"),
        (fit, "write_eigenvalues", "eigenvalues"),
        (carry, "write_directions", "carry"),
    ):
        wrap_task(module, name, step)


def say(step: str, unit: str, role: str) -> None:
    line = json.dumps({"step": step, "unit": unit, "role": role, "pid": os.getpid()}) + "\n"
    with open(os.environ[EVENTS], "a", encoding="utf-8") as file:
        file.write(line)


def step_of(stage: str, job: Any) -> str:
    group = "" if job.tracked is None else f":{job.tracked[0]}"
    return f"{stage}:{type(job).__name__}{group}"


def wrap_rank(rank: Any) -> None:
    start, process = rank.start, rank.process

    def spied_start(self: Any, job: Any) -> None:
        self.spied_step = step_of(self.setup.stage, job)
        start(self, job)

    def spied_process(self: Any, documents: Any) -> Any:
        if self.place.rank == 0:
            say(self.spied_step, str(documents[0].id), "computes")
        say(self.spied_step, str(documents[0].id), "rank")
        time.sleep(float(os.environ[SECONDS]))
        return process(self, documents)

    rank.start, rank.process = spied_start, spied_process


def wrap_replica(replica: Any) -> None:
    prepare = replica.prepare

    def spied_prepare(self: Any, setup: Any, job: Any) -> int:
        self.spied_step = step_of(setup.stage, job)
        return prepare(self, setup, job)

    replica.prepare = spied_prepare
    for name in ("accumulate", "process"):
        wrap_block(replica, name)


def wrap_block(replica: Any, name: str) -> None:
    method = getattr(replica, name)

    def spied(self: Any, block: Any, *arguments: Any) -> Any:
        say(self.spied_step, block.id, "replica")
        return method(self, block, *arguments)

    setattr(replica, name, spied)


def wrap_task(module: Any, name: str, step: str) -> None:
    function = getattr(module, name)

    def spied(map_name: str, *arguments: Any) -> Any:
        say(step, map_name, "task")
        time.sleep(0.15)
        return function(map_name, *arguments)

    setattr(module, name, spied)
