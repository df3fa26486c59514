"""A query's way back through the stages: where it comes from, and what each stage does to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from msif_ray import stages
from msif_ray.cluster.directions import Shard
from msif_ray.cluster.factors import load_factor, mean_eigenvalues
from msif_ray.cluster.iterates import ANSWER, load_answer
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.queries import in_order
from msif_ray.config import Run
from msif_ray.influence.ekfac import Factor
from msif_ray.influence.response import Response


@dataclass(frozen=True)
class CarryTask:
    """Queries carried back to one scored stage; `factors` is each passed stage's folder, None for an identity.

    `shards` are the queries that share a file; `memory` (bytes, default CARRY_BYTES) is for the copies
    of those carried at once.
    """

    run: Run
    scored: int
    factors: dict[int, Path | None]
    queries: tuple[str, ...]
    folder: Path
    shards: tuple[Shard, ...]
    memory: int | None = None


class Vector(Protocol):
    """One query's vector at one map: its `gradient` `[out, columns]`, or that carried back through some stages."""

    @property
    def gradient(self) -> Tensor: ...


class Source(Protocol):
    """Where queries come from on their way back: they have passed the stages from number `passed` on."""

    @property
    def passed(self) -> int: ...

    def vectors(self, map_name: str, queries: Sequence[str]) -> Iterator[Vector]:
        """Every query's at one map, in order."""
        ...


@dataclass(frozen=True)
class Gradients:
    """The queries' gradients at the last stage, which they have not passed."""

    coverage: Coverage
    passed: int

    def vectors(self, map_name: str, queries: Sequence[str]) -> Iterator[Vector]:
        return in_order(self.coverage, map_name, queries)


@dataclass(frozen=True)
class Answered:
    """One query's answer at one map."""

    gradient: Tensor


@dataclass(frozen=True)
class Answers:
    """What a stage that was solved gave, some queries in each folder."""

    folders: tuple[Path, ...]
    passed: int

    def vectors(self, map_name: str, queries: Sequence[str]) -> Iterator[Vector]:
        for folder in self.folders:
            yield from map(Answered, load_answer(folder, ANSWER, map_name))


def passed_means(task: CarryTask) -> dict[int, dict[str, float]]:
    """The mean eigenvalue of each map of each passed stage that has factors."""
    return {index: mean_eigenvalues(folder) for index, folder in task.factors.items() if folder is not None}


def passing(
    map_name: str, task: CarryTask, means: dict[int, dict[str, float]], above: int, last: int
) -> list[tuple[Factor | None, Response]]:
    """The factor and the response of the passed stages before number `above` down to number `last`."""
    chain: list[tuple[Factor | None, Response]] = []
    for index in stages.carried_through(task.run, task.scored):
        if last <= index < above:
            folder = task.factors[index]
            mean = 0.0 if folder is None else means[index][map_name]
            response, _ = stages.response_of(task.run, index, task.scored, map_name, mean)
            chain.append((None if folder is None else load_factor(folder, map_name), response))
    return chain


def strengths_used(map_name: str, task: CarryTask, means: dict[int, dict[str, float]]) -> dict[str, float]:
    """The damping or α of every stage passed."""
    strengths: dict[str, float] = {}
    for index in stages.carried_through(task.run, task.scored):
        mean = 0.0 if task.factors[index] is None else means[index][map_name]
        _, strength = stages.response_of(task.run, index, task.scored, map_name, mean)
        if strength is not None:
            kind = "damping" if index == task.scored else "alpha"
            strengths[f"{task.run.stages[index].name}.{kind}"] = strength
    return strengths
