"""What separates EK-FAC from the truth: its factors with one thing changed at a time, and the exact inverse of each
map's block."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np

from msif_ray.influence.conjugate import State, Vectors, solve
from msif_ray.validate.agreement import agreement
from msif_ray.validate.experiment import Experiment, Row
from msif_ray.validate.joint import ALL, joined, joint_system, parted
from msif_ray.validate.methods import by_factors
from msif_ray.validate.problem import Fitted, Problem, Scores

# Relative residual of the inverses of single maps' blocks.
BLOCK_TOLERANCE = 1e-2


def separates(experiment: Experiment) -> list[Row]:
    """A row per change of the factors, and rows of each map's own block."""
    return [*_factors(experiment), *experiment.kept("separates/blocks", lambda: _blocks(experiment))]


def _factors(experiment: Experiment) -> list[Row]:
    problem, documents, draws = experiment.problem, experiment.setting.documents, experiment.budget.draws
    seed, count, more = experiment.seed, len(documents), [*documents, *experiment.setting.spare[: 7 * len(documents)]]
    fits: dict[str, Callable[[], Fitted]] = {
        "one label per position": lambda: experiment.fitted[0],
        f"{draws} labels per position": lambda: problem.fit(documents, draws, seed),
        "a quarter of the documents": lambda: problem.fit(documents[: count // 4], seed=seed),
        "eight times as many documents": lambda: problem.fit(more, seed=seed),
    }

    def row(name: str, fit: Callable[[], Fitted]) -> Row:
        # The truth's own damping: only the factors differ.
        scores, _ = problem.scores(by_factors(fit().ekfac, experiment.damping, problem.query_gradients))
        return _said(experiment, {"change": name, "against": "CG"} | agreement(scores, experiment.truth[0]))

    return [
        experiment.kept(f"separates/{number}-factors", partial(row, name, fit))
        for number, (name, fit) in enumerate(fits.items())
    ]


def _blocks(experiment: Experiment) -> list[Row]:
    """The few queries' scores, from EK-FAC, from exact inverses of single maps' blocks, and from the truth, which has
    the blocks between maps too."""
    few, truth = experiment.few, experiment.truth[0][: experiment.budget.few_queries]
    found: dict[str, Scores] = {}
    residuals: dict[str, list[float]] = {}
    for name in experiment.setting.maps:
        kept = experiment.kept(f"separates/blocks-{name}", partial(_of_map, experiment, few, name))
        for inverse, about in kept.items():
            found[inverse] = found.get(inverse, 0.0) + np.array(about["scores"])
            residuals.setdefault(inverse, []).append(about["residual"])
    about = {inverse: {"residual": max(each), "queries": len(truth)} for inverse, each in residuals.items()}
    names = list(found)
    pairs = [(name, "CG") for name in names] + list(pairwise(names))
    against = found | {"CG": truth}
    return [
        _said(experiment, {"change": name, "against": other} | agreement(found[name], against[other]) | about[name])
        for name, other in pairs
    ]


def _of_map(experiment: Experiment, few: Problem, name: str) -> dict[str, Row]:
    """Scores of the few queries over one map, and the residual, by each inverse of its block."""
    right = {name: few.query_gradients[name]}
    inverses = {
        "EK-FAC": (by_factors(experiment.fitted[0].ekfac, experiment.damping, right), 0.0),
        "exact blocks": _exact(experiment, few, name),
    }
    residuals = ", ".join(f"{inverse} {residual:.1e}" for inverse, (_, residual) in inverses.items())
    experiment.say(f"  {name}: {residuals}")
    return {
        inverse: {"scores": few.scores(directions)[0].tolist(), "residual": residual}
        for inverse, (directions, residual) in inverses.items()
    }


def _exact(experiment: Experiment, few: Problem, name: str) -> tuple[Vectors, float]:
    """The solution and its largest relative residual."""
    maps, iterations = {name: experiment.setting.maps[name]}, experiment.budget.block_iterations
    systems = {ALL: joint_system(experiment.roots, maps, {name: experiment.damping[name]})}
    begun = State.begun(systems, joined({name: few.query_gradients[name]}))
    state = solve(systems, begun, lambda v: joined(few.product(parted(v, maps))), iterations, BLOCK_TOLERANCE)
    return parted(state.solution, maps), float(state.residuals[-1].max())


def _said(experiment: Experiment, row: Row) -> Row:
    experiment.say(f"  {row['change']} against {row['against']}: {row['pearson']:.3f} / {row['spearman']:.3f}")
    return row
