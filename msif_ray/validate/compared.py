"""The compared methods: agreement of each with the truth, and the seconds that it takes."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from msif_ray.influence.conjugate import Vectors
from msif_ray.validate import methods, similarity
from msif_ray.validate.agreement import agreement
from msif_ray.validate.experiment import Experiment, Row
from msif_ray.validate.problem import Scores
from msif_ray.validate.trak import Trak

T = TypeVar("T")


@dataclass(frozen=True)
class Timed:
    """A method's scores `[queries, documents]` and its seconds: of what is made once (`overhead`), for each query, and
    for each pair."""

    scores: Scores
    overhead: float
    query: float
    pair: float


def compared(experiment: Experiment) -> list[Row]:
    """One row per method, each kept by itself."""
    return [_row(experiment, name, make) for name, make in _methods(experiment)]


def _row(experiment: Experiment, name: str, make: Callable[[], Timed]) -> Row:
    def measure() -> Row:
        timed = make()
        seconds = {"overhead_seconds": timed.overhead, "query_seconds": timed.query, "pair_seconds": timed.pair}
        row = {"method": name} | agreement(timed.scores, experiment.truth[0]) | seconds
        experiment.say(f"  {name}: {row['pearson']:.3f} / {row['spearman']:.3f}")
        return row

    row: Row = experiment.kept(f"compared/{re.sub('[^a-z0-9]+', '-', name.lower())}", measure)
    return row


def _methods(experiment: Experiment) -> Iterator[tuple[str, Callable[[], Timed]]]:
    problem, budget, setting, seed = experiment.problem, experiment.budget, experiment.setting, experiment.seed
    gradients, damping = problem.query_gradients, experiment.damping
    mlp = {name: gradients[name] for name in setting.mlp}

    def by_directions(make: Callable[[], Vectors], overhead: float = 0.0, shared: bool = False) -> Timed:
        """`shared`: what is made takes its time once, and not for every query."""
        made, seconds = _timed(make)
        scores, scoring = _timed(lambda: problem.scores(made)[0])
        by_query = 0.0 if shared else seconds / len(setting.queries)
        return Timed(scores, overhead + (seconds if shared else 0.0), by_query, scoring / scores.size)

    def by_scores(make: Callable[[], Scores], overhead: float = 0.0) -> Timed:
        scores, seconds = _timed(make)
        return Timed(scores, overhead, 0.0, seconds / scores.size)

    def ekfac(some: Vectors) -> Timed:
        fitted, seconds = experiment.fitted
        return by_directions(lambda: methods.by_factors(fitted.ekfac, damping, some), seconds)

    def kfac() -> Timed:
        fitted, seconds = experiment.fitted
        return by_directions(lambda: methods.by_factors(fitted.kfac, damping, gradients), seconds)

    def trak() -> Timed:
        documents = [*setting.documents, *setting.spare][: budget.trak_documents]
        fitted, seconds = _timed(lambda: Trak.fit(setting, documents, budget.trak, seed))
        return by_scores(fitted.scores, seconds)

    def solved() -> Timed:
        _, directions, about = experiment.truth
        found = by_directions(lambda: directions, experiment.fitted[1])
        return Timed(found.scores, found.overhead, about["query_seconds"], found.pair)

    yield "EK-FAC, all maps", lambda: ekfac(gradients)
    yield "EK-FAC, MLP only", lambda: ekfac(mlp)
    yield "K-FAC, all maps", kfac
    yield "gradient dot product", lambda: by_directions(lambda: gradients)
    yield (
        "gradient cosine",
        lambda: by_scores(lambda: similarity.gradient_cosine(*problem.scores(gradients), gradients)),
    )
    yield "hidden-state cosine", lambda: by_scores(lambda: similarity.hidden_cosine(setting))
    yield "CKA of hidden states", lambda: by_scores(lambda: similarity.linear_cka(setting))
    yield f"TRAK, dimension {budget.trak}", trak
    kept = budget.arnoldi // 2
    yield (
        f"Arnoldi, {budget.arnoldi} steps, {kept} kept",
        lambda: by_directions(lambda: methods.arnoldi(problem, budget.arnoldi, kept, seed), shared=True),
    )
    yield f"CG, residual {experiment.truth[2]['residual']:.0e}", solved
    yield (
        f"LiSSA, {budget.lissa} steps",
        lambda: by_directions(lambda: methods.lissa(problem, damping, budget.lissa, budget.lissa_documents, seed)),
    )


def _timed(make: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    made = make()
    return made, time.monotonic() - began
