"""Groups of tracked maps whose factors fit in memory together: each group is a pass over the documents."""

from collections.abc import Mapping

import torch

# Of the memory that is free on a rank with its model loaded, what goes to factors by default. The rest is for the
# activations and gradients of a batch.
FREE_SHARE = 0.6

Shapes = Mapping[str, tuple[int, int]]
"""Tracked maps as `(out, columns)`, where columns counts the bias column."""


def factor_bytes(shape: tuple[int, int], itemsize: int) -> int:
    """Memory that fitting one map takes: two bases and the corrected sums (the covariances alone take less)."""
    out, columns = shape
    return (out * out + columns * columns + out * columns) * itemsize


def module_groups(shapes: Shapes, budget: int | None, itemsize: int = 4) -> list[tuple[str, ...]]:
    """The maps in order, in as few groups of neighbours as stay within `budget` bytes each; None: one group.

    A map that is over the budget by itself makes a group of its own.
    """
    groups: list[list[str]] = []
    filled = 0
    for name, shape in shapes.items():
        size = factor_bytes(shape, itemsize)
        if not groups or (budget is not None and filled + size > budget):
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return [tuple(group) for group in groups]


def accumulating_bytes(dtype: str) -> int:
    """Bytes per entry of sums, factors and directions of a model of this type: float32's at least."""
    return torch.promote_types(getattr(torch, dtype), torch.float32).itemsize
