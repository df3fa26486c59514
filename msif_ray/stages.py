"""A stage as the run uses it: which stages need factors, and the response each one has."""

from msif_ray.config import (
    CgSolver,
    Classification,
    Documents,
    IdentityResponse,
    Preference,
    ProximalResponse,
    Run,
    Score,
    Strength,
    UnrolledResponse,
)
from msif_ray.corpus.objectives import Classes, Objective
from msif_ray.corpus.preferences import Pairs
from msif_ray.errors import UserError
from msif_ray.influence.linear import is_routed
from msif_ray.influence.response import (
    DampedInverse,
    Identity,
    Nothing,
    Proximal,
    Response,
    UnrolledFilter,
    UnrolledInverse,
)


def is_identity(run: Run, index: int) -> bool:
    return isinstance(run.stages[index].response, IdentityResponse)


def objective_of(run: Run, index: int, documents: Documents, classes: tuple[str, ...]) -> Objective:
    """How a stage whose model has these classes reads documents, or queries."""
    objective = run.stages[index].objective
    if documents.label is not None and isinstance(objective, Classification):
        return Classes(classes, objective.truncate)
    if documents.chosen is not None and isinstance(objective, Preference):
        return Pairs(objective.beta, objective.length_normalised)
    return None


def query_tokens(run: Run) -> int | None:
    """The most tokens of a query, which is one window; None: however many there are, within the model's context."""
    last = run.stages[-1]
    cut = isinstance(last.objective, Classification) and last.objective.truncate
    return last.fit.max_tokens if cut else None


def carried_through(run: Run, scored: int) -> list[int]:
    """The stages a query passes on its way back to the scored one, last stage first, scored stage last."""
    return list(range(len(run.stages) - 1, scored - 1, -1))


def solved_stages(run: Run, scored: int) -> list[int]:
    """Those of the passed stages, in the order of passing, that are solved by conjugate gradients."""
    passed = carried_through(run, scored)
    return [i for i in passed if isinstance(run.stages[i].solver, CgSolver) and not is_identity(run, i)]


def all_solved_stages(run: Run) -> set[int]:
    """The stages that some score entry solves by conjugate gradients."""
    return {i for s in run.score for i in solved_stages(run.answering(s), run.stage_index(s.stage))}


def solver_of(run: Run, index: int) -> CgSolver:
    """The solver of a stage of `solved_stages`."""
    solver = run.stages[index].solver
    if not isinstance(solver, CgSolver):
        raise ValueError(f"stage {index} is not solved by conjugate gradients")
    return solver


def stages_with_factors(run: Run) -> list[int]:
    """The stages whose factors some score or index needs: those indexed, and those passed, unless their response is
    the identity."""
    needed = {
        index
        for score in run.score
        for index in carried_through(run, run.stage_index(score.stage))
        if not is_identity(run.answering(score), index)
    }
    return sorted(needed | set(indexed_stages(run)))


def indexed_stages(run: Run) -> list[int]:
    return sorted(run.stage_index(entry.stage) for entry in run.index)


def passes(run: Run) -> list[list[Score]]:
    """The `score` entries that share a pass over the same windows of the same documents."""
    shared: dict[str, list[Score]] = {}
    for entry in run.score:
        documents = run.scored_documents(entry).model_dump_json()
        chosen = "" if entry.candidates is None else entry.candidates.model_dump_json()
        shared.setdefault(f"{entry.stage} {entry.max_tokens} {entry.index} {documents} {chosen}", []).append(entry)
    return list(shared.values())


def response_of(
    run: Run, index: int, scored: int, map_name: str, mean_eigenvalue: float
) -> tuple[Response, float | None]:
    """The response of stage `index` at one map when stage `scored` is scored, and the damping or α used.

    A scored stage answers with its damped inverse (DESIGN.md §2), or with the unrolled form where
    the stage is described so; a later stage with its filter (default: proximal).

    An expert that no token of the fitted documents reached has a mean eigenvalue of zero, and no strength relative to
    it: a later stage leaves it alone (α/(0 + α) is 1 whatever α), and it takes no part in the scores of that stage's
    documents, as the gradients of those that were fitted take none in it.

    Raises UserError, naming the map, for a relative strength where the mean eigenvalue of any other map is zero.
    """
    stage = run.stages[index]
    response = stage.response
    if isinstance(response, IdentityResponse):
        return Identity(), None
    if isinstance(response, UnrolledResponse):
        time = response.rate * response.steps
        return (UnrolledInverse(time) if index == scored else UnrolledFilter(time)), None
    proximal = response or ProximalResponse()
    strength = stage.damping if index == scored else proximal.alpha
    if strength.relative is not None and is_unreached(map_name, mean_eigenvalue):
        return (Nothing() if index == scored else Identity()), None
    key = "damping" if index == scored else "response.alpha"
    value = positive_strength(strength, mean_eigenvalue, f"stages.{index}.{key}", map_name)
    return (DampedInverse(value) if index == scored else Proximal(value)), value


def is_unreached(map_name: str, mean_eigenvalue: float) -> bool:
    """Whether a map is of an expert that no token of the fitted documents reached."""
    return mean_eigenvalue == 0.0 and is_routed(map_name)


def positive_strength(strength: Strength, mean_eigenvalue: float, key: str, map_name: str) -> float:
    """A damping or an α as an eigenvalue. Raises UserError, naming the key and the map, where that is zero."""
    value = strength.resolve(mean_eigenvalue)
    if not value > 0:
        raise UserError(
            f"{key}: {map_name} has no curvature, so a relative strength is zero; "
            "give an absolute one or leave the map out"
        )
    return value


def metric_damping(strength: Strength, mean_eigenvalue: float, key: str, map_name: str) -> float:
    """The damping of an index's metric, as an eigenvalue. Raises UserError as `positive_strength` does, but for an
    expert that nothing reached, whose metric is anyone's choice: its directions are zero."""
    if is_unreached(map_name, mean_eigenvalue):
        return 1.0
    return positive_strength(strength, mean_eigenvalue, key, map_name)
