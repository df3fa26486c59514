"""A function of many files, of several at a time and in their order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

# On object storage a file takes a few round trips, however small it is: of many each waits for its own.
AT_ONCE = 8

Item = TypeVar("Item")
Found = TypeVar("Found")


def in_order(function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """What the function gives of each item, in the order of the items.

    It is called by threads, AT_ONCE items ahead: so many results are in memory. What it raises is raised when its turn
    has come.
    """
    waiting: deque[Future[Found]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
