"""Scores: the inner product of every carried-back query with every window's gradient.

Two contractions give the same number. *Materialised*: G = gᵀa per window, then one matrix
product with all queries. *Token by token*: (g·U)(a·V) per query and rank, never forming G. The
cheaper is chosen per map and batch by counting multiplications.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msif_ray.influence.capture import Captured
from msif_ray.influence.directions import DenseDirections, Directions, LowRankDirections, token_scores
from msif_ray.influence.ekfac import GRADIENT_ENTRIES, window_gradients
from msif_ray.influence.products import MANY, pairwise, wide_type

# What a multiplication of float32 numbers costs on a GPU, in those of the model's own bfloat16 vectors.
WIDE_COST = 8.0

# Entries of dense directions that low-rank queries may be expanded to and kept, all maps together (float32: 1 GB).
DENSE_ENTRIES = 2**28


def materialised_cost(tokens: int, out: int, columns: int, queries: int, norms: bool = True) -> int:
    """Multiplications per window to form G, multiply it with every query, and square it for its norm."""
    return (tokens + queries + int(norms)) * out * columns


def token_cost(tokens: int, out: int, columns: int, queries: int, rank: int, norms: bool = True) -> int:
    """Multiplications per window to score token by token, and for the norm without the queries."""
    norm = min(gram_cost(tokens, out, columns), materialised_cost(tokens, out, columns, queries=0)) if norms else 0
    return tokens * rank * queries * (out + columns + 1) + norm


def expansion_cost(directions: LowRankDirections, rows: int | None = None) -> float:
    """Multiplications per window to expand directions of low rank anew for as many rows as are formed at once."""
    out, columns = directions.shape
    entries = GRADIENT_ENTRIES.get(directions.left.device.type, GRADIENT_ENTRIES["cpu"])
    at_once = max(1, entries // (out * columns))
    return directions.total_rank * out * columns / (at_once if rows is None else min(rows, at_once))


def gram_cost(tokens: int, out: int, columns: int) -> int:
    """Multiplications per window of Σ_ts (a_t·a_s)(g_t·g_s)."""
    return tokens * tokens * (out + columns + 1)


@dataclass(frozen=True)
class Detailed:
    """Scores `[rows, queries]` and squared norms `[rows]` as of `Scorer.score`, with what they are sums of:
    `by_map` `[rows, queries, maps]` and, where asked for, `by_token` `[rows, queries, tokens]`; all in float64."""

    scores: Tensor
    norms: Tensor
    by_map: Tensor
    by_token: Tensor | None


@dataclass(frozen=True)
class Scorer:
    """Scores batches against the directions of every map.

    Directions of low rank are multiplied as they are, or expanded where that is cheaper: once for all as long as
    the total stays within `dense_entries`, anew for each product beyond that. With `dense_entries` 0 the mapping
    may be one that reads its directions when asked: each is asked for once per batch. Without `norms` those that it
    gives are NaN; queries of low rank may be scored without forming G then.
    """

    directions: Mapping[str, Directions]
    dense_entries: int = DENSE_ENTRIES
    norms: bool = True
    _may_keep: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        allowed, left = set(), self.dense_entries
        for name, directions in self.directions.items() if left else ():
            if isinstance(directions, LowRankDirections):
                out, columns = directions.shape
                entries = len(directions) * out * columns
                if entries <= left:
                    allowed.add(name)
                    left -= entries
        object.__setattr__(self, "_may_keep", frozenset(allowed))

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

    def detailed(self, captured: Captured, tokens: bool) -> Detailed:
        """As `score`, with every score's share of each map and, with `tokens`, of each position.

        With `tokens` every map is scored token by token, whatever that costs.
        """
        length = captured.batch.input_ids.shape[1]
        norms: Tensor | int = 0
        by_token: Tensor | int = 0
        by_map = []
        for name, directions in self.directions.items():
            if tokens:
                activations, gradients = captured.activations(name), captured.gradients(name)
                shares = token_scores(directions, activations, gradients).double()
                shares = shares.unflatten(2, (-1, length)).sum(2).transpose(0, 1)
                by_token = by_token + shares
                scores, squares = shares.sum(2), self._squares(activations, gradients)
            else:
                inputs, gradients = captured.vectors(name)
                scores, squares = self.score_map(name, directions, inputs, gradients, captured.maps[name].bias)
            by_map.append(scores.double())
            norms = norms + squares.double()
        together = torch.stack(by_map, dim=2)
        of_tokens = torch.as_tensor(by_token) if tokens else None
        return Detailed(together.sum(2), torch.as_tensor(norms), together, of_tokens)

    def pair_shares(self, captured: Captured, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The scores of chosen pairs `(row, query)` by position and by map: `[pairs, tokens]` and `[pairs, maps]`
        in float64, both of which sum to the score.

        The entry of position t is the part of the gradient that flows through token t's own activations, summed
        over maps and uses; maps are in the order of `directions`.
        """
        tokens = captured.batch.input_ids.shape[1]
        total = torch.zeros(len(pairs), tokens, dtype=torch.float64, device=captured.losses.device)
        by_map = total.new_zeros(len(pairs), len(self.directions))
        places: dict[int, list[int]] = {}
        for place, (_, query) in enumerate(pairs):
            places.setdefault(query, []).append(place)
        for index, (name, directions) in enumerate(self.directions.items()):
            activations, gradients = captured.activations(name), captured.gradients(name)
            for query, at in places.items():
                rows = [pairs[place][0] for place in at]
                shares = directions.part(query, query + 1).token_scores(activations[rows], gradients[rows])[0].double()
                total[at] += shares.reshape(len(at), -1, tokens).sum(1)
                by_map[at, index] = shares.sum(1)
        return total, by_map

    def materialises(self, name: str, tokens: int, rows: int | None = None) -> bool:
        """Whether the map's window gradients are formed, or scored token by token: of `rows` windows of so many
        tokens each (None: of as many as are formed at once)."""
        return self._materialises(name, self.directions[name], tokens, rows)

    def keeps(self, name: str) -> bool:
        """Whether the map's directions of low rank stay expanded where their window gradients are formed."""
        return name in self._may_keep

    def _materialises(
        self, name: str, directions: Directions, tokens: int, rows: int | None, wide_cost: float = 1.0
    ) -> bool:
        """`wide_cost`: what multiplications of window gradients cost in those of the model's vectors."""
        if isinstance(directions, DenseDirections):
            return True
        out, columns = directions.shape
        formed = materialised_cost(tokens, out, columns, 0, self.norms)
        met = float(len(directions) * out * columns)
        if not self.keeps(name):
            met += expansion_cost(directions, rows)
        return formed + wide_cost * met <= token_cost(tokens, out, columns, 1, directions.total_rank, self.norms)

    def score_map(
        self, name: str, directions: Directions, inputs: Tensor, gradients: Tensor, bias: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One map's scores `[rows, queries]` and squared norms `[rows]` from vectors `[rows, positions, in]` and
        `[rows, positions, out]`; with `bias` the constant 1 is still to be put behind the inputs."""
        rows, tokens = inputs.shape[:2]
        if isinstance(directions, LowRankDirections):
            narrow = inputs.is_cuda and inputs.dtype != wide_type(inputs.dtype)
            if not self._materialises(name, directions, tokens, rows, WIDE_COST if narrow else 1.0):
                return directions.scores(inputs, gradients, bias), self._squares(inputs, gradients, bias)
            if self.keeps(name):
                directions = DenseDirections(directions.dense)
        parts = []
        # Many queries are read from memory for every product: twice the rows halve that, and cost a cache a little.
        more = 2 if len(directions) >= MANY and not inputs.is_cuda else 1
        for products in window_gradients(inputs, gradients, bias, more, directions.transposed):
            scores, norms = directions.products(products), _unknown(products)
            if self.norms:
                flat = (products.mT if directions.transposed else products).flatten(1)
                norms = torch.linalg.vector_norm(flat, dim=1).square()
            parts.append((scores, norms))
        return torch.cat([scores for scores, _ in parts]), torch.cat([norms for _, norms in parts])

    def _squares(self, inputs: Tensor, gradients: Tensor, bias: bool = False) -> Tensor:
        return squared_norms(inputs, gradients, bias) if self.norms else _unknown(gradients)


def _unknown(rows: Tensor) -> Tensor:
    """The norm of each row, not computed."""
    return torch.full((len(rows),), torch.nan, device=rows.device)


def squared_norms(inputs: Tensor, gradients: Tensor, bias: bool = False) -> Tensor:
    """‖Σ_t g_t a_tᵀ‖² of each row, `[rows]`, by Gram matrices where the rows are short."""
    tokens, out, columns = inputs.shape[1], gradients.shape[2], inputs.shape[2] + int(bias)
    if gram_cost(tokens, out, columns) < materialised_cost(tokens, out, columns, queries=0):
        return ((pairwise(inputs) + float(bias)) * pairwise(gradients)).sum((1, 2)).clamp_min(0)
    return torch.cat([g.square().sum((1, 2)) for g in window_gradients(inputs, gradients, bias)])
