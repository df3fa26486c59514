"""The methods that are compared: each turns query gradients into directions, or gives scores of its own.

EK-FAC, K-FAC and conjugate gradients are the package's. The others as published, on the same damped operator.
"""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from msif_ray.corpus.windows import Encoded
from msif_ray.influence.capture import Capture
from msif_ray.influence.conjugate import Vectors, inner_by_query, sum_over_maps
from msif_ray.influence.ekfac import Factor
from msif_ray.influence.gauss_newton import ProductSums
from msif_ray.influence.response import DampedInverse
from msif_ray.validate.problem import Problem, Scores
from msif_ray.validate.setting import Setting, batches

# LiSSA's step is 1 over the largest eigenvalue times this: a batch's operator may exceed the mean of all.
LISSA_MARGIN = 4.0
POWER_STEPS = 8


def by_factors(factors: Mapping[str, Factor], damping: Mapping[str, float], gradients: Vectors) -> Vectors:
    """(H_K-FAC + c)⁻¹ g of the maps that `gradients` name."""
    return {name: factors[name].apply(DampedInverse(damping[name]), vectors) for name, vectors in gradients.items()}


def lissa(problem: Problem, damping: Mapping[str, float], iterations: int, seed: int) -> Vectors:
    """x ← b + x − (H_batch + c) x / s, whose fixed point is s (H + c)⁻¹ b (Agarwal et al. 2017; Koh and Liang 2017).

    Each step takes a batch drawn at random; s is LISSA_MARGIN times the largest eigenvalue.
    """
    gradients, setting = problem.query_gradients, problem.setting
    largest = _largest_eigenvalue(problem, seed) + max(damping.values())
    scale, found = LISSA_MARGIN * largest, problem.operator_batches
    rng, solution = random.Random(seed), {name: vectors.clone() for name, vectors in gradients.items()}
    with Capture(setting.model, setting.maps) as capture:
        for _ in range(iterations):
            batch = rng.choice(found)
            sums = ProductSums(solution)
            sums.add(capture, batch)
            # A batch stands for all documents; its rows are what it holds of them.
            solution = {
                name: vectors + gradients[name] - (sums.sums[name] / len(batch.keys) + damping[name] * vectors) / scale
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


def hidden_similarity(setting: Setting) -> Scores:
    """Cosine of the mean last hidden states of query and document, `[queries, documents]`."""
    queries, documents = (_hidden(setting, rows) for rows in (setting.queries, setting.scored))
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (queries, documents)]
    return (unit[0] @ unit[1].T).double().numpy()


def cosine(scores: Scores, norms: Scores, gradients: Vectors) -> Scores:
    """Gradient dot products over the norms of both."""
    own = sum_over_maps(inner_by_query(vectors, vectors) for vectors in gradients.values()).sqrt().numpy()
    return np.asarray(scores / np.maximum(norms, 1e-30) / own[:, None])


def _hidden(setting: Setting, rows: list[Encoded]) -> Tensor:
    found = []
    with torch.no_grad():
        for row in rows:
            (batch,) = batches([row], 1)
            out = setting.model(input_ids=batch.input_ids, output_hidden_states=True, use_cache=False)
            found.append(out.hidden_states[-1][0].mean(0))
    return torch.stack(found)


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
