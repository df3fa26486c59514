"""The computations that all compared solvers share, in one process: factors, products, query gradients and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msif_ray.corpus.windows import Encoded
from msif_ray.influence.batch import Batch
from msif_ray.influence.capture import Capture
from msif_ray.influence.conjugate import System, Vectors
from msif_ray.influence.directions import DenseDirections
from msif_ray.influence.ekfac import Basis, CorrectionSums, CovarianceSums, Factor, eigenbasis
from msif_ray.influence.labels import batch_uniforms
from msif_ray.influence.products import mm
from msif_ray.influence.queries import query_tokens
from msif_ray.influence.scoring import Scorer
from msif_ray.validate.setting import Setting, batches

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Fitted:
    """EK-FAC factors by map, and K-FAC's: the same bases with eigenvalues (T/N) λ_S λ_Aᵀ, T targets in N documents."""

    ekfac: dict[str, Factor]
    kfac: dict[str, Factor]


@dataclass(frozen=True)
class Problem:
    """A setting and how many tokens are in a batch. Products may be held to one map at a time: see `product`."""

    setting: Setting
    tokens_per_batch: int

    def of(self, documents: Sequence[Encoded]) -> "Problem":
        """The same with an operator of other documents."""
        return replace(self, setting=replace(self.setting, documents=list(documents)))

    @cached_property
    def operator_batches(self) -> list[Batch]:
        return batches(self.setting.documents, self.tokens_per_batch)

    def product(self, directions: Vectors) -> Vectors:
        """H v of the operator's documents, H over the maps that `directions` name alone.

        All queries are in one pass, where the package takes one for each: models and batches are small here.
        """
        maps = {name: self.setting.maps[name] for name in directions}
        sums = {name: torch.zeros_like(every) for name, every in directions.items()}
        with Capture(self.setting.model, maps) as capture:
            for batch in self.operator_batches:
                queries = len(next(iter(directions.values())))
                captured = capture.curve(_repeated(batch, queries), directions)
                for name, total in sums.items():
                    inputs, gradients = captured.activations(name), captured.gradients(name)
                    pairs = zip(gradients.tensor_split(queries), inputs.tensor_split(queries), strict=True)
                    for query, (g, a) in enumerate(pairs):
                        total[query] += mm(g.flatten(0, 1).T, a.flatten(0, 1))
        return {name: total / len(self.setting.documents) for name, total in sums.items()}

    def fit(self, documents: Sequence[Encoded], draws: int = 1, seed: int = 0) -> Fitted:
        """EK-FAC of some documents, with so many labels drawn at every position (DESIGN.md §2)."""
        found = batches(list(documents), self.tokens_per_batch)
        covariances = CovarianceSums()
        with Capture(self.setting.model, self.setting.maps) as capture:
            for draw in range(draws):
                for batch in found:
                    covariances.add(capture.run(batch, batch_uniforms(seed + draw, "validate", batch)))
            sums, counts = covariances.sums, covariances.counts
            spectra = {key: eigenbasis(total.double() / counts[key]) for key, total in sums.items()}
            bases = {
                name: Basis(spectra[f"A/{name}"][1].float(), spectra[f"S/{name}"][1].float())
                for name in self.setting.maps
            }
            corrections = CorrectionSums(bases)
            for draw in range(draws):
                for batch in found:
                    corrections.add(capture.run(batch, batch_uniforms(seed + draw, "validate", batch)))
        ekfac, kfac = {}, {}
        for name, basis in bases.items():
            ekfac[name] = Factor(basis, corrections.sums[f"E/{name}"] / (draws * len(documents)))
            values = torch.outer(spectra[f"S/{name}"][0], spectra[f"A/{name}"][0]).clamp_min(0)
            targets = counts[f"A/{name}"] / draws / len(documents)
            kfac[name] = Factor(basis, (targets * values).float())
        return Fitted(ekfac, kfac)

    @cached_property
    def query_gradients(self) -> Vectors:
        """`[queries, out, columns]` by map."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.setting.maps}
        with Capture(self.setting.model, self.setting.maps) as capture:
            for query in self.setting.queries:
                (batch,) = batches([query], self.tokens_per_batch)
                for name, tokens in query_tokens(capture.run(batch), 0).items():
                    found[name].append(tokens.gradient)
        return {name: torch.stack(gradients) for name, gradients in found.items()}

    def scores(self, directions: Vectors, documents: Sequence[Encoded] | None = None) -> tuple[Scores, Scores]:
        """⟨D, ∇ℓ(z)⟩ of every query and scored document, `[queries, documents]`, over the maps that `directions` name,
        and the norms of ∇ℓ(z) over these, `[documents]`."""
        documents = self.setting.scored if documents is None else documents
        places = {document.document_id: place for place, document in enumerate(documents)}
        queries = len(next(iter(directions.values())))
        scores, squares = np.zeros((queries, len(documents))), np.zeros(len(documents))
        scorer = Scorer({name: DenseDirections(vectors) for name, vectors in directions.items()})
        maps = {name: self.setting.maps[name] for name in directions}
        with Capture(self.setting.model, maps) as capture:
            for batch in batches(list(documents), self.tokens_per_batch):
                found, norms = scorer.score(capture.run(batch))
                rows = [places[key.document_id] for key in batch.keys]
                np.add.at(scores.T, rows, found.numpy())
                np.add.at(squares, rows, norms.numpy())
        return scores, np.sqrt(squares)

    def systems(self, factors: Mapping[str, Factor], damping: Mapping[str, float]) -> dict[str, System]:
        return {name: System(factor, damping[name]) for name, factor in factors.items()}


def _repeated(batch: Batch, times: int) -> Batch:
    """The rows of windows so many times, one after another."""
    return Batch(
        batch.input_ids.repeat(times, 1),
        batch.attention_mask.repeat(times, 1),
        batch.targets.repeat(times, 1),
        batch.keys * times,
    )


def relative_damping(factors: Mapping[str, Factor], multiple: float) -> dict[str, float]:
    """A multiple of each map's mean corrected eigenvalue."""
    return {name: multiple * factor.mean_eigenvalue for name, factor in factors.items()}
