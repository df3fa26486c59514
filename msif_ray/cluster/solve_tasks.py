"""What a solve by conjugate gradients does at one map: a Ray task each, from vectors on storage to vectors on storage.

Each gives its map's part of numbers by query, which the driver sums over maps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from msif_ray.cluster.factors import load_factor
from msif_ray.cluster.iterates import ANSWER, EKFAC, load_answer, load_iterate, save_answer, save_iterate
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.passage import CarryTask, Source, passing
from msif_ray.influence.conjugate import Iterate, Left, Met, Step, System, inner_by_query
from msif_ray.influence.groups import Shapes
from msif_ray.influence.queries import carry_back

# Queries whose systems are solved together, at most.
SOLVED_QUERIES = 64
# Copies of the directions of all maps on a rank: those that are multiplied, and their products.
PRODUCT_COPIES = 2
# Bytes of a task for the vectors of the queries that are solved together, and how many copies of those it holds: an
# iterate and the next one, the products, and what the factor is rotating. A single query may take more.
TASK_BYTES = 2**30
TASK_COPIES = 16


def solved_together(maps: Shapes, memory: int, itemsize: int) -> int:
    """How many queries' systems are solved together, within `memory` bytes of a rank and TASK_BYTES of a task."""
    sizes = [out * columns * itemsize for out, columns in maps.values()]
    on_rank, in_task = memory // (PRODUCT_COPIES * sum(sizes)), TASK_BYTES // (TASK_COPIES * max(sizes))
    return max(1, min(SOLVED_QUERIES, on_rank, in_task))


def task_bytes(shape: tuple[int, int], queries: int, itemsize: int) -> int:
    """What a task takes at most: a factor, and the vectors of the queries that are solved together."""
    out, columns = shape
    return (out * out + columns * columns + out * columns * (1 + TASK_COPIES * queries)) * itemsize


@dataclass(frozen=True)
class Systems:
    """A solve, the folder of its stage's factors, and the damping of each map."""

    solve: Path
    factors: Path
    damping: Mapping[str, float]

    def system(self, map_name: str) -> System:
        return System(load_factor(self.factors, map_name), self.damping[map_name])


def write_start(
    map_name: str,
    systems: Systems,
    task: CarryTask,
    stage: int,
    queries: tuple[int, int],
    source: Source,
    means: dict[int, dict[str, float]],
) -> Tensor:
    """Carries some queries to the stage, which gives b, and writes the iterate of x = 0; gives b·b."""
    vectors = islice(source.vectors(map_name, task.queries), *queries)
    stacked = torch.stack([vector.gradient for vector in vectors])
    right = carry_back(stacked, passing(map_name, task, means, source.passed, stage + 1))
    system = systems.system(map_name)
    save_answer(systems.solve, EKFAC, map_name, system.precondition(right))
    save_iterate(systems.solve, 0, map_name, Iterate.first(system, right))
    return inner_by_query(right, right)


def met_by(map_name: str, systems: Systems, products: Coverage, number: int, step: Step) -> Met:
    """What iteration `number` steps by."""
    iterate = load_iterate(systems.solve, number - 1, map_name)
    direction = iterate.next_direction(step)
    product = _product(products, map_name, step, direction)
    return Met.of(direction, product + systems.damping[map_name] * direction, iterate.residual)


def write_next(map_name: str, systems: Systems, products: Coverage, number: int, step: Step, alpha: Tensor) -> Left:
    """Writes the iterate of iteration `number`."""
    iterate, system = load_iterate(systems.solve, number - 1, map_name), systems.system(map_name)
    product = _product(products, map_name, step, iterate.residual)
    following = iterate.advanced(system, step, alpha, product)
    save_iterate(systems.solve, number, map_name, following)
    return following.left(system, product)


def write_answer(map_name: str, systems: Systems, number: int, refined: Tensor, later: bool) -> None:
    """Writes what the queries are after the stage: the solution where it is `refined`, else EK-FAC's.

    Of a `later` stage times the map's α, since its response is A (H + A)⁻¹ with A each map's α.
    """
    solution = load_iterate(systems.solve, number, map_name).solution
    answer = torch.where(refined[:, None, None], solution, load_answer(systems.solve, EKFAC, map_name))
    if later:
        answer = systems.damping[map_name] * answer
    save_answer(systems.solve, ANSWER, map_name, answer)


def _product(products: Coverage, map_name: str, step: Step, like: Tensor) -> Tensor:
    """H times the directions of a step: the mean over documents, in the queries' places, zero where none was made."""
    every = torch.zeros_like(like)
    every[step.going] = (products.total(map_name)["P"] / products.documents).to(like)
    return every
