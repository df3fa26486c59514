"""Queries carried back through a stage by conjugate gradients: products by the replicas, vectors by tasks per map.

Some queries at a time, and of each stage so solved in turn. What counts is in a solve's record, written once all maps'
vectors of an iterate are there; an iteration that was broken off goes on with the blocks that its partial sums cover.
The driver holds numbers by query and no vectors.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from msif_ray import layout, stages
from msif_ray.cluster.iterates import ANSWER, EKFAC, ProductJob, iterate_name, solve_said
from msif_ray.cluster.jobs import CovarianceJob
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.passage import Answers, CarryTask, Source
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.rank import ModelSetup
from msif_ray.cluster.solve_tasks import (
    Systems,
    met_by,
    solved_together,
    task_bytes,
    write_answer,
    write_next,
    write_start,
)
from msif_ray.cluster.tasks import for_each_map
from msif_ray.cluster.told import Progress
from msif_ray.config import CgSolver
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.unusable import none_usable
from msif_ray.errors import DamagedError, UserError
from msif_ray.influence.conjugate import Numbers, Step, sum_left, sum_met, sum_over_maps
from msif_ray.influence.groups import FREE_SHARE, Shapes, accumulating_bytes
from msif_ray.paths import all_there, exists
from msif_ray.shapes import Pair, misfit
from msif_ray.store import AGAIN, delete_folder, read_json, write_json


class _Said(BaseModel):
    numbers: dict[str, Any]  # another version's are others
    relative: list[list[float]]
    seconds: list[float]
    documents: int


class _Numbers(BaseModel):
    right: list[float]
    squares: list[float]
    first: list[float]
    beta: list[list[float]]


Queries = tuple[int, int]
"""The queries from the first number to before the second."""

Steps = Callable[[str, int], AbstractContextManager[Progress]]
"""Begins a step of that name over so many documents."""


@dataclass(frozen=True)
class SolvedStage:
    """A stage that conjugate gradients solve: its model, and the blocks of the documents that make its operator."""

    index: int
    setup: ModelSetup
    blocks: CorpusBlocks
    solver: CgSolver


@dataclass(frozen=True)
class Record:
    """How far a solve has come: `relative` residuals `[iterations + 1][queries]`, from x = 0 on, and the `seconds` that
    each iteration took; `documents` of the operator."""

    numbers: Numbers
    relative: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...] = ()
    documents: int = 0

    @classmethod
    def begun(cls, numbers: Numbers) -> "Record":
        return cls(numbers, (tuple(numbers.relative.tolist()),))

    @property
    def iterations(self) -> int:
        return len(self.seconds)

    def with_next(self, numbers: Numbers, seconds: float, documents: int) -> "Record":
        relative = (*self.relative, tuple(numbers.relative.tolist()))
        return Record(numbers, relative, (*self.seconds, seconds), documents)

    def next_step(self, solver: CgSolver) -> Step | None:
        """None where every query is solved, or no iteration is left."""
        if self.iterations >= solver.iterations:
            return None
        step = self.numbers.step(solver.tolerance)
        return step if step.going.any() else None

    def write(self, solve: Path) -> None:
        numbers = {name: value.tolist() for name, value in vars(self.numbers).items()}
        write_json(layout.solve_record(solve), vars(self) | {"numbers": numbers} | solve_said(solve))

    @classmethod
    def read(cls, solve: Path) -> "Record | None":
        path = layout.solve_record(solve)
        if not exists(path):
            return None
        mend = f"delete the folder {solve}, and run the same command again"
        found = read_json(path, mend, _Said, solve_said(solve))
        if found["numbers"].keys() != Numbers.__dataclass_fields__.keys():
            return None  # another version's
        at = misfit(found["numbers"], _Numbers)
        if at is not None:
            raise DamagedError(f"{path}: not as this version writes it: see numbers.{at}; {mend}")
        queries = {len(each) for each in (*found["numbers"].values(), *found["numbers"]["beta"], *found["relative"])}
        if len(queries) != 1 or len(found["relative"]) != len(found["seconds"]) + 1:
            raise DamagedError(f"{path}: not one number for each query and iteration; {mend}")
        numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in found["numbers"].items()}
        relative = tuple(map(tuple, found["relative"]))
        return cls(Numbers(**numbers), relative, tuple(found["seconds"]), found["documents"])


@dataclass(frozen=True)
class Solver:
    """Solves stages on the queries' way back of `task`, over `maps`, with the replicas of `pool`."""

    task: CarryTask
    maps: Shapes
    means: dict[int, dict[str, float]]
    pool: ReplicaPool
    steps: Steps
    say: Callable[[str], None]

    def solve(self, solved: Sequence[SolvedStage], source: Source) -> Source:
        """Carries all queries back through the stages, in the order of passing; gives where their answers are."""
        for stage in solved:
            folders = []
            for queries in self._together(stage):
                folders.append(layout.solve(self.task.folder, stage.setup.stage, queries))
                self._solve(stage, queries, folders[-1], source)
            source = Answers(tuple(folders), stage.index)
        return source

    def records(self, stage: SolvedStage) -> list[Record]:
        """What came of the queries of a solved stage, those solved together in one record."""
        folders = [layout.solve(self.task.folder, stage.setup.stage, queries) for queries in self._together(stage)]
        return [record for folder in folders if (record := Record.read(folder)) is not None]

    def _together(self, stage: SolvedStage) -> list[Queries]:
        """The queries that are solved together, as was first decided: a solve that has begun holds for its own."""
        path = layout.solves(self.task.folder) / stage.setup.stage / "groups.json"
        if not exists(path):
            memory: int | None = self.task.run.cluster.directions_memory
            if memory is None:
                waiting = f"{stage.setup.stage}: waiting: "
                free = self.pool.free_memory(stage.setup, CovarianceJob(False, ()), lambda why: self.say(waiting + why))
                memory = int(FREE_SHARE * free)
            each, count = solved_together(self.maps, memory, self._itemsize), len(self.task.queries)
            write_json(path, {"queries": [[start, min(start + each, count)] for start in range(0, count, each)]})
        found = read_json(path)
        # That of an earlier version is the list alone.
        ranges: Any = found.get("queries") if isinstance(found, dict) else found
        is_list = misfit(ranges, list[Pair[int]]) is None
        if not is_list or [*chain(*starmap(range, ranges))] != [*range(len(self.task.queries))]:
            raise UserError(f"{path}: its groups are not of this run's queries, each once; {AGAIN}")
        return [(start, stop) for start, stop in ranges]

    @property
    def _itemsize(self) -> int:
        return accumulating_bytes(self.task.run.cluster.dtype)

    def _solve(self, stage: SolvedStage, queries: Queries, solve: Path, source: Source) -> None:
        """Leaves the answers of some queries at a stage, going on where an earlier driver was."""
        if self._are_there(solve, ANSWER):
            return
        systems = Systems(solve, self._factors(stage), self._damping(stage))
        record = self._resumed(solve)
        if record is None:
            squares = self._each(queries, write_start, systems, self.task, stage.index, queries, source, self.means)
            record = Record.begun(Numbers.begun(sum_over_maps(squares)))
            record.write(solve)
        while (step := record.next_step(stage.solver)) is not None:
            record = self._next(stage, queries, systems, record, step)
        refined = record.numbers.refined(stage.solver.tolerance)
        later = stage.index != self.task.scored
        self._each(queries, write_answer, systems, record.iterations, refined, later)
        for name in (EKFAC, iterate_name(record.iterations)):
            delete_folder(solve / name)

    def _resumed(self, solve: Path) -> Record | None:
        """A solve's record, if the vectors that it counts on are there; else what there is of it is dropped."""
        record = Record.read(solve)
        if record is not None and all(
            self._are_there(solve, what) for what in (EKFAC, iterate_name(record.iterations))
        ):
            return record
        delete_folder(solve, first=layout.solve_record(solve).name)
        return None

    def _are_there(self, solve: Path, what: str) -> bool:
        return all_there([layout.solve_vectors(solve, what, name) for name in self.maps])

    def _next(self, stage: SolvedStage, queries: Queries, systems: Systems, record: Record, step: Step) -> Record:
        """One step of the queries that are under way."""
        began, numbers, number = time.monotonic(), record.numbers, record.iterations + 1
        residuals = numbers.relative[step.going]
        name = (
            f"{stage.setup.stage}: iteration {number} of {stage.solver.iterations} on {len(residuals)} queries "
            f"(relative residual {residuals.median():.3g}, at most {residuals.max():.3g})"
        )
        products = self._product(stage, ProductJob(systems.solve, number - 1, step), number, name)
        met = sum_met(self._each(queries, met_by, systems, products, number, step))
        alpha = numbers.alpha(step, met)
        left = sum_left(self._each(queries, write_next, systems, products, number, step, alpha))
        record = record.with_next(numbers.advanced(met, left), time.monotonic() - began, products.documents)
        record.write(systems.solve)
        delete_folder(_partials(systems.solve, number))
        delete_folder(systems.solve / iterate_name(number - 1))
        return record

    def _product(self, stage: SolvedStage, job: ProductJob, number: int, name: str) -> Coverage:
        inputs = f"{solve_said(job.solve)['solve']}/{number}"  # those of a solve elsewhere are of a step of that name
        with self.steps(f"queries: {name}", stage.blocks.count) as progress:
            found = self.pool.accumulate(stage.setup, job, stage.blocks, _partials(job.solve, number), progress, inputs)
        if not found.documents:
            reasons = Counter(reason for _, reason in found.skipped)
            raise none_usable(stage.blocks.documents, stage.blocks.key, stage.setup.stage, reasons)
        return found

    def _factors(self, stage: SolvedStage) -> Path:
        folder = self.task.factors[stage.index]
        if folder is None:
            raise ValueError(f"{stage.setup.stage} has no factors")
        return folder

    def _damping(self, stage: SolvedStage) -> dict[str, float]:
        """What each map's diagonal is raised by: the scored stage's damping, a later one's α."""
        run, scored, means = self.task.run, self.task.scored, self.means[stage.index]
        found = {name: stages.response_of(run, stage.index, scored, name, means[name])[1] for name in self.maps}
        unreached = next((name for name, strength in found.items() if strength is None), None)
        if unreached is not None:
            raise UserError(
                f"stages.{stage.index}.solver: no token of the fitted documents reached {unreached}, so no relative "
                "strength damps it; give an absolute one, leave it out with `modules:`, or use kind: ekfac"
            )
        return {name: strength for name, strength in found.items() if strength is not None}

    def _each(self, queries: Queries, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        count = queries[1] - queries[0]
        memory = {name: task_bytes(shape, count, self._itemsize) for name, shape in self.maps.items()}
        return for_each_map(function, list(self.maps), *arguments, memory=memory, replicas=self.pool.idle())


def _partials(solve: Path, number: int) -> Path:
    return solve / "partials" / f"{number:04d}"
