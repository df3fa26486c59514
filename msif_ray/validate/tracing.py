"""All methods' scores of all documents at one map, and the norms that scores may be divided by.

Everything is computed in the eigenbasis of the scored documents' curvature, in which a document's gradient is needed
once for all: G' = Q_Sᵀ G Q_A. There a score is ⟨r(Λ) ∘ G'_q, G'⟩, and a norm is a weighted sum of squares of G'.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msif_ray.influence.capture import Captured
from msif_ray.influence.directions import DenseDirections, laid_out
from msif_ray.influence.ekfac import Basis, CorrectionSums, CovarianceSums, Factor, eigenbasis, window_gradients
from msif_ray.influence.products import times
from msif_ray.influence.queries import map_tokens
from msif_ray.influence.response import DampedInverse, Proximal, Response, UnrolledFilter
from msif_ray.validate.recording import Recording

PROXIMAL, UNROLLED = "two stages, proximal", "two stages, unrolled"
FIRST, FIRST_OWN, SECOND = "single stage at θ₁", "single stage at θ₁, its own query", "single stage at θ₂"
DOT_PRODUCT = "gradient dot product"

# What a score is divided by. Names are those of the tables.
PLAIN, FROBENIUS, INVERSE, STEP = "score", "/ ‖g‖", "/ √(gᵀH⁻¹g)", "/ ‖H⁻¹g‖"


@dataclass(frozen=True)
class Passes:
    """What is recorded: the documents and the queries at θ₁ and θ₂ with their own labels; with drawn labels documents
    at both and the fine-tuning's at θ₂, from which factors are fitted."""

    documents: tuple[Recording, Recording]
    queries: tuple[Recording, Recording]
    fitted: tuple[Recording, Recording]
    finetuning: Recording

    @property
    def all(self) -> list[Recording]:
        return [*self.documents, *self.queries, *self.fitted, self.finetuning]


@dataclass(frozen=True)
class Traced:
    """Scores `[queries, documents]` by (method, damping), and squared norms `[documents]` by (stage, norm, damping):
    stage 0 is θ₁; a damping is a multiple of the mean eigenvalue, 0 where there is none."""

    scores: dict[tuple[str, float], Tensor]
    squares: dict[tuple[int, str, float], Tensor]


def trace(name: str, passes: Passes, dampings: Sequence[float], alpha: float) -> Traced:
    """One map's share of every score and squared norm: all add over maps.

    `alpha` and the dampings are multiples of the map's mean eigenvalue. The unrolled response has ηT = 1/α.
    """
    first, later = fit(passes.fitted[0], name), fit(passes.finetuning, name)
    own, tuned = passes.queries
    strength = alpha * later.mean_eigenvalue
    queries = rotated_queries(tuned, name, first.basis)
    through = rotated_queries(tuned, name, later.basis)
    between = change_of_basis(later.basis, first.basis)
    responses: dict[str, Response] = {PROXIMAL: Proximal(strength), UNROLLED: UnrolledFilter(1 / strength)}
    met = {method: between.rotate(response(later.eigenvalues) * through) for method, response in responses.items()}
    met |= {FIRST: queries, FIRST_OWN: rotated_queries(own, name, first.basis)}
    traced = _scored(passes.documents[0], name, first, met, dampings, stage=0, plain={DOT_PRODUCT: queries})
    second = fit(passes.fitted[1], name)
    met = {SECOND: rotated_queries(tuned, name, second.basis)}
    of_second = _scored(passes.documents[1], name, second, met, dampings, stage=1)
    return Traced(traced.scores | of_second.scores, traced.squares | of_second.squares)


def fit(recording: Recording, name: str) -> Factor:
    """The map's EK-FAC factor (DESIGN.md §2) of the recorded documents."""
    covariances = CovarianceSums()
    for captured in recording.captured(name):
        covariances.add(captured)
    means = {key: total.double() / covariances.counts[key] for key, total in covariances.sums.items()}
    activations, gradients = (eigenbasis(means[f"{side}/{name}"])[1].float() for side in "AS")
    corrections = CorrectionSums({name: Basis(activations, gradients)})
    for captured in recording.captured(name):
        corrections.add(captured)
    return Factor(corrections.bases[name], corrections.sums[f"E/{name}"] / len(recording.documents))


def change_of_basis(old: Basis, new: Basis) -> Basis:
    """Whose `rotate` turns what is rotated into the old basis into what is rotated into the new one."""
    return Basis(old.activations.T @ new.activations, old.gradients.T @ new.gradients)


def rotated_queries(recording: Recording, name: str, basis: Basis) -> Tensor:
    """Q_Sᵀ G_q Q_A of every query, `[queries, out, columns]`, from its tokens."""
    places = _places(recording)
    found: dict[int, Tensor] = {}
    for captured in recording.captured(name):
        for key, tokens in zip(captured.batch.keys, map_tokens(captured, name), strict=True):
            rotated = (tokens.gradients @ basis.gradients).T @ (tokens.activations @ basis.activations)
            found[places[key.document_id]] = rotated
    return torch.stack([found[place] for place in range(len(found))])


def _scored(
    documents: Recording,
    name: str,
    factor: Factor,
    queries: Mapping[str, Tensor],
    dampings: Sequence[float],
    stage: int,
    plain: Mapping[str, Tensor] | None = None,
) -> Traced:
    """Scores of every method's queries at every damping, of the `plain` ones without curvature, and the norms."""
    directions = {(method, 0.0): vectors for method, vectors in (plain or {}).items()}
    weights = {(stage, FROBENIUS, 0.0): torch.ones_like(factor.eigenvalues)}
    for damping in dampings:
        inverse = DampedInverse(damping * factor.mean_eigenvalue)(factor.eigenvalues)
        directions |= {(method, damping): inverse * vectors for method, vectors in queries.items()}
        weights |= {(stage, INVERSE, damping): inverse, (stage, STEP, damping): inverse.square()}
    scores, squares = project(
        documents, name, factor.basis, torch.cat(list(directions.values())), torch.stack(list(weights.values()))
    )
    counts = [len(vectors) for vectors in directions.values()]
    return Traced(dict(zip(directions, scores.split(counts), strict=True)), dict(zip(weights, squares, strict=True)))


def project(
    documents: Recording, name: str, basis: Basis, directions: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """⟨D, G'⟩ and Σ w ∘ G'² of every document's rotated gradient G', `[n, documents]` and `[m, documents]` in float64;
    `directions` `[n, out, columns]`, rotated, and `weights` `[m, out, columns]`."""
    places = _places(documents)
    scores = torch.zeros(len(directions), len(places), dtype=torch.float64)
    squares = torch.zeros(len(weights), len(places), dtype=torch.float64)
    many, few = laid_out(DenseDirections(directions)), laid_out(DenseDirections(weights))
    for captured in documents.captured(name):
        rows = [places[key.document_id] for key in captured.batch.keys]
        start = 0
        for gradients in _rotated(captured, name, basis):
            at = rows[start : start + len(gradients)]
            scores[:, at] = many.products(gradients).T.double()
            squares[:, at] = few.products(gradients.square_()).T.double()
            start += len(gradients)
    return scores, squares


def _rotated(captured: Captured, name: str, basis: Basis) -> Iterator[Tensor]:
    """Q_Sᵀ G Q_A of a batch's windows, some at a time, from rotated tokens."""
    activations = times(captured.activations(name), basis.activations)
    return window_gradients(activations, times(captured.gradients(name), basis.gradients), multiple=16, transposed=True)


def _places(recording: Recording) -> dict[str, int]:
    return {document.document_id: place for place, document in enumerate(recording.documents)}
