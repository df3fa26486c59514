"""EK-FAC: covariances → eigenbasis → corrected eigenvalues, and a response applied in that basis.

Kronecker-factored Gauss-Newton with corrected eigenvalues: George et al. 2018; for language
models Grosse et al. 2023, §2.2 and appendix B. All sums are kept raw, so partial sums add.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msif_ray.influence.capture import Captured
from msif_ray.influence.eigen import symmetric_eigen
from msif_ray.influence.products import add_gram, mirror, operand, outer, sandwich, times, wide_type, with_ones
from msif_ray.influence.response import Identity, Response
from msif_ray.influence.threads import side_by_side

# Entries of per-window gradients held at once: 17 MB of float32, which stay in a CPU's cache (1.9 times the
# speed of 256 MB on two EPYC cores), and 256 MB on a GPU, whose matrix products want many rows. The CPU's are a
# sixteenth over a power of two, or a bias's column would make 15 rows of 16, which two threads share badly.
GRADIENT_ENTRIES = {"cpu": 17 * 2**18, "cuda": 2**26}


@dataclass
class CovarianceSums:
    """Σ a aᵀ and Σ g gᵀ over the positions that predict a target, for every tracked map.

    Accumulation is in float32 (float64 for a float64 model). `counts` holds the positions summed, under the names
    of `sums`.
    """

    counts: dict[str, int] = field(default_factory=dict)
    _lower: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sums(self) -> dict[str, Tensor]:
        """`A/<map>` `[columns, columns]` and `S/<map>` `[out, out]`."""
        for total in self._lower.values():
            mirror(total)
        return self._lower

    def add(self, captured: Captured) -> None:
        sums = [each for name in captured.maps for each in self._sums_of(name, captured)]
        largest_first = sorted(sums, key=lambda each: -len(each.total))
        side_by_side(_Gram.add, largest_first, captured.losses.device)

    def negate(self) -> None:
        """Changes the sign of all sums and counts: batches that are added until the next call are taken off."""
        for total in self._lower.values():
            total.neg_()
        self.counts = {key: -count for key, count in self.counts.items()}

    def _sums_of(self, name: str, captured: Captured) -> Iterator["_Gram"]:
        """What a batch adds to one map's two sums, which are begun where they are not there yet."""
        positions = captured.positions(name)
        inputs, gradients = captured.vectors(name)
        for side, vectors, bias in (("A", inputs, captured.maps[name].bias), ("S", gradients, False)):
            key, size = f"{side}/{name}", vectors.shape[-1] + int(bias)
            if key not in self._lower:
                self._lower[key] = vectors.new_zeros(size, size, dtype=wide_type(vectors.dtype))
            self.counts[key] = self.counts.get(key, 0) + len(positions)
            yield _Gram(self._lower[key], vectors.flatten(0, 1), positions, bias)


@dataclass(frozen=True)
class _Gram:
    """Vectors `[positions, features]` whose Σ v vᵀ over some of the positions goes into `total`."""

    total: Tensor
    vectors: Tensor
    positions: Tensor
    bias: bool

    def add(self) -> None:
        add_gram(self.total, self.vectors, self.positions, self.bias)


def eigenbasis(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, `[n]`) and eigenvectors (columns, `[n, n]`) of a symmetric matrix, float64."""
    matrix = covariance.double()
    return symmetric_eigen((matrix + matrix.T) / 2)


@dataclass(frozen=True)
class Basis:
    """The eigenbasis of one map: `activations` Q_A `[columns, columns]`, `gradients` Q_S `[out, out]`."""

    activations: Tensor
    gradients: Tensor

    def rotate(self, gradient: Tensor) -> Tensor:
        """Q_Sᵀ G Q_A of gradients `[..., out, columns]`."""
        return sandwich(self.gradients.T, gradient, self.activations)

    def rotate_back(self, gradient: Tensor) -> Tensor:
        """Q_S G Q_Aᵀ of rotated gradients `[..., out, columns]`."""
        return sandwich(self.gradients, gradient, self.activations.T)


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
            inputs, gradients = captured.vectors(name)
            if f"E/{name}" not in self.sums:
                # Its transpose is contiguous, as `add_squares` would have it.
                out, columns = described.shape
                self.sums[f"E/{name}"] = inputs.new_zeros(columns, out, dtype=wide_type(inputs.dtype)).mT
            total, basis = self.sums[f"E/{name}"], self.bases[name]
            if rotates_vectors(inputs.shape[1], *described.shape):
                add_squares(total, *rotated_vectors(inputs, gradients, basis, described.bias), inputs.dtype)
            else:
                for rotated in map(basis.rotate, window_gradients(inputs, gradients, described.bias)):
                    total.add_(rotated.square_().sum(0))

    def negate(self) -> None:
        """Changes the sign of all sums: batches that are added until the next call are taken off."""
        for total in self.sums.values():
            total.neg_()


def rotated_vectors(inputs: Tensor, gradients: Tensor, basis: Basis, bias: bool) -> tuple[Tensor, Tensor]:
    """a Q_A `[rows, positions, columns]` and g Q_S `[rows, positions, out]`; with `bias` the constant 1 behind the
    inputs meets the basis's last row."""
    if not bias:
        return times(inputs, basis.activations), times(gradients, basis.gradients)
    activations = times(inputs, basis.activations[:-1], basis.activations[-1])
    return activations, times(gradients, basis.gradients)


