"""A preconditioner of all maps together, which the truth alone can afford: the operator's largest directions, inverted.

With the rows U of `roots.py`, M = Uᵀ U / N + C is inverted exactly (Woodbury), covariance between maps and between
tokens included, where EK-FAC has neither. What M leaves out is small, and conjugate gradients on H itself make up for
it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from msif_ray.influence.conjugate import Vectors
from msif_ray.influence.modules import LinearMap
from msif_ray.validate.roots import DocumentRoots, gram

ALL = "all maps"
"""The one map that a joint system is over: vectors are `[queries, 1, parameters]`."""


@dataclass(frozen=True)
class JointSystem:
    """H + C of some maps as one, C a `multiple` of D, which is one number, of `means`, for each map. `crossed` is the
    lower triangle of U D⁻¹ Uᵀ / N, `[rows, rows]`."""

    roots: Sequence[DocumentRoots]
    maps: Mapping[str, LinearMap]
    means: Mapping[str, float]
    crossed: Tensor
    multiple: float = 1.0

    @cached_property
    def _small(self) -> Tensor:
        """The Cholesky factor of N (1 + U C⁻¹ Uᵀ / N), `[rows, rows]`."""
        small = self.crossed * (len(self.roots) / self.multiple)
        small.diagonal().add_(len(self.roots))
        return torch.linalg.cholesky(small)

    def precondition(self, vectors: Tensor) -> Tensor:
        """M⁻¹ v = C⁻¹ v − C⁻¹ Uᵀ (N + U C⁻¹ Uᵀ)⁻¹ U C⁻¹ v."""
        scaled = self._undamped(parted({ALL: vectors}, self.maps))
        along = torch.cat([each.times(scaled) for each in self.roots], dim=1)
        weights = torch.cholesky_solve(along.T, self._small).T.split([len(each) for each in self.roots], dim=1)
        left = {name: each.clone() for name, each in scaled.items()}
        for roots, own in zip(self.roots, weights, strict=True):
            for name, each in self._undamped(roots.transposed(own, list(self.maps))).items():
                left[name] -= each
        return joined(left)[ALL]

    def damped(self, product: Tensor, vectors: Tensor) -> Tensor:
        """(H + C) v from H v."""
        damping = {
            name: self.multiple * self.means[name] * each for name, each in parted({ALL: vectors}, self.maps).items()
        }
        return product + joined(damping)[ALL]

    def _undamped(self, vectors: Vectors) -> Vectors:
        """C⁻¹ v."""
        return {name: each / (self.multiple * self.means[name]) for name, each in vectors.items()}


def joint_system(
    roots: Sequence[DocumentRoots], maps: Mapping[str, LinearMap], means: Mapping[str, float]
) -> JointSystem:
    """Over some maps; `means` are each one's D."""
    weights = {name: 1 / (means[name] * len(roots)) for name in maps}
    return JointSystem(roots, maps, means, gram(roots, weights))


def joined(vectors: Vectors) -> Vectors:
    """The vectors of all maps as those of one."""
    return {ALL: torch.cat([each.flatten(1) for each in vectors.values()], dim=1)[:, None]}


def parted(vectors: Vectors, maps: Mapping[str, LinearMap]) -> Vectors:
    """The vectors of one as those of all maps."""
    parts = vectors[ALL][:, 0].split([each.parameters for each in maps.values()], dim=1)
    return {name: part.reshape(-1, *maps[name].shape) for name, part in zip(maps, parts, strict=True)}
