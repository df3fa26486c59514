"""What the parts of the first experiment share: the setting, the factors, the truth, and what is kept of them."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from msif_ray.influence.conjugate import State, Vectors
from msif_ray.store import load_tensors, save_tensors
from msif_ray.validate.agreement import agreement
from msif_ray.validate.joint import ALL, JointSystem, joint_system
from msif_ray.validate.kept import check_setting, kept
from msif_ray.validate.methods import by_factors
from msif_ray.validate.problem import Fitted, Problem, Scores, relative_damping
from msif_ray.validate.roots import DocumentRoots, largest_roots
from msif_ray.validate.setting import Setting, Sizes, make_setting
from msif_ray.validate.watch import Watch, true_residuals

Row = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """What each part of the experiment may take. `dampings` are multiples of the mean eigenvalue: the first is that of
    the comparison, and the others are tried with `few_queries`. `rows` are those of the truth's preconditioner
    (`joint.py`), `iterations` its own, and `few_iterations` those of the package's solver."""

    dampings: tuple[float, ...]
    tolerance: float
    iterations: int
    few_queries: int
    few_iterations: int
    block_iterations: int
    lissa: int
    lissa_documents: int
    arnoldi: int
    trak: int
    trak_documents: int
    draws: int
    rows: int


@dataclass(frozen=True)
class Experiment:
    """One run of it; each part is kept in `folder` and not computed again."""

    sizes: Sizes
    budget: Budget
    seed: int
    folder: Path
    say: Callable[[str], None]

    def check(self) -> None:
        """Raises UserError where `folder` holds parts of another setting; further dampings may be added to one, since
        the parts of each have its name."""
        budget = asdict(self.budget) | {"dampings": self.budget.dampings[:1]}
        check_setting(self.folder, {"sizes": asdict(self.sizes), "seed": self.seed, "budget": budget})

    def kept(self, name: str, part: Callable[[], Any]) -> Any:
        """What `part` gave, from `<name>.json` where an earlier call left it."""
        return kept(self.folder, name, part, self.say)

    @cached_property
    def setting(self) -> Setting:
        return make_setting(self.sizes, self.seed, self.folder)

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.setting, self.sizes.tokens_per_batch)

    @cached_property
    def few(self) -> Problem:
        """The same of the first few queries."""
        return replace(
            self.problem, setting=replace(self.setting, queries=self.setting.queries[: self.budget.few_queries])
        )

    @cached_property
    def fitted(self) -> tuple[Fitted, float]:
        """The factors, and the seconds they took."""
        began = time.monotonic()
        return self.problem.fit(self.setting.documents, seed=self.seed), time.monotonic() - began

    @cached_property
    def damping(self) -> dict[str, float]:
        return relative_damping(self.fitted[0].ekfac, self.budget.dampings[0])

    @cached_property
    def roots(self) -> list[DocumentRoots]:
        return largest_roots(self.problem, self.budget.rows)

    @cached_property
    def joint(self) -> JointSystem:
        """The truth's preconditioner, at 1 × the mean eigenvalues."""
        began = time.monotonic()
        means = relative_damping(self.fitted[0].ekfac, 1.0)
        found = joint_system(self.roots, self.setting.maps, means)
        self.say(f"  {len(found.crossed)} directions: {time.monotonic() - began:.0f} s")
        return found

    @cached_property
    def truth(self) -> tuple[Scores, Vectors, Row]:
        """Scores by conjugate gradients at the first damping, the directions, and how far they converged."""
        path = self.folder / "truth.safetensors"
        about = self.kept("truth", lambda: self._solved_truth(path))
        directions = load_tensors(path)
        return self.problem.scores(directions)[0], directions, about

    def _solved_truth(self, path: Path) -> Row:
        about, found = self.solved(self.budget.dampings[0], self.problem)
        save_tensors(path, found)
        return about

    def solved(self, multiple: float, problem: Problem) -> tuple[Row, Vectors]:
        """The solution at one damping: its residual, iterations and seconds, and how iterates of the package's solver
        come to it (`iterates`, a row for each that is looked at)."""
        damping = relative_damping(self.fitted[0].ekfac, multiple)
        of_truth = Watch(self.folder / f"state-{multiple}-joint.safetensors", problem, self.say, joint=True)
        last = of_truth.solve(
            {ALL: replace(self.joint, multiple=multiple)}, self.budget.iterations, self.budget.tolerance
        )
        solution = of_truth.solution(last)
        residual = float(true_residuals(problem, damping, solution).max())
        self.say(f"  damping {multiple:g}: {last.iterations} iterations, residual {residual:.1e}")
        about = {"iterations": last.iterations, "residual": residual}
        about |= {"query_seconds": of_truth.seconds[-1] / len(problem.setting.queries)}
        truth = problem.scores(solution)[0]
        rows = [
            {"damping": multiple, "residual_of_truth": residual} | row
            for row in [*self._iterates(multiple, problem, truth), *_rows(last, of_truth, truth)]
        ]
        return about | {"iterates": rows}, solution

    def _iterates(self, multiple: float, problem: Problem, truth: Scores) -> list[Row]:
        """Those of the package's solver; 0 is EK-FAC's answer."""
        ekfac = self.fitted[0].ekfac
        damping = relative_damping(ekfac, multiple)
        watch = Watch(self.folder / f"state-{multiple}.safetensors", problem, self.say)
        watch.scores[0] = problem.scores(by_factors(ekfac, damping, problem.query_gradients))[0]
        systems = problem.systems(ekfac, damping)
        return _rows(watch.solve(systems, self.budget.few_iterations, self.budget.tolerance), watch, truth)


def _rows(state: State, watch: Watch, truth: Scores) -> list[Row]:
    """Of every iterate that was looked at; the residual of the first is that of M⁻¹ b."""
    relative = [state.numbers.relative_of_ekfac, *state.residuals[1:]]
    return [
        {
            "preconditioner": "directions" if watch.joint else "EK-FAC",
            "iteration": number,
            "queries": len(truth),
            "residual": float(relative[number].mean()),
            "seconds": watch.seconds[number],
            "scale": float(np.abs(scores).mean() / np.abs(truth).mean()),
        }
        | agreement(scores, truth)
        for number, scores in sorted(watch.scores.items())
    ]
