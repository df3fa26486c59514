"""What a solve by conjugate gradients does at one map: a Ray task each, from vectors on storage to vectors on storage.

Each gives its map's part of numbers by query, which the driver sums over maps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from msif_ray import layout
from msif_ray.cluster.iterates import ANSWER, load_iterate, load_start, save_iterate, save_start
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.passage import CarryTask, Source, load_factor, passing
from msif_ray.influence.conjugate import Iterate, System, inner_by_query
from msif_ray.influence.groups import Shapes
from msif_ray.influence.queries import carry_back
from msif_ray.store import save_tensors

# Queries whose systems are solved together, at most.
SOLVED_QUERIES = 64
# Copies of the directions of all maps on a rank: those that are multiplied, and their products.
PRODUCT_COPIES = 2
# Bytes of a task for the vectors of the queries that are solved together, and how many copies of those it holds: an
# iterate and the next one, the products, and what the factor is rotating. A single query may take more.
TASK_BYTES = 2**30
TASK_COPIES = 14


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
) -> None:
    """Carries some queries to the stage, which gives b, and writes it with EK-FAC's answer."""
    torch.set_num_threads(1)
    vectors = islice(source.vectors(map_name, task.queries), *queries)
    stacked = torch.stack([vector.gradient for vector in vectors])
    right = carry_back(stacked, passing(map_name, task, means, source.passed, stage + 1))
    save_start(systems.solve, map_name, right, systems.system(map_name).precondition(right))


def write_first(map_name: str, systems: Systems, products: Coverage) -> tuple[Tensor, Tensor, Tensor]:
    """Writes EK-FAC's iterate; gives b·b, r·r and r·M⁻¹r."""
    torch.set_num_threads(1)
    right, start = load_start(systems.solve, map_name)
    iterate = Iterate.first(systems.system(map_name), right, start, _mean(products, map_name))
    save_iterate(systems.solve, 0, map_name, iterate)
    return inner_by_query(right, right), *iterate.numbers()


def curvature_of(
    map_name: str, systems: Systems, products: Coverage, number: int, beta: Tensor, going: Sequence[int]
) -> tuple[Tensor]:
    """p·(H + c) p of the direction of iteration `number`, zero for queries that are not `going` on."""
    torch.set_num_threads(1)
    direction = load_iterate(systems.solve, number - 1, map_name).next_direction(beta)
    product = _among(_mean(products, map_name), going, direction)
    return (inner_by_query(direction, product + systems.damping[map_name] * direction),)


def write_next(
    map_name: str,
    systems: Systems,
    products: Coverage,
    number: int,
    beta: Tensor,
    going: Sequence[int],
    alpha: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes the iterate of iteration `number`; gives r·r and r·M⁻¹r."""
    torch.set_num_threads(1)
    iterate = load_iterate(systems.solve, number - 1, map_name)
    product = _among(_mean(products, map_name), going, iterate.residual)
    following = iterate.advanced(systems.system(map_name), beta, alpha, product)
    save_iterate(systems.solve, number, map_name, following)
    return following.numbers()


def write_answer(map_name: str, systems: Systems, number: int, refined: Tensor, later: bool) -> None:
    """Writes what the queries are after the stage: the solution where it is `refined`, else EK-FAC's.

    Of a `later` stage times the map's α, since its response is A (H + A)⁻¹ with A each map's α.
    """
    torch.set_num_threads(1)
    _, start = load_start(systems.solve, map_name)
    solution = load_iterate(systems.solve, number, map_name).solution
    answer = torch.where(refined[:, None, None], solution, start)
    if later:
        answer = systems.damping[map_name] * answer
    save_tensors(layout.solve_vectors(systems.solve, ANSWER, map_name), {"answer": answer}, {"map": map_name})


def _mean(products: Coverage, map_name: str) -> Tensor:
    """H times the vectors that were multiplied, from its sum over documents."""
    return products.total(map_name)["P"] / products.documents


def _among(product: Tensor, going: Sequence[int], like: Tensor) -> Tensor:
    """The products of the queries that go on in their places among all, zero elsewhere."""
    every = torch.zeros_like(like)
    every[list(going)] = product
    return every
