"""Query gradients, carried back through the stages, in full or at low rank.

A query's gradient has at most as many ranks as it has tokens, so it is kept as its tokens'
activations and output gradients until it is carried back, one map at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from msif_ray.influence.batch import WindowKey
from msif_ray.influence.capture import Captured
from msif_ray.influence.directions import DenseDirections, Directions, LowRankDirections
from msif_ray.influence.eigen import symmetric_eigen
from msif_ray.influence.ekfac import Factor
from msif_ray.influence.response import Identity, Response

# A query's window 0 is the completion that it is about. Where it is about that rather than another, window 1 is the
# other: what is measured is log p(completion) − log p(other), so its gradient is taken off.
OTHER = 1


def sign(key: WindowKey) -> float:
    """How a query's window counts in its measurement, which is the sum of its windows' −log p, each times this."""
    return -1.0 if key.window == OTHER else 1.0


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

    @classmethod
    def of(cls, windows: Sequence["QueryTokens"]) -> "QueryTokens":
        """A query's windows as one: their gradients add up."""
        if len(windows) == 1:
            return windows[0]
        return cls(*(torch.cat([getattr(each, part.name) for each in windows]) for part in fields(cls)))


def query_tokens(captured: Captured, row: int) -> dict[str, QueryTokens]:
    """The tokens of one row of a captured batch, for every map, without those that carry no gradient."""
    return {name: _carrying(captured.activations(name)[row], captured.gradients(name)[row]) for name in captured.maps}


def map_tokens(captured: Captured, name: str) -> Iterator[QueryTokens]:
    """The tokens of every row of a captured batch at one map, without those that carry no gradient."""
    yield from map(_carrying, captured.activations(name), captured.gradients(name))


def _carrying(activations: Tensor, gradients: Tensor) -> QueryTokens:
    carrying = gradients.any(dim=1)
    return QueryTokens(activations[carrying], gradients[carrying])


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


def truncate(directions: Tensor, rank: int | None = None, energy: float | None = None) -> tuple[Directions, Tensor]:
    """The best low-rank form of directions `[queries, out, columns]` (Eckart–Young), and the share
    of each query's squared norm that it keeps, `[queries]` in [0, 1].

    `rank` fixes the rank; `energy` takes each query's smallest rank that keeps that share of it, so that no query
    depends on which others are asked. With neither, or where its vectors would be no smaller than itself, a query
    stays whole: dense where all of them do, and by `energy` with all its vectors (see `smaller_form`).
    """
    queries, out, columns = directions.shape
    if (rank is None and energy is None) or (rank is not None and stays_dense(rank, out, columns)):
        return DenseDirections(directions), torch.ones(queries, dtype=torch.float64)
    left, right, kept = zip(*(_cut(direction, rank, energy) for direction in directions), strict=True)
    ranks = torch.tensor([len(vectors) for vectors in left])
    return LowRankDirections(torch.cat(left), torch.cat(right), ranks), torch.tensor(kept, dtype=torch.float64)


def smaller_form(directions: Directions) -> Directions:
    """The same directions, dense where their vectors are no smaller."""
    if isinstance(directions, LowRankDirections):
        out, columns = directions.shape
        if directions.total_rank * (out + columns) >= len(directions) * out * columns:
            return DenseDirections(directions.dense)
    return directions


def _cut(direction: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """One direction `[out, columns]` as u_r `[rank, out]` and v_r `[rank, columns]`, and the share kept."""
    out, columns = direction.shape
    wide = direction if out <= columns else direction.T
    squares, vectors = singular_vectors(wide)
    total = float(squares.sum())
    shares = squares.cumsum(0) / (total or 1.0)
    if energy is not None:
        rank = min(int((shares < energy).sum()) + 1, len(squares))
        if stays_dense(rank, out, columns):
            rank = len(squares)
    rank = int(rank or 1) if total else 0
    kept = 1.0 if rank in (0, len(squares)) else min(1.0, float(shares[rank - 1]))
    short = vectors[:rank]
    long = (short @ wide.double()).to(direction.dtype)
    short = short.to(direction.dtype)
    return (short, long, kept) if out <= columns else (long, short, kept)


def singular_vectors(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values `[n]` of a matrix `[n, m]`, n ≤ m, the largest first, and its left singular vectors
    as rows, `[n, n]`; both in float64. Their products with the matrix are the right ones, scaled.

    For float32 they are the eigenvectors of the Gram matrix in float64, up to four times as fast as an SVD in
    float32. That squares the condition number, which does no harm: it leaves alone what is above the square root
    of float64's precision, and below that is only what rounding has put into a float32.
    """
    if wide.dtype == torch.float64:
        left, values, _ = torch.linalg.svd(wide, full_matrices=False)
        return values.square(), left.T
    wide = wide.double()
    squares, vectors = symmetric_eigen(wide @ wide.T)
    return squares.flip(0).clamp_min(0), vectors.flip(1).T


def stays_dense(rank: int, out: int, columns: int) -> bool:
    """Whether a direction's low-rank factors would be no smaller than itself."""
    return rank * (out + columns) >= out * columns
