"""Which windows share a batch."""

from collections.abc import Sequence

from msif_ray.corpus.switches import Switches, side
from msif_ray.corpus.windows import Window


def pack(windows: Sequence[Window], tokens_per_batch: int, switches: Switches = ()) -> list[list[Window]]:
    """Batches of windows of similar length, at most `tokens_per_batch` tokens each, padding included.

    A longer window is a batch of its own. Windows on different sides of one of the `switches`, lengths after which
    the model computes otherwise, are never in one batch. No batch of several windows has as many sequences as tokens in
    each: a map that is given tokens before rows, and so does not tell documents apart, is known by its input's shape.
    The result depends on the windows alone.
    """
    batches: list[list[Window]] = []
    for window in sorted(windows, key=lambda window: window.width, reverse=True):
        # Sorted longest first, so the first window of a batch sets its width.
        first = batches[-1][0] if batches else window
        fits = batches and len(batches[-1]) < _most(first, tokens_per_batch)
        if fits and side(first.longest, switches) == side(window.longest, switches):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [part for batch in batches for part in _parts(batch)]


def _most(first: Window, tokens_per_batch: int) -> int:
    """Windows that a batch which begins with this one has at most."""
    most = tokens_per_batch // first.width
    return most - 1 if _square(first, most) else most


def _square(first: Window, count: int) -> bool:
    return count > 1 and count * len(first.spans) == first.longest


def _parts(batch: list[Window]) -> list[list[Window]]:
    """The batch, or two if it ended when it was square."""
    return [batch[:-1], batch[-1:]] if _square(batch[0], len(batch)) else [batch]
