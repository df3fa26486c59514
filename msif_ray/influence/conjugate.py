"""Block conjugate gradients on the damped Gauss-Newton Hessian, with damped EK-FAC as preconditioner.

Of every query a system (H + C) x = b, H over all tracked maps together and C the damping, or α, of each map on the
diagonal: what carrying back through a stage asks for, where EK-FAC gives M⁻¹ b instead. H is met only through products,
whoever computes them.

The queries share H, so every one is solved in the span of all directions that any of them has taken (block conjugate
gradients: O'Leary 1980; preconditioned, Feng, Owen and Perić 1995): for as many products, an error that in the
operator's norm is no larger than if each were solved alone, and much smaller where a few large eigenvalues are what
keeps all of them. It begins at zero. Its first directions are then EK-FAC's answers, so that the first iterate is
already the best combination of these, and no product is spent on the residual of EK-FAC's, which can be hundreds of
times b.

The vectors of a map are `[queries, out, columns]`, and what is summed over maps are numbers by query, `[queries]`, or
by pair of queries, `[queries, queries]` (float64): so every map may be elsewhere.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from msif_ray.influence.ekfac import Factor
from msif_ray.influence.response import DampedInverse

Vectors = dict[str, Tensor]
"""By map, `[queries, out, columns]`."""

# Directions that have become this dependent, by the eigenvalues of their products scaled to a unit diagonal, only add
# rounding: that of float32 vectors, whose products are summed in float64.
DEPENDENT = 1e-6


class Damped(Protocol):
    """H + C of one map, or of several as one, whose products H v are made elsewhere, and an M like it."""

    def precondition(self, vectors: Tensor) -> Tensor:
        """M⁻¹ v."""

    def damped(self, product: Tensor, vectors: Tensor) -> Tensor:
        """(H + C) v from H v."""


@dataclass(frozen=True)
class System:
    """One map's part of H + C: its factor, for the preconditioner, and its damping."""

    factor: Factor
    damping: float

    def precondition(self, vectors: Tensor) -> Tensor:
        """M⁻¹ v = (H_EK-FAC + c)⁻¹ v: of right-hand sides, EK-FAC's answer."""
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
    def first(cls, system: Damped, right: Tensor) -> Self:
        """x = 0."""
        return cls(torch.zeros_like(right), right, system.precondition(right))

    def next_direction(self, step: "Step") -> Tensor:
        """p = M⁻¹ r + Σ β p of the queries under way, and 0 of others."""
        direction = self.preconditioned
        if self.direction is not None:
            direction = direction + _combined(step.beta, self.direction)
        return direction * step.going.to(direction)[:, None, None]

    def advanced(self, system: Damped, step: "Step", alpha: Tensor, product: Tensor) -> "Iterate":
        """x + Σ α p and what follows, from H p of `next_direction(step)`."""
        direction = self.next_direction(step)
        solution = self.solution + _combined(alpha, direction)
        residual = self.residual - _combined(alpha, system.damped(product, direction))
        return Iterate(solution, residual, system.precondition(residual), direction)

    def left(self, system: Damped, product: Tensor) -> "Left":
        """This map's part of what the next β takes, from H p of this iterate's `direction`."""
        if self.direction is None:
            raise ValueError("there has been no step yet")
        damped = system.damped(product, self.direction)
        return Left(inner_by_query(self.residual, self.residual), _products(damped, self.preconditioned))


@dataclass(frozen=True)
class Met:
    """Before a step: `curvature` pᵀ(H + C)p and `against` pᵀr, `[queries, queries]`; `beyond` `[queries]`, the squares
    of r − (H + C)p, which in the first step are those of the residual of EK-FAC's answer."""

    curvature: Tensor
    against: Tensor
    beyond: Tensor

    @classmethod
    def of(cls, direction: Tensor, damped: Tensor, residual: Tensor) -> Self:
        """One map's part, from p, (H + C)p and r."""
        beyond = residual - damped
        return cls(_products(direction, damped), _products(direction, residual), inner_by_query(beyond, beyond))


@dataclass(frozen=True)
class Left:
    """After a step: `squares` r·r `[queries]`, and `crossed` ((H + C)p)ᵀ M⁻¹r `[queries, queries]`."""

    squares: Tensor
    crossed: Tensor


@dataclass(frozen=True)
class Step:
    """What the next directions are made with: `beta` `[queries, queries]`, and which queries are `going` on, bool."""

    beta: Tensor
    going: Tensor


