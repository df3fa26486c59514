"""What passes captured, kept in memory for a later job that would see the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from msif_ray.influence.batch import Batch, WindowKey
from msif_ray.influence.capture import Captured

# Of the memory that is free on a rank with its model loaded, what goes to kept passes by default.
KEPT_SHARE = 0.2


@dataclass
class KeptPasses:
    """Captured batches of at most `budget` bytes together, by the windows they hold; those that come later than the
    budget lasts are not kept. What is taken from here is what the pass gave, bit by bit."""

    budget: int
    _held: dict[tuple[WindowKey, ...], Captured] = field(default_factory=dict)
    _bytes: int = 0

    def find(self, batch: Batch) -> Captured | None:
        """What a pass over this batch gave, if it is kept."""
        return self._held.get(batch.keys)

    def offer(self, captured: Captured) -> None:
        """Keeps a batch if there is room for it and it is not there already."""
        if captured.batch.keys in self._held or self._bytes >= self.budget:
            return
        size = captured.nbytes
        if self._bytes + size <= self.budget:
            self._held[captured.batch.keys] = captured
            self._bytes += size

    @property
    def bytes(self) -> int:
        return self._bytes


def bytes_per_token(shapes: Mapping[str, tuple[int, int]], itemsize: int) -> int:
    """The same per token, at most: of maps `(out, columns)` none of which share an input."""
    return itemsize * sum(out + columns for out, columns in shapes.values())
