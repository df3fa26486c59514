"""What every method says of the pipeline's final models: scores of all queries and pre-training documents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedModel

from msif_ray.corpus.windows import Encoded
from msif_ray.demo import run
from msif_ray.influence.conjugate import State, Vectors, solve
from msif_ray.influence.ekfac import Factor
from msif_ray.influence.modules import find_linear_maps
from msif_ray.influence.queries import carry_back, truncate
from msif_ray.influence.response import (
    DampedInverse,
    Proximal,
    Response,
    UnrolledFilter,
    UnrolledInverse,
)
from msif_ray.validate.pipeline import Pipeline
from msif_ray.validate.problem import Problem, Scores, relative_damping
from msif_ray.validate.setting import Setting

TOKENS_PER_BATCH = 1024

TWO_STAGES, UNROLLED = "two stages, proximal", "two stages, unrolled"
SINGLE, SINGLE_OWN, SINGLE_LATER = (
    "single stage, fine-tuned query",
    "single stage, the base model's own query",
    "single stage at the fine-tuned model",
)
DOT, BM25, RANDOM, ORACLE = "gradient dot product", "BM25", "random", "documents that state the fact"
CONJUGATE = ", by conjugate gradients"
RELATIVE, OVER_MEAN, ABSOLUTE = "× mean", "/ mean", "absolute"


@dataclass(frozen=True)
class Strengths:
    """The grids. Dampings and `alphas` are multiples of each map's mean eigenvalue; `times` (η·T of an unrolled
    response) are multiples of 1 over the mean eigenvalue of all maps."""

    dampings: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001, 0.0001)
    alphas: tuple[float, ...] = (0.1, 1.0, 10.0)
    times: tuple[float, ...] = (0.1, 1.0, 10.0)
    scored_times: tuple[float, ...] = (10.0, 1000.0)
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Attribution:
    """`scores` `[queries, documents]` of a method, at a damping and, of two stages, a strength of the later stage: α or
    η·T, as given by `unit`: a multiple (of the mean eigenvalue, or of 1 over it) or an absolute number."""

    method: str
    scores: Scores
    damping: float | None = None
    strength: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Attributions:
    """All methods' for one fine-tuned model; `alpha` is that of the real proximal term, if there was one."""

    pipeline: Pipeline
    pretrained: PreTrainedModel
    finetuned: PreTrainedModel
    strengths: Strengths
    alpha: float | None
    seed: int

    def all(self) -> Iterator[Attribution]:
        yield from self._two_stages()
        yield from self._unrolled()
        own, later = self.base.query_gradients, self.later_corpus.query_gradients
        for method, problem, factors, gradients in (
            (SINGLE, self.base, self.base_factors, self.later.query_gradients),
            (SINGLE_OWN, self.base, self.base_factors, own),
            (SINGLE_LATER, self.later_corpus, self._fit(self.later_corpus), later),
        ):
            for damping in self.strengths.dampings:
                yield self._carried(method, problem, gradients, [(factors, self._damped(factors, damping))], damping)
        yield from self._without_curvature()

    @cached_property
    def base(self) -> Problem:
        """The pre-trained model on its documents."""
        return self._problem(self.pretrained, self.pipeline.documents)

    @cached_property
    def later(self) -> Problem:
        """The fine-tuned model on the questions that it was tuned on."""
        return self._problem(self.finetuned, self.pipeline.finetuning)

    @cached_property
    def later_corpus(self) -> Problem:
        """The fine-tuned model on the pre-training documents."""
        return self._problem(self.finetuned, self.pipeline.documents)

    @cached_property
    def base_factors(self) -> dict[str, Factor]:
        return self._fit(self.base)

    @cached_property
    def later_factors(self) -> dict[str, Factor]:
        return self._fit(self.later)

    def two_stages(self, damping: float, alpha: float, relative: bool = True, rank: int | None = None) -> Attribution:
        """As the package has it: the proximal response of the later stage, then the damped inverse of the first; with
        a `rank`, cut to so many vectors of each map."""
        later = {name: Proximal(value) for name, value in self._alphas(alpha, relative).items()}
        chain: Chain = [(self.later_factors, later), (self.base_factors, self._damped(self.base_factors, damping))]
        attribution = self._carried(TWO_STAGES, self.base, self.later.query_gradients, chain, damping, rank)
        return replace(attribution, strength=alpha, unit=RELATIVE if relative else ABSOLUTE)

    def by_conjugate_gradients(
        self, damping: float, alpha: float | None, relative: bool, queries: int, iterations: int, tolerance: float
    ) -> tuple[Attribution, list[State]]:
        """Of the first queries: (H + C)⁻¹ and, with an `alpha`, α (H + α)⁻¹ by solves on the Gauss-Newton Hessians of
        all documents, and how far these came, the later stage's first. Whatever their residuals, the last iterates."""
        gradients = {name: rows[:queries] for name, rows in self.later.query_gradients.items()}
        found = []
        if alpha is not None:
            alphas = self._alphas(alpha, relative)
            systems = self.later.systems(self.later_factors, alphas)
            found.append(solve(systems, State.begun(systems, gradients), self.later.product, iterations, tolerance))
            gradients = {name: alphas[name] * rows for name, rows in found[0].solution.items()}
        systems = self.base.systems(self.base_factors, relative_damping(self.base_factors, damping))
        found.append(solve(systems, State.begun(systems, gradients), self.base.product, iterations, tolerance))
        method = (SINGLE if alpha is None else TWO_STAGES) + CONJUGATE
        scores = self.base.scores(found[-1].solution)[0]
        unit = "" if alpha is None else RELATIVE if relative else ABSOLUTE
        return Attribution(method, scores, damping, alpha, unit), found

    def _two_stages(self) -> Iterator[Attribution]:
        for damping in self.strengths.dampings:
            for alpha in self.strengths.alphas:
                yield self.two_stages(damping, alpha)
            if self.alpha is not None:
                yield self.two_stages(damping, self.alpha, relative=False)

    def _unrolled(self) -> Iterator[Attribution]:
        """The later stage's filter by each of `times`, before the damped inverse and before the unrolled inverse."""
        means = [_mean(factors) for factors in (self.later_factors, self.base_factors)]
        gradients = self.later.query_gradients
        for time in self.strengths.times:
            first = (self.later_factors, _everywhere(self.later_factors, UnrolledFilter(time / means[0])))
            for damping in self.strengths.dampings:
                chain = [first, (self.base_factors, self._damped(self.base_factors, damping))]
                found = self._carried(UNROLLED, self.base, gradients, chain, damping)
                yield replace(found, strength=time, unit=OVER_MEAN)
            for own in self.strengths.scored_times:
                last = _everywhere(self.base_factors, UnrolledInverse(own / means[1]))
                found = self._carried(UNROLLED, self.base, gradients, [first, (self.base_factors, last)], None)
                yield replace(found, method=f"{UNROLLED}, both (ηT₁ {own:g} / mean)", strength=time, unit=OVER_MEAN)

    def _without_curvature(self) -> Iterator[Attribution]:
        pipeline, shape = self.pipeline, (len(self.pipeline.queries), len(self.pipeline.documents))
        yield Attribution(DOT, self.base.scores(self.later.query_gradients)[0])
        yield Attribution(BM25, run.bm25_scores(pipeline.texts, pipeline.questions).astype(np.float64))
        yield Attribution(RANDOM, np.random.default_rng(self.seed).standard_normal(shape))
        yield Attribution(ORACLE, pipeline.states.astype(np.float64))

    @cached_property
    def norms(self) -> Scores:
        """Of the documents' gradients at the pre-trained model, `[documents]`."""
        return self.base.scores({name: rows[:1] for name, rows in self.later.query_gradients.items()})[1]

    def _problem(self, model: PreTrainedModel, documents: list[Encoded]) -> Problem:
        pipeline = self.pipeline
        setting = Setting(
            model,
            pipeline.tokenizer,
            find_linear_maps(model),
            documents,
            [],
            pipeline.documents,
            pipeline.queries,
            0.0,
        )
        return Problem(setting, TOKENS_PER_BATCH)

    def _fit(self, problem: Problem) -> dict[str, Factor]:
        return problem.fit(problem.setting.documents, seed=self.seed).ekfac

    def _alphas(self, alpha: float, relative: bool) -> dict[str, float]:
        return relative_damping(self.later_factors, alpha) if relative else dict.fromkeys(self.later_factors, alpha)

    def _damped(self, factors: Mapping[str, Factor], damping: float) -> dict[str, Response]:
        return {name: DampedInverse(value) for name, value in relative_damping(factors, damping).items()}

    def _carried(
        self,
        method: str,
        problem: Problem,
        gradients: Vectors,
        chain: "Chain",
        damping: float | None,
        rank: int | None = None,
    ) -> Attribution:
        directions = {}
        for name, rows in gradients.items():
            carried = carry_back(rows, [(factors[name], responses[name]) for factors, responses in chain])
            directions[name] = truncate(carried, rank)[0].dense
        return Attribution(method, problem.scores(directions)[0], damping)


Chain = Sequence[tuple[Mapping[str, Factor], Mapping[str, Response]]]
"""By stage, the last first: factors and responses by map."""


def _everywhere(factors: Mapping[str, Factor], response: Response) -> dict[str, Response]:
    return dict.fromkeys(factors, response)


def _mean(factors: Mapping[str, Factor]) -> float:
    """Of the eigenvalues of all maps."""
    total = sum(float(factor.eigenvalues.double().sum()) for factor in factors.values())
    return total / sum(factor.eigenvalues.numel() for factor in factors.values())
