"""The methods that are compared and that turn query gradients into directions.

EK-FAC, K-FAC and conjugate gradients are the package's. The others as published, on the same damped operator.
"""

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from msif_ray.influence.conjugate import Vectors
from msif_ray.influence.ekfac import Factor
from msif_ray.influence.response import DampedInverse
from msif_ray.validate.problem import Problem

POWER_STEPS = 8


def by_factors(factors: Mapping[str, Factor], damping: Mapping[str, float], gradients: Vectors) -> Vectors:
    """(H_K-FAC + c)⁻¹ g of the maps that `gradients` name."""
    return {name: factors[name].apply(DampedInverse(damping[name]), vectors) for name, vectors in gradients.items()}


def lissa(problem: Problem, damping: Mapping[str, float], iterations: int, documents: int, seed: int) -> Vectors:
    """x ← b + x − (H_few + c) x / s, whose fixed point is s (H + c)⁻¹ b (Agarwal et al. 2017; Koh and Liang 2017).

    Each step takes `documents` of the operator's at random; s is the largest eigenvalue that any of their operators
    has, damping included, so that no step makes x longer.
    """
    gradients, rows = problem.query_gradients, problem.setting.documents
    few = [problem.of(rows[start : start + documents]) for start in range(0, len(rows), documents)]
    scale = max(_largest_eigenvalue(each, seed) for each in few) + max(damping.values())
    weights = [len(each.setting.documents) for each in few]
    rng, solution = random.Random(seed), {name: vectors.clone() for name, vectors in gradients.items()}
    for chosen in rng.choices(few, weights, k=iterations):
        products = chosen.product(solution)
        solution = {
            name: vectors + gradients[name] - (products[name] + damping[name] * vectors) / scale
            for name, vectors in solution.items()
        }
    return {name: vectors / scale for name, vectors in solution.items()}


def arnoldi(problem: Problem, iterations: int, kept: int, seed: int) -> Vectors:
    """Σ_i v_i (v_iᵀ g) / λ_i over the `kept` largest Ritz pairs of so many Lanczos steps, without damping (Schioppa et
    al. 2022). Every step is made orthogonal to all before it."""
    generator = torch.Generator().manual_seed(seed)
    vector = _flat(
        {name: torch.randn(1, *each.shape, generator=generator) for name, each in problem.setting.maps.items()}
    )
    basis, diagonal, beside = [vector / vector.norm()], [], []
    for _ in range(iterations):
        following = _flat(problem.product(_by_map(problem, basis[-1])))
        diagonal.append(float((following * basis[-1]).sum()))
        for _ in range(2):  # once leaves rounding behind
            for earlier in basis:
                following = following - (following * earlier).sum() * earlier
        beside.append(float(following.norm()))
        basis.append(following / following.norm())
    matrix = torch.diag(torch.tensor(diagonal)) + sum(torch.diag(torch.tensor(beside[:-1]), side) for side in (-1, 1))
    values, vectors = torch.linalg.eigh(matrix)
    largest = values.argsort(descending=True)[:kept]
    directions = torch.cat(basis[:-1]).T @ vectors[:, largest]  # [P, kept]
    coordinates = _flat(problem.query_gradients) @ directions
    return _by_map(problem, (coordinates / values[largest]) @ directions.T)


def _largest_eigenvalue(problem: Problem, seed: int) -> float:
    """By power iteration from a random vector."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {name: torch.randn(1, *each.shape, generator=generator) for name, each in problem.setting.maps.items()}
    value = 0.0
    for _ in range(POWER_STEPS):
        flat = _flat(vectors)
        vectors = problem.product(_by_map(problem, flat / flat.norm()))
        value = float(_flat(vectors).norm())
    return value


def _flat(vectors: Vectors) -> Tensor:
    return torch.cat([each.flatten(1) for each in vectors.values()], dim=1)


def _by_map(problem: Problem, flat: Tensor) -> Vectors:
    maps = problem.setting.maps
    parts = flat.split([each.parameters for each in maps.values()], dim=1)
    return {name: part.reshape(-1, *maps[name].shape) for name, part in zip(maps, parts, strict=True)}
