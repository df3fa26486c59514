"""EK-FAC: covariances → eigenbasis → corrected eigenvalues, and a response applied in that basis.

Kronecker-factored Gauss-Newton with corrected eigenvalues: George et al. 2018; for language
models Grosse et al. 2023, §2.2 and appendix B. All sums are kept raw, so partial sums add.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msif_ray.influence.capture import Captured
from msif_ray.influence.modules import LinearMap
from msif_ray.influence.response import Identity, Response

# Entries of per-window gradients held at once: 16 MB of float32, which stay in a CPU's cache (1.9 times the
# speed of 256 MB on two EPYC cores), and 256 MB on a GPU, whose matrix products want many rows.
GRADIENT_ENTRIES = {"cpu": 2**22, "cuda": 2**26}

# Positions per covariance product. Short products added up round less than one long one, and rounding
# here turns eigenvectors: a third of a float32 score's error at small damping.
COVARIANCE_POSITIONS = 64


@dataclass
class CovarianceSums:
    """Σ a aᵀ and Σ g gᵀ over the positions that predict a target, for every tracked map.

    `sums` holds `A/<map>` `[columns, columns]` and `S/<map>` `[out, out]`; `counts` the positions
    summed under the same names. Accumulation is in float32 (float64 for a float64 model).
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, captured: Captured) -> None:
        for name in captured.maps:
            mask = captured.predicts(name)
            self._add(f"A/{name}", captured.activations(name)[mask])
            self._add(f"S/{name}", captured.gradients(name)[mask])

    def _add(self, key: str, vectors: Tensor) -> None:
        total = self.sums.setdefault(key, vectors.new_zeros(vectors.shape[1], vectors.shape[1]))
        for part in vectors.split(COVARIANCE_POSITIONS):
            total.addmm_(part.T, part)
        self.counts[key] = self.counts.get(key, 0) + len(vectors)


def eigenbasis(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, `[n]`) and eigenvectors (columns, `[n, n]`) of a symmetric matrix, float64."""
    matrix = covariance.double()
    return torch.linalg.eigh((matrix + matrix.T) / 2)


@dataclass(frozen=True)
class Basis:
    """The eigenbasis of one map: `activations` Q_A `[columns, columns]`, `gradients` Q_S `[out, out]`."""

    activations: Tensor
    gradients: Tensor

    def rotate(self, gradient: Tensor) -> Tensor:
        """Q_Sᵀ G Q_A of gradients `[..., out, columns]`."""
        return self.gradients.T @ gradient @ self.activations

    def rotate_back(self, gradient: Tensor) -> Tensor:
        """Q_S G Q_Aᵀ of rotated gradients `[..., out, columns]`."""
        return self.gradients @ gradient @ self.activations.T


@dataclass
class CorrectionSums:
    """Σ ((Q_Sᵀ G Q_A)[o, i])² over windows, for every tracked map.

    `sums` holds `E/<map>` `[out, columns]`. Divided by the number of documents fitted it is the
    corrected eigenvalue Λ (DESIGN.md §2; George et al. 2018, eq. 12).
    """

    bases: dict[str, Basis]
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, captured: Captured) -> None:
        for name, described in captured.maps.items():
            total = self.sums.setdefault(f"E/{name}", captured.activations(name).new_zeros(described.shape))
            for rotated in self._rotated(captured, described):
                total.add_(rotated.square_().sum(0))

    def _rotated(self, captured: Captured, described: LinearMap) -> Iterator[Tensor]:
        """The rotated window gradients `[windows, out, columns]`, some rows at a time."""
        basis = self.bases[described.name]
        activations, gradients = captured.activations(described.name), captured.gradients(described.name)
        out, columns = described.shape
        tokens = activations.shape[1]
        if rotates_vectors(tokens, out, columns):
            activations = activations @ basis.activations
            gradients = gradients @ basis.gradients
            yield from window_gradients(activations, gradients)
        else:
            yield from map(basis.rotate, window_gradients(activations, gradients))


def rotates_vectors(tokens: int, out: int, columns: int) -> bool:
    """Whether a window's vectors are rotated, or else its gradient: whichever takes fewer multiplications."""
    return vector_rotation_cost(tokens, out, columns) < gradient_rotation_cost(out, columns)


def vector_rotation_cost(tokens: int, out: int, columns: int) -> int:
    """Multiplications per window of a Q_A and g Q_S."""
    return tokens * (out**2 + columns**2)


def gradient_rotation_cost(out: int, columns: int) -> int:
    """Multiplications per window, or per query, of Q_Sᵀ G Q_A."""
    return out * columns * (out + columns)


def window_gradients(activations: Tensor, gradients: Tensor) -> Iterator[Tensor]:
    """G = Σ_t g_t a_tᵀ of each row, `[some rows, out, columns]` at a time so that memory is bounded.

    What is yielded is overwritten by the next: fresh memory for each would cost more than the product.
    """
    rows, columns, out = len(activations), activations.shape[-1], gradients.shape[-1]
    at_once = min(rows, max(1, GRADIENT_ENTRIES[activations.device.type] // (columns * out)))
    space = activations.new_empty(at_once, out, columns)
    for a, g in zip(activations.split(at_once), gradients.split(at_once), strict=True):
        yield torch.bmm(g.transpose(1, 2), a, out=space[: len(a)])


@dataclass(frozen=True)
class Factor:
    """One map's EK-FAC factor: its eigenbasis and corrected eigenvalues Λ `[out, columns]`, undamped."""

    basis: Basis
    eigenvalues: Tensor

    def apply(self, response: Response, gradient: Tensor) -> Tensor:
        """r(H) G = Q_S (r(Λ) ∘ (Q_Sᵀ G Q_A)) Q_Aᵀ for gradients `[..., out, columns]`.

        Pure: neither the factor nor the gradient is changed.
        """
        if isinstance(response, Identity):
            return gradient
        return self.basis.rotate_back(response(self.eigenvalues) * self.basis.rotate(gradient))

    @property
    def mean_eigenvalue(self) -> float:
        """The mean corrected eigenvalue, of which a relative damping or α is a multiple."""
        return float(self.eigenvalues.double().mean())
