"""Put into Ray's workers: writes down what each process begins, and makes small steps last long enough to be hit.

An event is a JSON line in the file that MSIF_TEST_EVENTS names: the step, the unit of work and the process.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

EVENTS = "MSIF_TEST_EVENTS"
# Seconds that each unit of work takes at least.
SECONDS = "MSIF_TEST_SECONDS"
# Elements above which a sharded replica's weights are sharded here: all matrices of the small models of the tests.
KEPT_WHOLE = 50


def install() -> None:
    """Ray's worker_process_setup_hook."""
    shard_small_weights()
    when_imported("rank", lambda rank: wrap_rank(rank.Rank))
    when_imported("replica", lambda replica: wrap_replica(replica.Replica))
    for module, name, step in (
        ("fit", "write_basis", "eigendecomposition"),
        ("fit", "write_eigenvalues", "eigenvalues"),
        ("carry", "write_directions", "carry"),
        ("solve_tasks", "write_next", "iterate"),
    ):
        when_imported(module, partial(wrap_task, name=name, step=step))


def shard_small_weights() -> None:
    """A worker_process_setup_hook of its own: ranks that hold one model do shard a small one, too, or fail."""
    when_imported("sharding", lambda sharding: setattr(sharding, "_KEPT_WHOLE", KEPT_WHOLE))
    when_imported("rank", check_shards)


def check_shards(rank: Any) -> None:
    load = rank.load_sharded

    def checked(*arguments: Any) -> Any:
        model = load(*arguments)
        weights: list[Any] = list(model.parameters())
        share = sum(w.ds_tensor.numel() for w in weights) / sum(w.ds_numel for w in weights)
        assert share < 0.6, f"a rank holds {share:.2f} of the model"
        if EVENTS in os.environ:
            say("load", f"{share:.2f}", "shard")
        return model

    rank.load_sharded = checked


class Changes(MetaPathFinder):
    """Changes a module when it has been imported, and not before: most of Ray's workers are none of ours, and would
    take seconds to import PyTorch."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[Any], None]]] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        changes = self.waiting.pop(name, None)
        spec = None if changes is None else find_spec(name)
        if changes is None or spec is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def executed(module: Any) -> None:
            execute(module)
            for change in changes:
                change(module)

        loader.exec_module = executed
        return spec


CHANGES = Changes()


def when_imported(module: str, change: Callable[[Any], None]) -> None:
    """Changes a module of msif_ray.cluster once it is there; one that is there already, at once."""
    name = f"msif_ray.cluster.{module}"
    if name in sys.modules:
        change(sys.modules[name])
        return
    if CHANGES not in sys.meta_path:
        sys.meta_path.insert(0, CHANGES)
    CHANGES.waiting.setdefault(name, []).append(change)


def say(step: str, unit: str, role: str) -> None:
    line = json.dumps({"step": step, "unit": unit, "role": role, "pid": os.getpid()}) + "\n"
    with open(os.environ[EVENTS], "a", encoding="utf-8") as file:
        file.write(line)


def step_of(stage: str, job: Any) -> str:
    group = f":{job.tracked[0]}" if job.tracked else ""
    # Of a solve, which iterate's next directions are multiplied.
    iterate = f":{job.iterate}" if getattr(job, "iterate", None) is not None else ""
    return f"{stage}:{type(job).__name__}{group}{iterate}"


def wrap_rank(rank: Any) -> None:
    start, process = rank.start, rank.process

    def spied_start(self: Any, job: Any) -> None:
        self.spied_step = step_of(self.setup.stage, job)
        start(self, job)

    def spied_process(self: Any, documents: Any, *only: Any) -> Any:
        if self.place.rank == 0:
            say(self.spied_step, str(documents[0].id), "computes")
        say(self.spied_step, str(documents[0].id), "rank")
        time.sleep(float(os.environ[SECONDS]))
        outcome = process(self, documents, *only)
        say(self.spied_step, str(documents[0].id), "done")
        return outcome

    rank.start, rank.process = spied_start, spied_process


def wrap_replica(replica: Any) -> None:
    prepare = replica.prepare

    def spied_prepare(self: Any, setup: Any, job: Any, *destination: Any) -> Any:
        self.spied_step = step_of(setup.stage, job)
        return prepare(self, setup, job, *destination)

    replica.prepare = spied_prepare
    for name in ("accumulate", "process"):
        wrap_block(replica, name)


def wrap_block(replica: Any, name: str) -> None:
    method = getattr(replica, name)

    def spied(self: Any, block: Any, *arguments: Any) -> Any:
        say(self.spied_step, block.id, "replica")
        result = method(self, block, *arguments)
        say(self.spied_step, block.id, "done")
        return result

    setattr(replica, name, spied)


def wrap_task(module: Any, name: str, step: str) -> None:
    function = getattr(module, name)

    def spied(map_name: str, *arguments: Any) -> Any:
        say(step, map_name, "task")
        time.sleep(float(os.environ[SECONDS]))
        result = function(map_name, *arguments)
        say(step, map_name, "done")
        return result

    setattr(module, name, spied)
