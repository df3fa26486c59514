"""Scores of every method against what retraining on other documents does: random halves, and documents removed."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from msif_ray.config import ProximalResponse, Stage, Strength
from msif_ray.store import load_tensors, save_tensors
from msif_ray.validate import attributions as methods
from msif_ray.validate.attributions import Attribution, Attributions, Strengths
from msif_ray.validate.kept import check_kept, kept, plain
from msif_ray.validate.lds import Lds, lds
from msif_ray.validate.removal import Removals, plan_removals, removal_rows
from msif_ray.validate.retrained import ADAMW, FINETUNED, PRETRAINED, PROXIMAL, Outcomes, Trainings

Row = dict[str, Any]

DIVIDED = " / norm"
REMOVALS = "removals"
# Methods whose documents are removed, each at the strengths that predict the halves best.
REMOVED_BY = (methods.TWO_STAGES, methods.SINGLE, methods.DOT, methods.BM25)


@dataclass(frozen=True)
class Budget:
    """How many trainings: random `halves`, and `removals`. `solved_queries` are solved by conjugate gradients."""

    halves: int = 120
    removals: Removals = field(default_factory=Removals)
    solved_queries: int = 16
    iterations: int = 64
    tolerance: float = 0.05
    solved_dampings: tuple[float, ...] = (0.1, 0.001)
    strengths: Strengths = field(default_factory=Strengths)


@dataclass(frozen=True)
class Retraining:
    """The experiment: trainings, attributions of the final models, and how well these predict those."""

    trainings: Trainings
    budget: Budget
    say: Callable[[str], None]

    def run(self) -> Row:
        """Rows of `predicted` (linear datamodeling scores), `solved` (the same of exact solves), `removed` and
        `recommended`, with the `setting`. More halves than before add to those that are there, and so do more groups
        of removals. Raises UserError, before anything is trained, where a part that is kept is of something else."""
        self.trainings.check()
        for name, of in self._parts.items():
            check_kept(self.trainings.folder, name, of)
        predicted = [row for kind in FINETUNED for row in self._predicted(kind)]
        return {
            "predicted": predicted,
            "recommended": [self._recommended(kind) for kind in FINETUNED],
            "removed": self._removed(),
            "solved": self._solved(),
            "setting": self._described(),
        }

    @cached_property
    def _parts(self) -> dict[str, Row]:
        """What each part that is asked for and kept depends on beyond the trainings' setting, by its name."""
        budget, removals = self.budget, self.budget.removals
        parts: dict[str, Row] = {_attributions(kind): {"strengths": asdict(budget.strengths)} for kind in FINETUNED}
        if removals.groups:
            parts[REMOVALS] = {"group": removals.queries, "removed": removals.documents, "random": removals.random}
        if budget.solved_queries:
            of = {key: getattr(budget, key) for key in ("solved_queries", "iterations", "tolerance")}
            parts |= {_solves(damping): of for damping in budget.solved_dampings}
        return parts

    def _kept(self, name: str, part: Callable[[], Any]) -> Any:
        return kept(self.trainings.folder, name, part, self.say, self._parts[name])

    @cached_property
    def halves(self) -> Outcomes:
        return self.trainings.halves(self.budget.halves)

    def attributions(self, kind: str) -> Attributions:
        """Of the final model fine-tuned in that way."""
        final, sizes = self.trainings.final, self.trainings.sizes
        alpha = sizes.alpha if kind == PROXIMAL else None
        return Attributions(
            self.trainings.pipeline, final[PRETRAINED], final[kind], self.budget.strengths, alpha, self.trainings.seed
        )

    @cached_property
    def judged(self) -> dict[str, list[tuple[Attribution, Lds]]]:
        """Every attribution and its linear datamodeling score, by kind of fine-tuning; the best of each method also
        divided by the norms of the documents' gradients."""
        found = {}
        for kind in FINETUNED:
            source = self.attributions(kind)
            own = [(each, self._judge(kind, each)) for each in self._attributed(kind, source)]
            best = [max((pair for pair in own if pair[0].method == method), key=_mean) for method in _methods(own)]
            divided = [
                replace(each, method=each.method + DIVIDED, scores=each.scores / source.norms)
                for each, _ in best
                if each.method not in (methods.BM25, methods.RANDOM, methods.ORACLE, methods.SINGLE_LATER)
            ]
            ranked = self._ranked(source, next(each for each, _ in best if each.method == methods.TWO_STAGES))
            found[kind] = own + [(each, self._judge(kind, each)) for each in (*divided, *ranked)]
            self.say(f"{kind}: {len(found[kind])} attributions")
        return found

    def _attributed(self, kind: str, source: Attributions) -> list[Attribution]:
        """All that the source has, kept: they do not depend on how many halves there are."""
        path = self.trainings.folder / f"{_attributions(kind)}.safetensors"

        def made() -> list[Row]:
            found = list(source.all())
            save_tensors(path, {str(place): torch.from_numpy(each.scores) for place, each in enumerate(found)})
            return [_described(each) for each in found]

        about = self._kept(_attributions(kind), made)
        scores = load_tensors(path)
        return [Attribution(scores=scores[str(place)].numpy(), **each) for place, each in enumerate(about)]

    def _ranked(self, source: Attributions, best: Attribution) -> Iterable[Attribution]:
        """Two stages at low rank, with the strengths that are best without."""
        for rank in self.budget.strengths.ranks:
            relative = best.unit == methods.RELATIVE
            found = source.two_stages(best.damping or 0.0, best.strength or 0.0, relative, rank)
            yield replace(found, method=f"{found.method}, rank {rank}")

    def best(self, kind: str, method: str) -> tuple[Attribution, Lds]:
        """A method's attribution with the highest linear datamodeling score."""
        return max((pair for pair in self.judged[kind] if pair[0].method == method), key=_mean)

    def _judge(self, kind: str, attribution: Attribution) -> Lds:
        measured = self.halves.log_likelihoods[kind]
        return lds(attribution.scores, self.halves.included, measured[:, : len(attribution.scores)])

    def _predicted(self, kind: str) -> Iterable[Row]:
        for each, found in self.judged[kind]:
            yield {"kind": kind} | _described(each) | _figures(found)

    def _recommended(self, kind: str) -> Row:
        """The best damping and α (or, in its place, η·T) of two stages, and how much better than the package's default
        and than one stage."""
        both = [self.best(kind, method) for method in (methods.TWO_STAGES, methods.UNROLLED)]
        attribution, found = max(both, key=_mean)
        default = self._judge(kind, self.attributions(kind).two_stages(*_defaults()))
        others = {
            "above_default": found.above(default),
            "proximal_above_unrolled": both[0][1].above(both[1][1]),
            "above_single_stage": found.above(self.best(kind, methods.SINGLE)[1]),
            "above_bm25": found.above(self.best(kind, methods.BM25)[1]),
            "above_oracle": found.above(self.best(kind, methods.ORACLE)[1]),
        }
        return {"kind": kind} | _described(attribution) | _figures(found) | {"default": default.mean} | others

    def _removed(self) -> list[Row]:
        if not self.budget.removals.groups:
            return []
        plan = self._kept(REMOVALS, self._plan)
        return removal_rows(self.trainings, plan, self.budget.removals.groups, REMOVED_BY, methods.BM25)

    def _plan(self) -> Row:
        scores = {method: self.best(ADAMW, method)[0].scores for method in REMOVED_BY}
        return plan_removals(self.budget.removals, scores, self.trainings.seed)

    def _solved(self) -> list[Row]:
        """Converged conjugate gradients in the place of EK-FAC, beside EK-FAC for the same queries, for the model
        whose proximal term is real: one stage, and two with the α that was used."""
        budget, source = self.budget, self.attributions(PROXIMAL)
        rows = []
        for damping in budget.solved_dampings if budget.solved_queries else ():
            for part in self._kept(_solves(damping), partial(self._solve, source, damping)):
                scores = np.array(part.pop("scores"))
                found = self._judge(PROXIMAL, Attribution("", scores))
                rows.append(part | _figures(found))
        return rows

    def _solve(self, source: Attributions, damping: float) -> list[Row]:
        budget, alpha = self.budget, self.trainings.sizes.alpha
        few = budget.solved_queries
        ekfac = [
            next(a for a, _ in self.judged[PROXIMAL] if a.method == methods.SINGLE and a.damping == damping),
            source.two_stages(damping, alpha, relative=False),
        ]
        rows: list[Row] = [_described(each) | {"scores": each.scores[:few].tolist()} for each in ekfac]
        for strength in (None, alpha):
            attribution, solutions = source.by_conjugate_gradients(
                damping, strength, False, few, budget.iterations, budget.tolerance
            )
            residual = max(float(each.residuals[-1].max()) for each in solutions)
            about = {"residual": residual, "iterations": max(len(each.residuals) - 1 for each in solutions)}
            rows.append(_described(attribution) | {"scores": attribution.scores.tolist()} | about)
        return rows

    def _described(self) -> Row:
        trainings, final = self.trainings, self.trainings.pipeline
        measured = self.halves
        return {
            "sizes": plain(asdict(trainings.sizes)),
            "budget": plain(asdict(self.budget)),
            "seed": trainings.seed,
            "documents": trainings.count,
            "finetuning": len(final.finetuning),
            "queries": len(final.queries),
            "halves": len(measured.included),
            "documents_nats_per_token": trainings.documents_loss,
            "gradient_left": float(measured.gradient.mean()),
            "log_likelihood": {kind: float(each.mean()) for kind, each in measured.log_likelihoods.items()},
            "spread": {kind: float(each.std(axis=0).mean()) for kind, each in measured.log_likelihoods.items()},
        }


def _defaults() -> tuple[float, float]:
    """The package's damping and α as multiples of a map's mean eigenvalue."""
    damping: Strength = Stage.model_fields["damping"].default
    return damping.resolve(1.0), ProximalResponse().alpha.resolve(1.0)


def _attributions(kind: str) -> str:
    return f"attributions-{kind}"


def _solves(damping: float) -> str:
    return f"solved-{damping:g}"


def _methods(pairs: Iterable[tuple[Attribution, Lds]]) -> list[str]:
    return list(dict.fromkeys(each.method for each, _ in pairs))


def _mean(pair: tuple[Attribution, Lds]) -> float:
    return pair[1].mean


def _described(attribution: Attribution) -> Row:
    return {
        "method": attribution.method,
        "damping": attribution.damping,
        "strength": attribution.strength,
        "unit": attribution.unit,
    }


def _figures(found: Lds) -> Row:
    return {"lds": found.mean, "interval": found.interval, "standard_error": found.standard_error}
