"""The steps of a run in one process, as a rank does them, and the training pass they are compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from msif_ray.benchmark.workload import Workload
from msif_ray.heap import trim
from msif_ray.influence.batch import Batch
from msif_ray.influence.capture import Capture
from msif_ray.influence.curvature import CurvatureMetric, curvature_squares
from msif_ray.influence.directions import DenseDirections, Directions, LowRankDirections, laid_out
from msif_ray.influence.ekfac import Basis, CorrectionSums, CovarianceSums, Factor, eigenbasis
from msif_ray.influence.kept import KeptPasses
from msif_ray.influence.labels import batch_uniforms
from msif_ray.influence.modules import LinearMap, find_linear_maps
from msif_ray.influence.queries import carry_back, query_tokens
from msif_ray.influence.response import DampedInverse
from msif_ray.influence.scoring import Scorer
from msif_ray.influence.threads import side_by_side

DAMPING = 0.1  # times the mean eigenvalue


@dataclass
class Steps:
    """A workload's model, documents and what its steps give. Factors are fitted with labels `sampled` from the model,
    or with the data's own. `keep`: bytes for what the covariances' pass captured, which the corrections take from
    there."""

    workload: Workload
    sampled: bool = True
    keep: int = 0
    model: GPTNeoXForCausalLM = field(init=False)
    maps: dict[str, LinearMap] = field(init=False)
    batches: list[Batch] = field(init=False)
    kept: KeptPasses = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.workload.model()
        self.maps = find_linear_maps(self.model)
        self.batches = self.workload.batches()
        self.kept = KeptPasses(0)

    def train(self) -> None:
        """Forward and full backward over all documents, and no optimizer: what a user's training step costs."""
        self.model.requires_grad_(True)
        for batch in self.batches:
            labels = batch.input_ids.masked_fill(~batch.targets, -100)
            mask = batch.attention_mask.long()
            self.model(input_ids=batch.input_ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
            self.model.zero_grad(set_to_none=True)

    def passes(self) -> None:
        """Forward and backward to the activations, which every step needs, and nothing else."""
        with Capture(self.model, self.maps) as capture:
            for batch in self.batches:
                capture.run(batch)

    def _uniforms(self, batch: Batch) -> Tensor | None:
        return batch_uniforms(0, "benchmark", batch) if self.sampled else None

    def covariance(self) -> CovarianceSums:
        if self.kept.bytes:  # a fit has all that it keeps from the system, whose pages cost time
            self.forget()
            trim()
        sums, self.kept = CovarianceSums(), KeptPasses(self.keep)
        with Capture(self.model, self.maps) as capture:
            for batch in self.batches:
                captured = capture.run(batch, self._uniforms(batch))
                sums.add(captured)
                self.kept.offer(captured)
        return sums

    def forget(self) -> None:
        """Drops what the last covariances' pass captured."""
        self.kept = KeptPasses(0)

    def bases(self, sums: CovarianceSums, names: Sequence[str]) -> dict[str, Basis]:
        """Eigenbases, computed where the sums are, in the type of the sums; on a CPU side by side, a thread for each,
        as a run's tasks are."""
        totals, found = sums.sums, {}
        keys = [f"{side}/{name}" for name in names for side in ("A", "S")]
        largest_first = sorted(keys, key=lambda key: -len(totals[key]))
        means = (totals[key] / sums.counts[key] for key in largest_first)
        each = side_by_side(_eigenvectors, means, torch.device(self.workload.device))
        vectors = dict(zip(largest_first, each, strict=True))
        for name in names:
            found[name] = Basis(vectors[f"A/{name}"], vectors[f"S/{name}"])
        return found

    def random_basis(self, described: LinearMap) -> Basis:
        """Random numbers in the place of a map's eigenbasis, which rotate in the same time."""
        dtype = torch.promote_types(self.workload.dtype, torch.float32)
        sides = (described.columns, described.out_features)
        return Basis(*(torch.randn(n, n, dtype=dtype, device=self.workload.device) / n**0.5 for n in sides))

    def correction(self, bases: dict[str, Basis]) -> dict[str, Tensor]:
        """Corrected eigenvalues by map."""
        sums = CorrectionSums(bases)
        with Capture(self.model, self.maps) as capture:
            for batch in self.batches:
                captured = self.kept.find(batch)
                sums.add(capture.run(batch, self._uniforms(batch)) if captured is None else captured)
        return {name: sums.sums[f"E/{name}"] / self.workload.documents for name in self.maps}

    def directions(
        self, bases: Mapping[str, Basis], eigenvalues: Mapping[str, Tensor], queries: int, rank: int | None
    ) -> dict[str, Directions]:
        """Queries of random tokens, carried back through the one stage; with a `rank`, random numbers of that rank,
        whose scores take the same time."""
        if rank is not None:
            return {name: _random(described, queries, rank, self.workload) for name, described in self.maps.items()}
        gradients: dict[str, list[Tensor]] = {name: [] for name in self.maps}
        with Capture(self.model, self.maps) as capture:
            for batch in self.workload.queries(queries):
                captured = capture.run(batch)
                for row in range(len(batch.keys)):
                    for name, tokens in query_tokens(captured, row).items():
                        gradients[name].append(tokens.gradient)
        found: dict[str, Directions] = {}
        for name, stacked in gradients.items():
            factor = Factor(bases[name], eigenvalues[name])
            response = DampedInverse(DAMPING * factor.mean_eigenvalue)
            found[name] = laid_out(DenseDirections(carry_back(torch.stack(stacked), [(factor, response)])))
        return found

    def metrics(self, bases: Mapping[str, Basis], eigenvalues: Mapping[str, Tensor]) -> dict[str, CurvatureMetric]:
        """The inverse curvature of every map; without `eigenvalues` with ones for weights, which take the same time."""
        found = {}
        for name, described in self.maps.items():
            weights = torch.ones(described.shape, dtype=bases[name].gradients.dtype, device=self.workload.device)
            if name in eigenvalues:
                factor = Factor(bases[name], eigenvalues[name])
                weights = DampedInverse(DAMPING * factor.mean_eigenvalue)(factor.eigenvalues)
            found[name] = CurvatureMetric(bases[name], weights)
        return found

    def score(
        self,
        directions: Mapping[str, Directions],
        metrics: Mapping[str, CurvatureMetric] | None = None,
        norms: bool = True,
    ) -> Tensor:
        """Scores `[documents, queries]`, on the CPU, with documents' `norms`; with `metrics` those in them, too."""
        scorer, scores = Scorer(directions, norms=norms), []
        with Capture(self.model, self.maps) as capture:
            for batch in self.batches:
                captured = capture.run(batch)
                scores.append(scorer.score(captured)[0].cpu())
                if metrics is not None:
                    curvature_squares(metrics, captured).cpu()
        return torch.cat(scores)


def _eigenvectors(covariance: Tensor) -> Tensor:
    return eigenbasis(covariance)[1].to(covariance.dtype).contiguous()


def _random(described: LinearMap, queries: int, rank: int, workload: Workload) -> LowRankDirections:
    out, columns = described.shape
    dtype = torch.promote_types(workload.dtype, torch.float32)
    left, right = (torch.randn(queries, rank, n, dtype=dtype, device=workload.device) for n in (out, columns))
    return LowRankDirections.stacked(left, right)
