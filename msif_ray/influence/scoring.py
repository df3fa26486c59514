"""Scores: the inner product of every carried-back query with every window's gradient.

Two contractions give the same number. *Materialised*: G = gᵀa per window, then one matrix
product with all queries. *Token by token*: (g·U)(a·V) per query and rank, never forming G. The
cheaper is chosen per map and batch by counting multiplications.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from msif_ray.influence.capture import Captured
from msif_ray.influence.ekfac import window_gradients
from msif_ray.influence.products import inner, wide, with_ones

# Entries of dense directions that low-rank queries may be expanded to, all maps together (float32: 1 GB).
DENSE_ENTRIES = 2**28


@dataclass(frozen=True)
class DenseDirections:
    """Carried-back queries of one map as they are: `matrix` `[queries, out, columns]`."""

    matrix: Tensor

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def dense(self) -> Tensor:
        return self.matrix

    def token_scores(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """g_tᵀ D a_t, `[queries, rows, tokens]`, whose sum over tokens is the score."""
        return ((gradients @ self.matrix[:, None]) * activations).sum(-1)


@dataclass(frozen=True)
class LowRankDirections:
    """Carried-back queries of one map as Σ_r u_r v_rᵀ: `left` holds the u_r `[queries, rank, out]`,
    `right` the v_r `[queries, rank, columns]`."""

    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.left)

    @cached_property
    def dense(self) -> Tensor:
        """`[queries, out, columns]`."""
        return self.left.transpose(1, 2) @ self.right

    def token_scores(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Σ_r (g_t·u_r)(a_t·v_r), `[queries, rows, tokens]`, whose sum over tokens is the score."""
        left = torch.einsum("bto,qro->qbtr", gradients, self.left)
        right = torch.einsum("bti,qri->qbtr", activations, self.right)
        return (left * right).sum(-1)


Directions = DenseDirections | LowRankDirections


def join(parts: Sequence[Directions]) -> Directions:
    """The queries of all parts, in order; of low rank where all parts are, with zeros up to the largest rank."""
    if len(parts) == 1:
        return parts[0]
    low_rank = [part for part in parts if isinstance(part, LowRankDirections)]
    if len(low_rank) < len(parts):
        return DenseDirections(torch.cat([part.dense for part in parts]))
    rank = max(part.left.shape[1] for part in low_rank)
    return LowRankDirections(
        torch.cat([functional.pad(part.left, (0, 0, 0, rank - part.left.shape[1])) for part in low_rank]),
        torch.cat([functional.pad(part.right, (0, 0, 0, rank - part.right.shape[1])) for part in low_rank]),
    )


def materialised_cost(tokens: int, out: int, columns: int, queries: int) -> int:
    """Multiplications per window to form G, multiply it with every query, and square it."""
    return (tokens + queries + 1) * out * columns


def token_cost(tokens: int, out: int, columns: int, queries: int, rank: int) -> int:
    """Multiplications per window to score token by token, and for the norm without the queries."""
    norm = min(gram_cost(tokens, out, columns), materialised_cost(tokens, out, columns, queries=0))
    return tokens * rank * queries * (out + columns + 1) + norm


def gram_cost(tokens: int, out: int, columns: int) -> int:
    """Multiplications per window of Σ_ts (a_t·a_s)(g_t·g_s)."""
    return tokens * tokens * (out + columns + 1)


@dataclass(frozen=True)
class Scorer:
    """Scores batches against the directions of every map.

    Directions of low rank are expanded to dense ones where that is cheaper and their total stays
    within `dense_entries`.
    """

    directions: Mapping[str, Directions]
    dense_entries: int = DENSE_ENTRIES
    _may_expand: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        allowed, left = set(), self.dense_entries
        for name, directions in self.directions.items():
            if isinstance(directions, LowRankDirections):
                entries = len(directions) * directions.left.shape[2] * directions.right.shape[2]
                if entries <= left:
                    allowed.add(name)
                    left -= entries
        object.__setattr__(self, "_may_expand", frozenset(allowed))

    def score(self, captured: Captured) -> tuple[Tensor, Tensor]:
        """Scores `[rows, queries]` (nats per unit of weight, DESIGN.md §2) and the squared Frobenius
        norms `[rows]` of the windows' gradients over the tracked maps, both in float64."""
        scores: Tensor | int = 0
        norms: Tensor | int = 0
        for name, directions in self.directions.items():
            inputs, gradients = captured.vectors(name)
            map_scores, map_norms = self.score_map(name, directions, inputs, gradients, captured.maps[name].bias)
            scores = scores + map_scores.double()
            norms = norms + map_norms.double()
        return torch.as_tensor(scores), torch.as_tensor(norms)

    def token_scores(self, captured: Captured, query: int) -> Tensor:
        """One query's score by position, `[rows, tokens]` in float64, summed over maps and uses.

        The entry of position t is the part of the gradient that flows through token t's own
        activations; over positions it sums to the score.
        """
        rows, tokens = captured.batch.input_ids.shape
        total = torch.zeros(rows, tokens, dtype=torch.float64, device=captured.losses.device)
        for name, directions in self.directions.items():
            scores = _one_query(directions, query).token_scores(captured.activations(name), captured.gradients(name))[0]
            total += scores.double().reshape(rows, -1, tokens).sum(1)
        return total

    def materialises(self, name: str, tokens: int) -> bool:
        """Whether the map's window gradients of that many tokens are formed, or scored token by token."""
        directions = self.directions[name]
        if isinstance(directions, DenseDirections):
            return True
        queries, rank, out = directions.left.shape
        columns = directions.right.shape[2]
        return name in self._may_expand and materialised_cost(tokens, out, columns, queries) <= token_cost(
            tokens, out, columns, queries, rank
        )

    def score_map(
        self, name: str, directions: Directions, inputs: Tensor, gradients: Tensor, bias: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One map's scores `[rows, queries]` and squared norms `[rows]` from vectors `[rows, positions, in]` and
        `[rows, positions, out]`; with `bias` the constant 1 is still to be put behind the inputs."""
        if not self.materialises(name, inputs.shape[1]):
            activations = with_ones(wide(inputs)) if bias else wide(inputs)
            scores = directions.token_scores(activations, wide(gradients)).sum(2).T
            return scores, squared_norms(activations, wide(gradients))
        parts = []
        for products in window_gradients(inputs, gradients, bias):
            norms = torch.linalg.vector_norm(products.flatten(1), dim=1).square()
            parts.append((inner(products, directions.dense), norms))
        return torch.cat([scores for scores, _ in parts]), torch.cat([norms for _, norms in parts])


def squared_norms(activations: Tensor, gradients: Tensor) -> Tensor:
    """‖Σ_t g_t a_tᵀ‖² of each row, `[rows]`, by Gram matrices where the rows are short."""
    tokens, out, columns = activations.shape[1], gradients.shape[2], activations.shape[2]
    if gram_cost(tokens, out, columns) < materialised_cost(tokens, out, columns, queries=0):
        gram = (activations @ activations.transpose(1, 2)) * (gradients @ gradients.transpose(1, 2))
        return gram.sum((1, 2)).clamp_min(0)
    return torch.cat([g.square().sum((1, 2)) for g in window_gradients(activations, gradients)])


def _one_query(directions: Directions, query: int) -> Directions:
    if isinstance(directions, DenseDirections):
        return DenseDirections(directions.matrix[query : query + 1])
    return LowRankDirections(directions.left[query : query + 1], directions.right[query : query + 1])