def rotated_gradients(inputs: Tensor, gradients: Tensor, basis: Basis, bias: bool) -> Iterator[Tensor]:
    """Q_Sᵀ G Q_A of each row, `[some rows, out, columns]` at a time, from rotated vectors or by rotating G: whichever
    takes fewer multiplications. Vectors, memory and what is yielded as of `window_gradients`."""
    if rotates_vectors(inputs.shape[1], gradients.shape[2], inputs.shape[2] + int(bias)):
        activations, gradients = rotated_vectors(inputs, gradients, basis, bias)
        return _outer_products(gradients, activations, inputs.dtype)
    return map(basis.rotate, window_gradients(inputs, gradients, bias))


def add_squares(total: Tensor, activations: Tensor, gradients: Tensor, narrow: torch.dtype) -> None:
    """Adds Σ_rows (Σ_t g_t a_tᵀ)² to `total` `[out, columns]`; activations `[rows, t, columns]`, gradients
    `[rows, t, out]`, both computed from vectors of the type `narrow`. In memory `total` is `[columns, out]`: a product
    whose rows are of `columns`, which a bias makes odd, takes a sixth longer.

    A CPU does a few rows at once, whose products stay in the cache until they are squared; a GPU wants many.
    """
    most = None if total.is_cuda else _rows_in_cache()
    for products in _outer_products(activations, gradients, narrow, most=most):
        if total.is_cuda:
            total.mT.add_(torch.linalg.vector_norm(products, dim=0).square_())
            continue
        for product in products:
            total.mT.addcmul_(product, product)


def _rows_in_cache() -> int:
    """Two for each thread, which does whole products then and not a share of each: a fifth faster. One thread alone
    has its second-level cache for a row's."""
    threads = torch.get_num_threads()
    return 2 * threads if threads > 1 else 1


def rotates_vectors(tokens: int, out: int, columns: int) -> bool:
    """Whether a window's vectors are rotated, or else its gradient: whichever takes fewer multiplications."""
    return vector_rotation_cost(tokens, out, columns) < gradient_rotation_cost(out, columns)


def vector_rotation_cost(tokens: int, out: int, columns: int) -> int:
    """Multiplications per window of a Q_A and g Q_S."""
    return tokens * (out**2 + columns**2)


def gradient_rotation_cost(out: int, columns: int) -> int:
    """Multiplications per window, or per query, of Q_Sᵀ G Q_A."""
    return out * columns * (out + columns)


def window_gradients(
    inputs: Tensor, gradients: Tensor, bias: bool = False, multiple: int = 1, transposed: bool = False
) -> Iterator[Tensor]:
    """G = Σ_t g_t a_tᵀ of each row, `[some rows, out, columns]` at a time so that memory is bounded.

    `inputs` `[rows, positions, in]`, with `bias` without the constant 1 that comes last in a; `gradients`
    `[rows, positions, out]`. At most `multiple` GRADIENT_ENTRIES are held, but for a single larger row. What is
    yielded is overwritten by the next: fresh memory for each would cost more than the product. `transposed`: in memory
    it is `[some rows, columns, out]`, which takes a seventh less time where a bias makes the columns odd.
    """
    at_once = _rows_at_once(len(inputs), inputs.shape[-1] + int(bias), gradients.shape[-1], inputs.device, multiple)
    for a, g in zip(inputs.split(at_once), gradients.split(at_once), strict=True):
        activations = with_ones(operand(a)) if bias else operand(a)
        if transposed:
            yield from (each.mT for each in _outer_products(activations, operand(g), multiple=multiple))
        else:
            yield from _outer_products(operand(g), activations, multiple=multiple)


def _outer_products(
    left: Tensor, right: Tensor, narrow: torch.dtype | None = None, multiple: int = 1, most: int | None = None
) -> Iterator[Tensor]:
    """Σ_t l_t r_tᵀ of each row, `[some rows, m, n]` at a time, `most` if given: left `[rows, t, m]`, right
    `[rows, t, n]`, computed from vectors of the type `narrow`."""
    m, n = left.shape[-1], right.shape[-1]
    at_once = _rows_at_once(len(left), m, n, left.device, multiple, most)
    space = left.new_empty(at_once, m, n, dtype=wide_type(left.dtype))
    for one, other in zip(left.split(at_once), right.split(at_once), strict=True):
        yield outer(one, other, space[: len(one)], narrow)


def _rows_at_once(rows: int, m: int, n: int, device: torch.device, multiple: int, most: int | None = None) -> int:
    """As even parts of the rows as stay within the entries, and within `most`: threads share each, and wait for each
    other at its end."""
    fitting = max(1, multiple * GRADIENT_ENTRIES[device.type] // (m * n))
    fitting = fitting if most is None else min(fitting, most)
    return -(-rows // -(-rows // fitting)) if rows else 1


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
