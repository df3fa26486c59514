"""What is done once per tracked map: by replicas, which have nothing else to do meanwhile, where it is so little that
starting processes for it would take longer; else as Ray tasks, as many at once as the cluster has cores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from msif_ray.cluster.deaths import DEATHS, answer

# A task that dies with its node is run again elsewhere; one that dies this often is at fault itself.
TASK_RETRIES = 8
# What replicas do themselves, in bytes that the tasks take: of one map, which is what a replica needs beside its model,
# and of all that one replica gets, some two seconds' work of one core (the eigendecompositions of 16 maps of up to
# 1,025). A process that imports PyTorch takes as long to start.
SMALL_TASK = 64 * 2**20
SMALL_SHARE = 2**30


def for_each_map(
    function: Callable[..., Any],
    maps: Sequence[str],
    *arguments: Any,
    memory: Mapping[str, int],
    replicas: Sequence[Any] = (),
) -> list[Any]:
    """`function(map, *arguments)` of every map, in their order. `memory`: what each takes, in bytes by map.

    `replicas` are actors that are idle; what one that dies was doing is done elsewhere. Raises UserError as the
    function does.
    """
    shared = [ray.put(argument) for argument in arguments]
    needed = [memory[name] for name in maps]
    little = max(needed, default=0) <= SMALL_TASK and sum(needed) <= SMALL_SHARE * len(replicas)
    return _Work(function, shared, memory, list(replicas) if little else []).do(maps)


@dataclass
class _Work:
    """A function of maps, and the replicas that are still there to do it."""

    function: Callable[..., Any]
    arguments: list[Any]
    memory: Mapping[str, int]
    replicas: list[Any]
    running: dict[Any, tuple[str, Any]] = field(default_factory=dict)

    def do(self, maps: Sequence[str]) -> list[Any]:
        results: dict[str, Any] = {}
        waiting, idle = list(reversed(maps)), list(self.replicas)
        while waiting or self.running:
            self._begin(waiting, idle)
            (ref,), _ = ray.wait(list(self.running), num_returns=1)
            name, replica = self.running.pop(ref)
            try:
                results[name] = answer(ref)
            except DEATHS:
                if replica is None:
                    raise
                self.replicas.remove(replica)  # the pool sees for itself that it is dead
                waiting.append(name)
                continue
            if replica is not None:
                idle.append(replica)
        return [results[name] for name in maps]

    def _begin(self, waiting: list[str], idle: list[Any]) -> None:
        while waiting and idle:
            name, replica = waiting.pop(), idle.pop()
            self.running[replica.call.remote(self.function, name, *self.arguments)] = name, replica
        if not self.replicas:
            self._begin_tasks(waiting)

    def _begin_tasks(self, waiting: list[str]) -> None:
        """Tasks ask for no core of their own: replicas hold those. Their memory keeps a node from taking more of them
        than it can hold."""
        task = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", max_retries=TASK_RETRIES)(_on_one_thread)
        at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
        largest = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
        while waiting and len(self.running) < at_once:
            name = waiting.pop()
            needed = min(self.memory[name], largest)  # more than any node has would wait for ever
            ref = task.options(memory=needed).remote(self.function, name, *self.arguments)
            self.running[ref] = name, None


def _on_one_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(1)
    return function(*arguments)
