"""Carried-back queries of one map, as they are or at low rank, and the products of many of them at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from msif_ray.influence.products import inner, times

# Entries of intermediate products held at once: of every token with every low-rank vector, and of directions of low
# rank that are expanded for one product (float32: 16 MB and 256 MB).
PRODUCT_ENTRIES = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True)
class DenseDirections:
    """Carried-back queries of one map as they are: `matrix` `[queries, out, columns]`; `laid_out` where its transpose
    is what is contiguous."""

    matrix: Tensor

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def dense(self) -> Tensor:
        return self.matrix

    def part(self, start: int, stop: int) -> "DenseDirections":
        """The queries from `start` to before `stop`."""
        return DenseDirections(self.matrix[start:stop])

    @property
    def transposed(self) -> bool:
        """Whether the matrix is `[queries, columns, out]` in memory."""
        return self.matrix.mT.is_contiguous()

    def products(self, gradients: Tensor) -> Tensor:
        """⟨D, G⟩ of window gradients `[rows, out, columns]`, `[rows, queries]`: no copy of those in the same order."""
        if self.transposed:
            return inner(gradients.mT, self.matrix.mT)
        return inner(gradients, self.matrix)

    def token_scores(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """g_tᵀ D a_t, `[queries, rows, tokens]`, whose sum over tokens is the score."""
        return ((gradients @ self.matrix[:, None]) * activations).sum(-1)


@dataclass(frozen=True)
class LowRankDirections:
    """Carried-back queries of one map as Σ_r u_r v_rᵀ, the vectors of all queries in two matrices.

    `left` holds the u_r `[Σ ranks, out]`, `right` the v_r `[Σ ranks, columns]`, one query's after the other's;
    `ranks` `[queries]` (int64, on the CPU) says how many are whose. Ranks may differ and may be zero.
    """

    left: Tensor
    right: Tensor
    ranks: Tensor

    @classmethod
    def stacked(cls, left: Tensor, right: Tensor) -> Self:
        """Of equal ranks: `left` `[queries, rank, out]` and `right` `[queries, rank, columns]`."""
        return cls(left.flatten(0, 1), right.flatten(0, 1), torch.full((len(left),), left.shape[1]))

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, columns)`."""
        return self.left.shape[1], self.right.shape[1]

    @property
    def transposed(self) -> bool:
        """Whether they are `[queries, columns, out]` in memory once expanded."""
        return True

    @property
    def total_rank(self) -> int:
        return len(self.left)

    @cached_property
    def dense(self) -> Tensor:
        """`[queries, out, columns]`, kept once computed."""
        return self._expanded()

    @cached_property
    def _starts(self) -> list[int]:
        """The first vector of each query, and the number of all."""
        return [0, *self.ranks.cumsum(0).tolist()]

    @cached_property
    def _owners(self) -> Tensor:
        """Whose each vector is, `[Σ ranks]`, on the device of the vectors."""
        return torch.repeat_interleave(torch.arange(len(self)), self.ranks).to(self.left.device)

    def part(self, start: int, stop: int) -> "LowRankDirections":
        """The queries from `start` to before `stop`; no copy."""
        first, last = self._starts[start], self._starts[stop]
        return LowRankDirections(self.left[first:last], self.right[first:last], self.ranks[start:stop])

    def products(self, gradients: Tensor) -> Tensor:
        """⟨D, G⟩ of window gradients `[rows, out, columns]`, `[rows, queries]`: some queries expanded at a time."""
        out, columns = self.shape
        at_once = max(1, _entries(gradients) // (out * columns))
        parts = (self.part(start, min(start + at_once, len(self))) for start in range(0, len(self), at_once))
        return torch.cat([inner(gradients.mT, part._expanded().mT) for part in parts], dim=1)

    def scores(self, inputs: Tensor, gradients: Tensor, bias: bool) -> Tensor:
        """Σ_t Σ_r (g_t·u_r)(a_t·v_r), `[rows, queries]` in float64, never forming a window's gradient.

        Each side is one matrix product of all tokens with the vectors of many queries. With `bias` an a is an input
        with the constant 1 behind it.
        """
        rows, tokens = inputs.shape[:2]
        a, g = inputs.flatten(0, 1), gradients.flatten(0, 1)
        at_once = max(1, _entries(a) // (rows * tokens))
        parts = []
        for left, right in zip(self.left.split(at_once), self.right.split(at_once), strict=True):
            met = times(a, right[:, :-1].T, right[:, -1]) if bias else times(a, right.T)
            parts.append(times(g, left.T).mul_(met).unflatten(0, (rows, tokens)).sum(1))
        by_vector = torch.cat(parts, dim=1)
        # In float64, since on a GPU the order of these sums is anyone's.
        totals = torch.zeros(rows, len(self), dtype=torch.float64, device=a.device)
        return totals.index_add_(1, self._owners, by_vector.double())

    def token_scores(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Σ_r (g_t·u_r)(a_t·v_r), `[queries, rows, tokens]`, whose sum over tokens is the score."""
        by_vector = (gradients @ self.left.T) * (activations @ self.right.T)
        totals = by_vector.new_zeros(*by_vector.shape[:2], len(self))
        return totals.index_add_(2, self._owners, by_vector).permute(2, 0, 1)

    def _expanded(self) -> Tensor:
        """`[queries, out, columns]`, with zero vectors up to the largest rank."""
        sizes = self.ranks.tolist()
        left, right = (pad_sequence(side.split(sizes), batch_first=True) for side in (self.left, self.right))
        return (right.mT @ left).mT


Directions = DenseDirections | LowRankDirections


def laid_out(directions: Directions) -> Directions:
    """The same, in memory as window gradients are formed in the shortest time: those that meet many batches."""
    if isinstance(directions, LowRankDirections) or directions.transposed:
        return directions
    return DenseDirections(directions.matrix.mT.contiguous().mT)


def token_scores(directions: Directions, activations: Tensor, gradients: Tensor) -> Tensor:
    """The scores of all queries by position, `[queries, rows, positions]`, with a bounded number of intermediate
    products at once: of `activations` `[rows, positions, columns]` and `gradients` `[rows, positions, out]`."""
    rows, positions, columns = activations.shape
    wide = columns if isinstance(directions, DenseDirections) else int(directions.ranks.max())
    at_once = max(1, _entries(activations) // max(1, rows * positions * wide))
    starts = range(0, len(directions), at_once)
    parts = [directions.part(start, min(start + at_once, len(directions))) for start in starts]
    return torch.cat([part.token_scores(activations, gradients) for part in parts])


def _entries(like: Tensor) -> int:
    return PRODUCT_ENTRIES.get(like.device.type, PRODUCT_ENTRIES["cpu"])


def join(parts: Sequence[Directions]) -> Directions:
    """The queries of all parts, in order; of low rank where all parts are."""
    if len(parts) == 1:
        return parts[0]
    low_rank = [part for part in parts if isinstance(part, LowRankDirections)]
    if len(low_rank) < len(parts):
        return DenseDirections(torch.cat([part.dense for part in parts]))
    return LowRankDirections(
        torch.cat([part.left for part in low_rank]),
        torch.cat([part.right for part in low_rank]),
        torch.cat([part.ranks for part in low_rank]),
    )
