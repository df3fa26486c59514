"""What solving stages by conjugate gradients costs: products over the documents, and vectors on the way."""

from dataclasses import dataclass

from msif_ray import stages
from msif_ray.cluster.solve_tasks import PRODUCT_COPIES, solved_together
from msif_ray.config import Run
from msif_ray.influence.groups import Shapes
from msif_ray.plan import counts
from msif_ray.plan.tokens import Tally

# Vectors of the queries that are solved together which storage holds at once: EK-FAC's answers, and two iterates.
STORED_VECTORS = 1 + 2 * 4


def products_job(index: int) -> str:
    """The name of the trial of products with stage `index`'s operator."""
    return f"products.{index}"


def solver_tally(run: Run, index: int, tally: Tally) -> Tally:
    """The documents of a solved stage's operator, from those that it is fitted on."""
    documents = stages.solver_of(run, index).documents or tally.documents
    return tally if documents >= tally.documents else tally.scaled(int(documents))


@dataclass(frozen=True)
class StageSolves:
    """The solves of one stage: by how many `score` entries, of how many `queries`, each met `products` times."""

    index: int
    entries: int
    queries: int
    products: int

    @property
    def passes(self) -> int:
        """Over the operator's documents, at most: a query that is solved early takes no more."""
        return self.entries * self.queries * self.products

    def flops(self, size: counts.ModelSize, shapes: Shapes, tally: Tally) -> float:
        return self.passes * counts.product_flops(size, shapes, tally)

    def rotation_flops(self, shapes: Shapes) -> float:
        """Of the preconditioner, for b and every residual."""
        return counts.carry_flops(shapes, self.entries * self.queries, self.products + 1)


def planned_solves(run: Run, queries: int) -> list[StageSolves]:
    """The stages that are solved, in training order."""
    entries: dict[int, int] = {}
    for score in run.score:
        for index in stages.solved_stages(run.answering(score), run.stage_index(score.stage)):
            entries[index] = entries.get(index, 0) + 1
    return [
        StageSolves(index, entries[index], queries, stages.solver_of(run, index).iterations)
        for index in sorted(entries)
    ]


def held_bytes(shapes: Shapes, queries: int, memory: int | None, itemsize: int) -> int:
    """A rank's vectors and their products, of the queries that are solved together."""
    return PRODUCT_COPIES * together(shapes, queries, memory, itemsize) * counts.corrected_bytes(shapes, itemsize)


def stored_bytes(shapes: Shapes, queries: int, memory: int | None, itemsize: int, replicas: int) -> float:
    """What the solves of an entry keep at most while it is carried back: every query's answer, and the iterates and
    partial sums of those that are solved together."""
    at_once = together(shapes, queries, memory, itemsize) * (STORED_VECTORS + 2 * replicas)
    return float((queries + at_once) * counts.corrected_bytes(shapes, itemsize))


def together(shapes: Shapes, queries: int, memory: int | None, itemsize: int) -> int:
    """How many queries are solved together; `memory` None: as many as a task per map can hold."""
    unlimited = 2 * queries * PRODUCT_COPIES * counts.corrected_bytes(shapes, itemsize)
    return min(queries, solved_together(shapes, unlimited if memory is None else memory, itemsize))
