"""Ranks that hold one model together, each a process of its own as on a cluster, but without Ray."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from msif_ray.cluster.sharding import ENVIRONMENT, RankGroup, join


def run(world: int, work: Callable[..., Any], *arguments: Any, seconds: float = 240) -> list[Any]:
    """What `work(*arguments)` returns on each rank of a group that has met; `work` is a module's function."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)  # read when a process starts, so this one must not have it
    try:
        with context.Pool(world, maxtasksperchild=1) as pool:
            groups = [RankGroup(rank, world, "127.0.0.1", port) for rank in range(world)]
            calls = [pool.apply_async(_rank, (group, work, arguments)) for group in groups]
            return [call.get(seconds) for call in calls]
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank(group: RankGroup, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    join(group, torch.device("cpu"))
    return work(*arguments)
