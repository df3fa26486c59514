"""Scores of every method against those of conjugate gradients run to convergence (the paper's first experiment)."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from msif_ray.influence.conjugate import Numbers, Solution, Vectors, solve
from msif_ray.store import load_tensors, save_tensors, write_json
from msif_ray.validate import methods
from msif_ray.validate.agreement import agreement
from msif_ray.validate.kept import kept
from msif_ray.validate.problem import Fitted, Problem, Scores, relative_damping
from msif_ray.validate.setting import Setting, Sizes, make_setting

Row = dict[str, Any]

# Iterations whose scores are compared with the last one's.
LOOKED_AT = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Budget:
    """What each part of the experiment may take. `dampings` are multiples of the mean eigenvalue: the first is that of
    the comparison, and the others are tried with `few_queries`."""

    dampings: tuple[float, ...] = (0.1, 1.0, 0.01, 0.001)
    tolerance: float = 1e-4
    iterations: int = 200
    few_queries: int = 2
    few_iterations: int = 96
    block_iterations: int = 24
    lissa: int = 200
    arnoldi: int = 60
    draws: int = 16


@dataclass(frozen=True)
class Experiment:
    """One run of it; each part is kept in `folder` and not computed again."""

    sizes: Sizes
    budget: Budget
    seed: int
    folder: Path
    say: Callable[[str], None]

    def run(self) -> dict[str, Any]:
        """All parts: `compared` methods, what separates EK-FAC from the truth (`separates`), and `refined` queries."""
        parts = {"compared": self._compared, "separates": self._separates, "refined": self._refined}
        found = {name: self._kept(name, part) for name, part in parts.items()}
        return found | {"setting": self._kept("setting", self._described)}

    def _kept(self, name: str, part: Callable[[], Any]) -> Any:
        return kept(self.folder, name, part, self.say)

    @cached_property
    def setting(self) -> Setting:
        return make_setting(self.sizes, self.seed, self.folder)

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.setting, self.sizes.tokens_per_batch)

    @cached_property
    def fitted(self) -> Fitted:
        return self.problem.fit(self.setting.documents, seed=self.seed)

    @cached_property
    def damping(self) -> dict[str, float]:
        return relative_damping(self.fitted.ekfac, self.budget.dampings[0])

    @cached_property
    def truth(self) -> tuple[Scores, Vectors, Row]:
        """Scores by conjugate gradients at the first damping, the directions, and how far they converged."""
        path, problem = self.folder / "truth.safetensors", self.problem
        if not path.exists():
            self._solve_truth(path)
        about = json.loads((self.folder / "truth.json").read_text())
        directions = load_tensors(path)
        return problem.scores(directions)[0], directions, about

    def _solve_truth(self, path: Path) -> None:
        began, problem = time.monotonic(), self.problem
        rows, found = self._watched(self.budget.dampings[0], problem, self.budget.iterations)
        seconds = (time.monotonic() - began) / len(self.setting.queries)
        about = {"iterations": len(found.residuals) - 1, "residual": float(found.residuals[-1].max())}
        write_json(self.folder / "truth.json", about | {"query_seconds": seconds, "iterates": rows})
        save_tensors(path, found.solution)

    def _tell(self, numbers: Numbers) -> None:
        relative = numbers.relative
        self.say(f"  relative residual {float(relative.median()):.2e}, at most {float(relative.max()):.2e}")

    def _described(self) -> Row:
        tokens = sum(len(document.ids) for document in self.setting.documents)
        return {
            "sizes": asdict(self.sizes),
            "budget": asdict(self.budget),
            "seed": self.seed,
            "loss_nats_per_token": self.setting.loss,
            "tracked_parameters": sum(each.parameters for each in self.setting.maps.values()),
            "operator_tokens": tokens,
            "truth": {key: value for key, value in self.truth[2].items() if key != "iterates"},
        }

    def _compared(self) -> list[Row]:
        """One row per method: agreement with the truth and what it took."""
        problem, setting = self.problem, self.setting
        truth, directions, about = self.truth
        gradients, budget = problem.query_gradients, self.budget
        pairs = truth.size
        began = time.monotonic()
        fitted = problem.fit(setting.documents, seed=self.seed)
        fit_seconds = time.monotonic() - began
        rows: list[Row] = []

        def add(method: str, make: Callable[[], Vectors], overhead: float = 0.0, shared: bool = False) -> Scores:
            """`shared`: what is made takes its time once, and not for every query."""
            began = time.monotonic()
            made = make()
            seconds = time.monotonic() - began
            began = time.monotonic()
            scores, norms = problem.scores(made)
            pair_seconds = (time.monotonic() - began) / pairs
            by_query = 0.0 if shared else seconds / len(setting.queries)
            row = {
                "overhead_seconds": overhead + (seconds if shared else 0.0),
                "query_seconds": by_query,
                "pair_seconds": pair_seconds,
            }
            rows.append({"method": method} | agreement(scores, truth) | row)
            self.say(f"  {method}: {rows[-1]['pearson']:.3f} / {rows[-1]['spearman']:.3f}")
            if method == "gradient dot product":
                cosines = methods.cosine(scores, norms, gradients)
                rows.append({"method": "gradient cosine"} | agreement(cosines, truth) | row)
            return scores

        mlp = {name: gradients[name] for name in setting.mlp}
        add("EK-FAC, all maps", lambda: methods.by_factors(fitted.ekfac, self.damping, gradients), fit_seconds)
        add("EK-FAC, MLP only", lambda: methods.by_factors(fitted.ekfac, self.damping, mlp), fit_seconds)
        add("K-FAC, all maps", lambda: methods.by_factors(fitted.kfac, self.damping, gradients), fit_seconds)
        add("gradient dot product", lambda: gradients)
        add(f"LiSSA, {budget.lissa} steps", lambda: methods.lissa(problem, self.damping, budget.lissa, self.seed))
        kept = budget.arnoldi // 2
        add(
            f"Arnoldi, {budget.arnoldi} steps, {kept} kept",
            lambda: methods.arnoldi(problem, budget.arnoldi, kept, self.seed),
            shared=True,
        )
        began = time.monotonic()
        similar = methods.hidden_similarity(setting)
        row = {"overhead_seconds": 0.0, "query_seconds": 0.0, "pair_seconds": (time.monotonic() - began) / pairs}
        rows.append({"method": "hidden-state cosine"} | agreement(similar, truth) | row)
        add(f"CG, residual {about['residual']:.0e}", lambda: directions, fit_seconds)
        rows[-1]["query_seconds"] = about["query_seconds"]
        return rows

    def _separates(self) -> list[Row]:
        """What EK-FAC's factors are made of, one thing changed at a time, and the exact inverse of each map's block."""
        problem, setting = self.problem, self.setting
        truth, gradients = self.truth[0], problem.query_gradients
        count = len(setting.documents)
        fits: dict[str, Callable[[], Fitted]] = {
            "one label per position": lambda: self.fitted,
            f"{self.budget.draws} labels per position": lambda: problem.fit(
                setting.documents, self.budget.draws, self.seed
            ),
            "a quarter of the documents": lambda: problem.fit(setting.documents[: count // 4], seed=self.seed),
            "eight times as many documents": lambda: problem.fit(
                [*setting.documents, *setting.spare[: 7 * count]], seed=self.seed
            ),
        }
        rows = []
        for name, fit in fits.items():
            # The truth's own damping: only the factors differ.
            scores, _ = problem.scores(methods.by_factors(fit().ekfac, self.damping, gradients))
            rows.append({"change": name, "against": "CG"} | agreement(scores, truth))
            self.say(f"  {name}: {rows[-1]['pearson']:.3f} / {rows[-1]['spearman']:.3f}")
        return rows + self._blocks()

    def _blocks(self) -> list[Row]:
        """The few queries' scores by exact inverses of each map's own block of H: all maps' sum lies between EK-FAC and
        the truth."""
        few, truth = self._few(), self.truth[0][: self.budget.few_queries]
        exact: Scores = np.zeros_like(truth)
        approximate: Scores = np.zeros_like(truth)
        residuals = []
        for name in self.setting.maps:
            right = {name: few.query_gradients[name]}
            systems = few.systems({name: self.fitted.ekfac[name]}, self.damping)
            found = solve(systems, right, few.product, self.budget.block_iterations, 1e-2)
            residuals.append(float(found.residuals[-1].max()))
            exact += few.scores(found.solution)[0]
            approximate += few.scores(methods.by_factors(self.fitted.ekfac, self.damping, right))[0]
            self.say(f"  {name}: residual {residuals[-1]:.1e}")
        about = {"residual": max(residuals), "queries": self.budget.few_queries}
        return [
            {"change": "EK-FAC, these queries", "against": "CG"} | agreement(approximate, truth) | about,
            {"change": "exact blocks, one per map", "against": "CG"} | agreement(exact, truth) | about,
            {"change": "EK-FAC, these queries", "against": "exact blocks"} | agreement(approximate, exact) | about,
        ]

    def _few(self) -> Problem:
        setting = replace(self.setting, queries=self.setting.queries[: self.budget.few_queries])
        return Problem(setting, self.sizes.tokens_per_batch)

    def _refined(self) -> list[Row]:
        """Agreement of the first iterates with the last, and their residuals, at each damping."""
        rows: list[Row] = self.truth[2]["iterates"]
        for multiple in self.budget.dampings[1:]:
            rows = rows + self._watched(multiple, self._few(), self.budget.few_iterations)[0]
        return rows

    def _watched(self, multiple: float, problem: Problem, iterations: int) -> tuple[list[Row], Solution]:
        """A solve at one damping, and a row for each iterate that is looked at: its agreement with the last."""
        systems = problem.systems(self.fitted.ekfac, relative_damping(self.fitted.ekfac, multiple))
        seen: list[tuple[int, Numbers, Scores]] = []
        count = 0

        def look(vectors: Vectors, numbers: Numbers) -> None:
            nonlocal count
            self._tell(numbers)
            if count in LOOKED_AT:
                seen.append((count, numbers, problem.scores(vectors)[0]))
            count += 1

        found = solve(systems, problem.query_gradients, problem.product, iterations, self.budget.tolerance, look)
        truth = problem.scores(found.solution)[0]
        self.say(f"  damping {multiple:g}: residual {float(found.residuals[-1].max()):.1e}, {count - 1} iterations")
        rows = [
            {
                "damping": multiple,
                "iteration": iteration,
                "queries": len(truth),
                "residual": float(numbers.relative.mean()),
                "metric_residual": float((numbers.met / seen[0][1].met).sqrt().mean()),
                "last": count - 1,
                "residual_of_last": float(found.residuals[-1].max()),
                "scale": float(np.abs(scores).mean() / np.abs(truth).mean()),
            }
            | agreement(scores, truth)
            for iteration, numbers, scores in seen
        ]
        return rows, found
