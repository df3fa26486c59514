"""Conjugate gradients on the damped Gauss-Newton Hessian, with damped EK-FAC as preconditioner and starting point.

Of every query a system (H + C) x = b, H over all tracked maps together and C the damping, or α, of each map on the
diagonal: what carrying back through a stage asks for, where EK-FAC gives M⁻¹ b instead (Hestenes and Stiefel 1952; as
preconditioned Golub and Van Loan 2013, §11.5.2). H is met only through products, whoever computes them.

The vectors of a map are `[queries, out, columns]`, and what is summed over maps are numbers by query, `[queries]`
(float64): so every map may be elsewhere.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from msif_ray.influence.ekfac import Factor
from msif_ray.influence.response import DampedInverse

Vectors = dict[str, Tensor]
"""By map, `[queries, out, columns]`."""


@dataclass(frozen=True)
class System:
    """One map's part of H + C: its factor, for the preconditioner, and its damping."""

    factor: Factor
    damping: float

    def precondition(self, vectors: Tensor) -> Tensor:
        """M⁻¹ v = (H_EK-FAC + c)⁻¹ v."""
        return self.factor.apply(DampedInverse(self.damping), vectors)

    def damped(self, product: Tensor, vectors: Tensor) -> Tensor:
        """(H + c) v from H v."""
        return product + self.damping * vectors


@dataclass(frozen=True)
class Iterate:
    """One map's vectors after some iterations: `solution` x, `residual` r = b − (H + C) x, `preconditioned` M⁻¹ r, and
    the `direction` of the last step (None before the first)."""

    solution: Tensor
    residual: Tensor
    preconditioned: Tensor
    direction: Tensor | None = None

    @classmethod
    def first(cls, system: System, right: Tensor, start: Tensor, product: Tensor) -> Self:
        """From b, EK-FAC's x = M⁻¹ b, and H x."""
        residual = right - system.damped(product, start)
        return cls(start, residual, system.precondition(residual))

    def next_direction(self, beta: Tensor) -> Tensor:
        """p = M⁻¹ r + β p."""
        if self.direction is None:
            return self.preconditioned
        return self.preconditioned + _by_query(beta, self.direction) * self.direction

    def advanced(self, system: System, beta: Tensor, alpha: Tensor, product: Tensor) -> "Iterate":
        """x + α p and what follows, from H p of `next_direction(beta)`."""
        direction = self.next_direction(beta)
        solution = self.solution + _by_query(alpha, direction) * direction
        residual = self.residual - _by_query(alpha, direction) * system.damped(product, direction)
        return Iterate(solution, residual, system.precondition(residual), direction)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """This map's part of r·r and of r·M⁻¹r."""
        return inner_by_query(self.residual, self.residual), inner_by_query(self.residual, self.preconditioned)


@dataclass(frozen=True)
class Numbers:
    """What steers the iterations, `[queries]` each: b·b, and r·r and r·M⁻¹r of all maps together; `beta` of the next
    direction; `first`, r·r of EK-FAC's answer."""

    right: Tensor
    squares: Tensor
    met: Tensor
    beta: Tensor
    first: Tensor

    @classmethod
    def begun(cls, right: Tensor, squares: Tensor, met: Tensor) -> Self:
        return cls(right, squares, met, torch.zeros_like(right), squares)

    def advanced(self, squares: Tensor, met: Tensor, still: Tensor) -> "Numbers":
        """After a step of the queries that are `still` under way."""
        beta = torch.where(still, met / self.met, 0.0)
        return replace(self, squares=squares, met=met, beta=beta)

    @property
    def relative(self) -> Tensor:
        """‖b − (H + C) x‖ / ‖b‖; zero where b is."""
        return _root_of_ratio(self.squares, self.right)

    @property
    def relative_at_first(self) -> Tensor:
        """The same of EK-FAC's answer."""
        return _root_of_ratio(self.first, self.right)

    def refined(self, tolerance: float) -> Tensor:
        """Whose answer is better than EK-FAC's beyond doubt, bool `[queries]`: a residual within the tolerance, and
        no larger than EK-FAC's own.

        A residual that has only fallen proves little: steps stopped half-way have solved for the largest eigenvalues
        and not for the others, and where EK-FAC began far from the operator that can be worse than EK-FAC.
        """
        return (self.relative <= tolerance) & (self.squares <= self.first)

    def unsolved(self, tolerance: float) -> Tensor:
        """Which queries are to go on, bool."""
        return self.relative > tolerance


