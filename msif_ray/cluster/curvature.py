"""A stage's inverse curvature on a rank that scores: what fits in its memory stays there, the rest is read from local
disk, a map at a time, for every batch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from msif_ray import layout, stages
from msif_ray.cluster.directions import STREAM_COPIES, ReadAgain
from msif_ray.cluster.factors import BASIS, checksum_of, mean_eigenvalues, said
from msif_ray.config import Run, Score
from msif_ray.fetch import fetched
from msif_ray.heap import give_back_freed_memory
from msif_ray.influence.curvature import CurvatureMetric
from msif_ray.influence.ekfac import Basis
from msif_ray.influence.groups import Shapes, factor_bytes
from msif_ray.influence.products import wide_type
from msif_ray.influence.response import Nothing, Response
from msif_ray.paths import is_remote


@dataclass(frozen=True)
class Curvature:
    """A scored stage's factors, in the folder `factors`, and its response at each map of `shapes` that has a part in
    scores. `dtype` is the model's; `memory`: bytes of a rank's for the factors; None: what is given to `load`."""

    factors: Path
    shapes: Shapes
    responses: dict[str, Response]
    dtype: str
    memory: int | None = None

    def load(self, device: torch.device, memory: int) -> Mapping[str, CurvatureMetric]:
        """The metrics of all maps with a response, within `self.memory` bytes or else `memory`.

        Those that do not fit are read when asked for, from a local copy; while one is read the one before is still
        there. Raises UserError for a file that is damaged or missing.
        """
        dtype = wide_type(getattr(torch, self.dtype))
        sizes = {name: factor_bytes(self.shapes[name], dtype.itemsize) for name in self.responses}
        left = self.memory or memory
        streams = sum(sizes.values()) > left
        if streams:
            give_back_freed_memory()
            left -= STREAM_COPIES * max(sizes.values())
        folder = fetched(str(self.factors)) if streams and is_remote(self.factors) else self.factors
        metrics = _Metrics(folder, self.factors.name, self.responses, device, dtype)
        for name, size in sizes.items():
            if size <= left:
                metrics.resident[name] = metrics.read(name)
                left -= size
        return metrics


def stage_curvature(run: Run, entry: Score, factors: Path, shapes: Shapes) -> Curvature:
    """That of the fitted stage whose documents a `score` entry is of, by the stage's damping at every map. The response
    is the entry's, as in its scores: the stage's own may be no damped inverse. An expert that no fitted document
    reached has no part, as it has none in scores."""
    responses: dict[str, Response] = {}
    answering, index = run.answering(entry), run.stage_index(entry.stage)
    means = mean_eigenvalues(factors)
    for name in shapes:
        response, _ = stages.response_of(answering, index, index, name, means[name])
        if not isinstance(response, Nothing):
            responses[name] = response
    return Curvature(factors, shapes, responses, run.cluster.dtype, run.cluster.factor_memory)


@dataclass
class _Metrics(Mapping[str, CurvatureMetric]):
    """Metrics by map: those in `resident`, and others read each time from the `folder` of a `stage`'s factors."""

    folder: Path
    stage: str
    responses: dict[str, Response]
    device: torch.device
    dtype: torch.dtype
    resident: dict[str, CurvatureMetric] = field(default_factory=dict)
    _files: dict[str, tuple[ReadAgain, ReadAgain]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> CurvatureMetric:
        return self.resident[name] if name in self.resident else self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.responses)

    def __len__(self) -> int:
        return len(self.responses)

    def read(self, name: str) -> CurvatureMetric:
        if name not in self._files:
            of_basis, of_values = layout.factor_files(self.folder, [name])
            about = said(self.stage, name)
            basis = ReadAgain(of_basis, about)
            about |= {"basis": checksum_of({name: basis.checksums})}
            self._files[name] = basis, ReadAgain(of_values, about)
        basis, eigenvalues = self._files[name]
        sides = (basis.tensor(side).to(self.device, self.dtype) for side in BASIS)
        values = eigenvalues.tensor("eigenvalues").to(self.device, self.dtype)
        return CurvatureMetric(Basis(*sides), self.responses[name](values))
