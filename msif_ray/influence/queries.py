"""Query gradients, carried back through the stages, in full or at low rank.

A query's gradient has at most as many ranks as it has tokens, so it is kept as its tokens'
activations and output gradients until it is carried back, one map at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msif_ray.influence.capture import Captured
from msif_ray.influence.ekfac import Factor
from msif_ray.influence.response import Identity, Response
from msif_ray.influence.scoring import DenseDirections, LowRankDirections


@dataclass(frozen=True)
class QueryTokens:
    """One query's gradient at one map as its tokens: `activations` `[tokens, columns]` and
    `gradients` `[tokens, out]`."""

    activations: Tensor
    gradients: Tensor

    @property
    def gradient(self) -> Tensor:
        """G = Σ_t g_t a_tᵀ, `[out, columns]`."""
        return self.gradients.T @ self.activations


def query_tokens(captured: Captured, row: int) -> dict[str, QueryTokens]:
    """The tokens of one row of a captured batch, for every map, without those that carry no gradient."""
    tokens = {}
    for name in captured.maps:
        gradients = captured.gradients(name)[row]
        carrying = gradients.any(dim=1)
        tokens[name] = QueryTokens(captured.activations(name)[row][carrying], gradients[carrying])
    return tokens


def carry_back(gradients: Tensor, stages: Sequence[tuple[Factor | None, Response]]) -> Tensor:
    """Query directions of one map, `[queries, out, columns]`: gradients through each stage's response.

    `stages` begins with the last stage and ends with the scored one. With g_q at the last stage's
    model the result D has score(q, z) = ⟨D, ∇ℓ(z)⟩ (DESIGN.md §2; Bao et al. 2025, eq. 10). A
    factor may be None only where the response is the identity; ValueError otherwise, since a stage
    passed over in silence would be another score.
    """
    for factor, response in stages:
        if factor is not None:
            gradients = factor.apply(response, gradients)
        elif not isinstance(response, Identity):
            raise ValueError(f"{response} needs a factor")
    return gradients


def truncate(
    directions: Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[DenseDirections | LowRankDirections, Tensor]:
    """The best low-rank form of directions `[queries, out, columns]` (Eckart–Young), and the share
    of each query's squared norm that it keeps, `[queries]` in [0, 1].

    `rank` fixes the rank; `energy` takes the smallest rank that keeps that share for every query.
    With neither, or where the factors would be no smaller, the directions stay as they are.
    """
    out, columns = directions.shape[1:]
    everything = torch.ones(len(directions), dtype=torch.float64)
    if rank is None and energy is None:
        return DenseDirections(directions), everything
    if rank is not None and stays_dense(rank, out, columns):
        return DenseDirections(directions), everything
    left, values, right = torch.linalg.svd(directions, full_matrices=False)
    squares = values.double().square()
    total = squares.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    kept = squares.cumsum(1) / total[:, None]
    if rank is None:
        missing = (kept < float(energy or 1.0)) & (squares.sum(1) > 0)[:, None]
        rank = min(int(missing.sum(1).max()) + 1, values.shape[1])
        if stays_dense(rank, out, columns):
            return DenseDirections(directions), everything
    scaled = left[:, :, :rank] * values[:, None, :rank]
    kept_shares = torch.where(squares.sum(1) > 0, kept[:, rank - 1], 1.0).clamp_max(1.0)
    return LowRankDirections(scaled.transpose(1, 2).contiguous(), right[:, :rank].contiguous()), kept_shares


def stays_dense(rank: int, out: int, columns: int) -> bool:
    """Whether a direction's low-rank factors would be no smaller than itself."""
    return rank * (out + columns) >= out * columns
