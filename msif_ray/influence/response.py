"""Responses: what a stage does to each eigenvalue of its Gauss-Newton Hessian (DESIGN.md §2).

Every stage of the score is an eigenbasis plus one of these functions. Each maps a tensor of
eigenvalues (any shape, non-negative) to a tensor of the same shape.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Response(Protocol):
    """A function of the eigenvalues of one map's Gauss-Newton Hessian."""

    def __call__(self, eigenvalues: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DampedInverse:
    """1 / (λ + c): the stage whose documents are scored (Grosse et al. 2023, eq. 20)."""

    damping: float

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        return 1.0 / (eigenvalues + self.damping)


@dataclass(frozen=True)
class Proximal:
    """α / (λ + α): a later stage that stays near where it began (Bao et al. 2025, eq. 9 times α).

    Dimensionless, in (0, 1]; an infinite α gives the identity, the single-stage influence.
    """

    alpha: float

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        return 1.0 / (1.0 + eigenvalues / self.alpha)


@dataclass(frozen=True)
class UnrolledFilter:
    """exp(−ηTλ): a later stage trained by T steps at rate η (Bae et al. 2024, SOURCE)."""

    rate_times_steps: float

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        return torch.exp(-self.rate_times_steps * eigenvalues)


@dataclass(frozen=True)
class UnrolledInverse:
    """(1 − exp(−ηTλ)) / λ, which is ηT at λ = 0: the scored stage, trained by T steps at rate η."""

    rate_times_steps: float

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        time = self.rate_times_steps
        tiny = torch.finfo(eigenvalues.dtype).tiny
        safe = eigenvalues.clamp_min(tiny)
        return torch.where(eigenvalues > tiny, -torch.expm1(-time * safe) / safe, time)


@dataclass(frozen=True)
class Identity:
    """1: leaves the stage out (the ablations and the baselines)."""

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        return torch.ones_like(eigenvalues)


@dataclass(frozen=True)
class Nothing:
    """0: leaves a map out, of whose curvature nothing is known."""

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        return torch.zeros_like(eigenvalues)