def step_length(numbers: Numbers, curvature: Tensor, still: Tensor) -> Tensor:
    """α = r·M⁻¹r / p·(H + C)p of the queries under way, and 0 of others."""
    return torch.where(still & (curvature > 0), numbers.met / curvature, 0.0)


@dataclass(frozen=True)
class Solution:
    """`solution` by map; `residuals` `[iterations + 1, queries]`, relative, from EK-FAC's answer on; `numbers` last."""

    solution: Vectors
    residuals: Tensor
    numbers: Numbers


def solve(
    systems: Mapping[str, System],
    right: Mapping[str, Tensor],
    product: Callable[[Vectors], Vectors],
    iterations: int,
    tolerance: float = 0.0,
    seen: Callable[[Vectors, Numbers], None] | None = None,
) -> Solution:
    """All of it in one process: (H + C)⁻¹ b of `right` by map, with `product` giving H v.

    Ends after so many iterations or when all relative residuals are within `tolerance`; `seen` is told every iterate's
    solutions and numbers, EK-FAC's first.
    """
    starts = {name: system.precondition(right[name]) for name, system in systems.items()}
    of_starts = product(starts)
    iterates = {
        name: Iterate.first(system, right[name], starts[name], of_starts[name]) for name, system in systems.items()
    }
    norms = sum_over_maps(inner_by_query(right[name], right[name]) for name in systems)
    numbers = Numbers.begun(norms, *_numbers(iterates))
    residuals = [numbers.relative]
    _tell(seen, iterates, numbers)
    for _ in range(iterations):
        still = numbers.unsolved(tolerance)
        if not still.any():
            break
        directions = {name: iterate.next_direction(numbers.beta) for name, iterate in iterates.items()}
        products = product(directions)
        curvature = sum_over_maps(
            inner_by_query(directions[name], system.damped(products[name], directions[name]))
            for name, system in systems.items()
        )
        alpha = step_length(numbers, curvature, still)
        iterates = {
            name: iterate.advanced(systems[name], numbers.beta, alpha, products[name])
            for name, iterate in iterates.items()
        }
        numbers = numbers.advanced(*_numbers(iterates), still)
        residuals.append(numbers.relative)
        _tell(seen, iterates, numbers)
    return Solution({name: it.solution for name, it in iterates.items()}, torch.stack(residuals), numbers)


def inner_by_query(left: Tensor, right: Tensor) -> Tensor:
    """Σ over a map's entries of left·right, `[queries]` in float64."""
    return (left.double() * right.double()).flatten(1).sum(1)


def sum_over_maps(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _numbers(iterates: Mapping[str, Iterate]) -> tuple[Tensor, Tensor]:
    squares, met = zip(*(iterate.numbers() for iterate in iterates.values()), strict=True)
    return sum_over_maps(squares), sum_over_maps(met)


def _tell(seen: Callable[[Vectors, Numbers], None] | None, iterates: Mapping[str, Iterate], numbers: Numbers) -> None:
    if seen is not None:
        seen({name: iterate.solution for name, iterate in iterates.items()}, numbers)


def _by_query(numbers: Tensor, vectors: Tensor) -> Tensor:
    return numbers.to(vectors)[:, None, None]


def _root_of_ratio(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under > 0, over / under.clamp_min(torch.finfo(under.dtype).tiny), 0.0).sqrt()
