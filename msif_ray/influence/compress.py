"""Document gradients at low rank, for an index that later queries are scored against without a backward pass.

A document's gradient of one map, G = Σ_t g_t a_tᵀ, has at most as many ranks as tokens. It is kept as fewer
pseudo-tokens (g_k, a_k), k ≤ rank, so that whatever scores tokens scores an index too. Low-rank factors per module
are the idea of LoRIF (Li et al. 2026, arXiv 2601.21929), which truncates random projections of G. Here the
coordinates are the eigenbasis of the scored stage, whole: leaving out half of the directions of either side, those
of least energy, cost more agreement than leaving out all ranks but one (docs/index.md).

Which ranks matter is a question of the metric. A score is a product with the inverse curvature, so the metric is
‖W ∘ (Q_Sᵀ G Q_A)‖ with W = (Λ + c)^(-1/2). Elementwise, W makes a full matrix of a low-rank G; the closest separable
weights w_S w_Aᵀ keep its rank. So the truncation is one of a few tokens instead of `[out, columns]`, it is exact once
the rank reaches the number of tokens, and at every rank its scores agreed better than those of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from msif_ray.influence.directions import DenseDirections, Directions, LowRankDirections
from msif_ray.influence.ekfac import Basis, Factor

# Tokens are first reduced to this many times the rank in the plain metric, and only these are rotated: rotating
# all tokens of a long document costs more than the pass that made them.
REDUCED = 4
# Products with G and Gᵀ by which a random start is turned towards the largest directions of a long document.
ITERATIONS = 2


@dataclass(frozen=True)
class Metric:
    """The norm ‖(w_S w_Aᵀ) ∘ (Q_Sᵀ G Q_A)‖ of one map's gradients; weights are `[out]` and `[columns]`, over zero."""

    basis: Basis
    gradient_weights: Tensor
    activation_weights: Tensor

    @classmethod
    def of(cls, factor: Factor, damping: float) -> "Metric":
        """The separable weights closest to (Λ + c)^(-1/2), in the least squares of their logarithms.

        `damping` c is an eigenvalue, over zero.
        """
        logs = -0.5 * (factor.eigenvalues.double() + damping).log()
        gradients = torch.exp(logs.mean(1) - logs.mean() / 2)
        activations = torch.exp(logs.mean(0) - logs.mean() / 2)
        return cls(factor.basis, gradients.to(factor.eigenvalues), activations.to(factor.eigenvalues))

    def whiten(self, activations: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[..., columns]` and `[..., out]` in coordinates in which the norm is the plain one."""
        return (
            activations @ self.basis.activations * self.activation_weights,
            gradients @ self.basis.gradients * self.gradient_weights,
        )

    def directions(self, directions: Directions) -> Directions:
        """Query directions in the dual coordinates: ⟨D, G⟩ is ⟨directions(D), whiten(G)⟩, whatever D was carried
        back with."""
        left = self.basis.gradients / self.gradient_weights
        right = self.basis.activations / self.activation_weights
        if isinstance(directions, LowRankDirections):
            return LowRankDirections(directions.left @ left, directions.right @ right, directions.ranks)
        return DenseDirections(left.T @ directions.matrix @ right)


def compress(metric: Metric, activations: Tensor, gradients: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Every document's pseudo-tokens in `metric`'s coordinates, `[documents, k, columns]` and `[documents, k, out]`.

    From tokens `[documents, tokens, columns]` and `[documents, tokens, out]`; k is the rank, or the number of tokens
    where that is no larger, and then they are the tokens. Σ_k g_k a_kᵀ is the best approximation of that rank in
    the metric (Eckart–Young); of documents longer than `REDUCED` ranks nearly so.
    """
    if activations.shape[1] > rank:
        activations, gradients = reduce_tokens(activations, gradients, REDUCED * rank)
    activations, gradients = metric.whiten(activations, gradients)
    return truncate_tokens(activations, gradients, rank) if activations.shape[1] > rank else (activations, gradients)


def truncate_tokens(activations: Tensor, gradients: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest `rank` singular directions of every Σ_t g_t a_tᵀ as pseudo-tokens; shapes as in `compress`."""
    left, left_core = torch.linalg.qr(gradients.transpose(1, 2))
    right, right_core = torch.linalg.qr(activations.transpose(1, 2))
    u, values, v = torch.linalg.svd(left_core @ right_core.transpose(1, 2), full_matrices=False)
    u, v = u[:, :, :rank] * values[:, None, :rank], v[:, :rank].transpose(1, 2)
    return (right @ v).transpose(1, 2), (left @ u).transpose(1, 2)


def reduce_tokens(activations: Tensor, gradients: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """As many pseudo-tokens as `size`, where there are more tokens: of the range of G found by subspace iteration
    (Halko et al. 2011, algorithm 4.4). Exact where `size` reaches the rank of G."""
    tokens, columns, out = activations.shape[1], activations.shape[2], gradients.shape[2]
    size = min(size, columns, out)
    if tokens <= size:
        return activations, gradients
    generator = torch.Generator().manual_seed(0)  # the same start for every document, whatever is computed beside it
    start = torch.randn(columns, size, generator=generator, dtype=torch.float64).to(activations)
    left = _orthonormal(gradients.transpose(1, 2) @ (activations @ start))
    for _ in range(ITERATIONS):
        right = _orthonormal(activations.transpose(1, 2) @ (gradients @ left))
        left = _orthonormal(gradients.transpose(1, 2) @ (activations @ right))
    return (gradients @ left).transpose(1, 2) @ activations, left.transpose(1, 2)


def _orthonormal(vectors: Tensor) -> Tensor:
    return torch.linalg.qr(vectors)[0]


def together(owners: Sequence[str]) -> list[tuple[list[str], list[list[int]]]]:
    """The owners with the rows of each, those of as many rows together, in the order in which they first occur."""
    rows: dict[str, list[int]] = {}
    for row, owner in enumerate(owners):
        rows.setdefault(owner, []).append(row)
    groups: dict[int, tuple[list[str], list[list[int]]]] = {}
    for owner, own in rows.items():
        names, lists = groups.setdefault(len(own), ([], []))
        names.append(owner)
        lists.append(own)
    return list(groups.values())


def joined_rows(tokens: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Some rows' tokens `[rows, tokens, size]` one after the other: `[lists of rows, all tokens, size]`."""
    return tokens[torch.tensor(rows, device=tokens.device)].flatten(1, 2)


@dataclass(frozen=True)
class Packed:
    """Pseudo-tokens in few bytes: `activations` `[documents, k, columns]` and `gradients` `[documents, k, out]`, each
    vector divided by its largest entry (times 127 in int8); `scales` `[documents, k]`, the product of both divisors."""

    activations: Tensor
    gradients: Tensor
    scales: Tensor

    @classmethod
    def of(cls, activations: Tensor, gradients: Tensor, dtype: torch.dtype) -> "Packed":
        """Rounds to `dtype`, int8 or a float. No entry overflows, and what underflows is 1e-7 of the largest."""
        most = 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)
        rounded, scales = [], torch.ones_like(activations[..., 0])
        for vectors in (activations, gradients):
            largest = vectors.abs().amax(-1, keepdim=True) / most
            divisors = torch.where(largest > 0, largest, 1.0)
            entries = vectors / divisors
            rounded.append((entries if dtype.is_floating_point else entries.round()).to(dtype))
            scales = scales * divisors[..., 0]
        return cls(rounded[0], rounded[1], scales)

    @classmethod
    def join(cls, parts: Sequence["Packed"]) -> "Packed":
        """The documents of all parts, with zeros up to the largest rank."""
        rank = max(part.scales.shape[1] for part in parts)
        padded = [part.padded(rank) for part in parts]
        return cls(*(torch.cat([getattr(part, each.name) for part in padded]) for each in fields(cls)))

    def padded(self, rank: int) -> "Packed":
        """With zeros up to `rank` pseudo-tokens."""
        extra = rank - self.scales.shape[1]
        return Packed(
            functional.pad(self.activations, (0, 0, 0, extra)),
            functional.pad(self.gradients, (0, 0, 0, extra)),
            functional.pad(self.scales, (0, extra)),
        )

    def chosen(self, rows: Sequence[int]) -> "Packed":
        """Some rows, in that order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.scales.device)
        return Packed(self.activations[index], self.gradients[index], self.scales[index])

    def to(self, device: torch.device | str) -> "Packed":
        return Packed(self.activations.to(device), self.gradients.to(device), self.scales.to(device))

    def unpack(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Activations and gradients as `compress` gave them, up to rounding."""
        return self.activations.to(dtype) * self.scales[..., None].to(dtype), self.gradients.to(dtype)