@dataclass(frozen=True)
class Numbers:
    """What steers the iterations, `[queries]` each: `right` b·b and `squares` r·r of all maps together; `first`, r·r of
    EK-FAC's answer (zero before the first step, which tells it); and `beta` `[queries, queries]`."""

    right: Tensor
    squares: Tensor
    first: Tensor
    beta: Tensor

    @classmethod
    def begun(cls, right: Tensor) -> Self:
        return cls(right, right, torch.zeros_like(right), right.new_zeros(len(right), len(right)))

    def step(self, tolerance: float) -> Step:
        return Step(self.beta, self.unsolved(tolerance))

    def alpha(self, step: Step, met: Met) -> Tensor:
        """How far the queries under way go along each direction, `[queries, queries]`: a column per query."""
        return _solve(met.curvature, met.against) * step.going

    def advanced(self, met: Met, left: Left) -> "Numbers":
        """After a step."""
        first = torch.where(self.first > 0, self.first, met.beyond)
        return replace(self, squares=left.squares, first=first, beta=-_solve(met.curvature, left.crossed))

    @property
    def relative(self) -> Tensor:
        """‖b − (H + C) x‖ / ‖b‖; zero where b is."""
        return _root_of_ratio(self.squares, self.right)

    @property
    def relative_of_ekfac(self) -> Tensor:
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


@dataclass(frozen=True)
class State:
    """A solve after some iterations. `residuals` are relative, `[iterations + 1][queries]`, from x = 0 on."""

    iterates: dict[str, Iterate]
    numbers: Numbers
    residuals: tuple[Tensor, ...]

    @classmethod
    def begun(cls, systems: Mapping[str, Damped], right: Mapping[str, Tensor]) -> Self:
        numbers = Numbers.begun(sum_over_maps(inner_by_query(right[name], right[name]) for name in systems))
        iterates = {name: Iterate.first(system, right[name]) for name, system in systems.items()}
        return cls(iterates, numbers, (numbers.relative,))

    @property
    def solution(self) -> Vectors:
        return {name: iterate.solution for name, iterate in self.iterates.items()}

    @property
    def iterations(self) -> int:
        return len(self.residuals) - 1


def solve(
    systems: Mapping[str, Damped],
    begun: State,
    product: Callable[[Vectors], Vectors],
    iterations: int,
    tolerance: float = 0.0,
    seen: Callable[[State], None] = lambda _: None,
) -> State:
    """All of it in one process: (H + C)⁻¹ b, with `product` giving H v, from a state (the first is `State.begun`).

    Ends after so many iterations in all or when all relative residuals are within `tolerance`; `seen` is told every
    state that is reached.
    """
    state = begun
    while state.iterations < iterations and state.numbers.unsolved(tolerance).any():
        step = state.numbers.step(tolerance)
        directions = {name: iterate.next_direction(step) for name, iterate in state.iterates.items()}
        products = product(directions)
        met = sum_met(
            Met.of(directions[name], system.damped(products[name], directions[name]), state.iterates[name].residual)
            for name, system in systems.items()
        )
        alpha = state.numbers.alpha(step, met)
        iterates = {
            name: iterate.advanced(systems[name], step, alpha, products[name])
            for name, iterate in state.iterates.items()
        }
        left = sum_left(iterate.left(systems[name], products[name]) for name, iterate in iterates.items())
        numbers = state.numbers.advanced(met, left)
        state = State(iterates, numbers, (*state.residuals, numbers.relative))
        seen(state)
    return state


def inner_by_query(left: Tensor, right: Tensor) -> Tensor:
    """Σ over a map's entries of left·right, `[queries]` in float64."""
    return (left.double() * right.double()).flatten(1).sum(1)


def sum_over_maps(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def sum_met(parts: Iterable[Met]) -> Met:
    """Of all maps."""
    every = list(parts)
    return Met(*(sum_over_maps(getattr(part, name) for part in every) for name in ("curvature", "against", "beyond")))


def sum_left(parts: Iterable[Left]) -> Left:
    """Of all maps."""
    every = list(parts)
    return Left(*(sum_over_maps(getattr(part, name) for part in every) for name in ("squares", "crossed")))


def _solve(curvature: Tensor, right: Tensor) -> Tensor:
    """S⁻¹ B of a symmetric S `[n, n]`, without what is dependent in it: a zero direction, and combinations of
    directions that rounding alone tells from zero."""
    scale = torch.where(curvature.diagonal() > 0, curvature.diagonal(), torch.inf).rsqrt()
    scaled = scale[:, None] * (curvature + curvature.T) / 2 * scale
    values, vectors = torch.linalg.eigh(scaled)
    inverse = torch.where(values > DEPENDENT, 1 / values, 0.0)
    return scale[:, None] * (vectors @ (inverse[:, None] * (vectors.T @ (scale[:, None] * right))))


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over a map's entries of left·right of every pair of queries, `[queries, queries]` in float64."""
    return left.double().flatten(1) @ right.double().flatten(1).T


def _combined(weights: Tensor, vectors: Tensor) -> Tensor:
    """Σ_j weights[j, q] vectors[j] of every query q."""
    return torch.tensordot(weights.to(vectors), vectors, dims=([0], [0]))


def _root_of_ratio(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under > 0, over / under.clamp_min(torch.finfo(under.dtype).tiny), 0.0).sqrt()
