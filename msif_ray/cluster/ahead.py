"""Blocks in order, with a look at a few more."""

from collections import deque
from collections.abc import Iterator, Set
from itertools import islice

from msif_ray.corpus.reader import Block


class Ahead:
    """Blocks in order, with a look at a few more, of which a replica gets one that it has done before if there is one.

    Blocks that wait are in the driver's memory.
    """

    def __init__(self, blocks: Iterator[Block], length: int) -> None:
        self._blocks, self._length = blocks, length
        self._waiting: deque[Block] = deque()

    def take(self, done: Set[str]) -> Block | None:
        """The next block for a replica that has `done` some already; None when there are no more."""
        self._waiting.extend(islice(self._blocks, self._length - len(self._waiting)))
        chosen = next((block for block in self._waiting if block.id in done), None)
        if chosen is None:
            return self._waiting.popleft() if self._waiting else None
        self._waiting.remove(chosen)
        return chosen
