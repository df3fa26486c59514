"""Independent pieces of work side by side, each on one thread of a CPU."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Iterable[T], device: torch.device) -> list[R]:
    """What `work` gives for every item: on a CPU of several threads one item per thread, elsewhere one after another.

    A product so small that it does not occupy two threads well occupies one. Items must not touch one another's
    results; then these do not depend on the order.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return [work(item) for item in items]
    return list(_pool(threads).map(work, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that compute with one thread each. They live as long as the process, as PyTorch's own do."""
    pool = ThreadPoolExecutor(threads, "msif-compute")
    started = Barrier(threads + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # which is when a thread takes its number over, or it would take a later one
        started.wait()

    for _ in range(threads):
        pool.submit(begin)
    started.wait()
    # The number is also what threads begin with that have none of their own yet.
    torch.set_num_threads(threads)
    return pool
