"""Matrix products of the model's vectors whose results are float32 (float64 for a float64 model).

On a GPU the vectors of a bfloat16 model are multiplied as they are: a product of two bfloat16 numbers is exact in
float32, and tensor cores add in float32. So these products cost an eighth of float32 ones and round no more. A float32
matrix that they meet is the sum of two bfloat16 ones to 2⁻¹⁷ of each entry, which is what a float32 sum of some
hundred terms loses anyway (Markidis et al. 2018, arXiv 1803.04014): two or three such products instead of a slow one.
"""

import torch
from torch import Tensor
from torch.nn import functional

from msif_ray.influence import onednn

# Columns of a block of A and S. Only the blocks on and below the diagonal are multiplied: 9/16 of eight by eight.
BLOCK = {"cpu": 128, "cuda": 2048}

# Positions per covariance product, P. Of N positions rounding goes with √P within products and √(N/P) in their sum, and
# rounding here turns eigenvectors: a third of a float32 score's error at small damping. With P a quarter of this it is
# a third less for 4,064 positions, 1.7 times as much for 32,512 and twice for 130,048, and products take a seventh
# longer. A tensor core's are rounded less.
POSITIONS = {"cpu": 1024, "cuda": 8192}

# `inner` takes so many rows at a time, in so many pieces: 8 rows and 8 others of 263,168 entries take 0.5 ms, and not
# 1.7 ms as one product; with 64 others 3.6 ms, not 6.1. In pieces sums are shorter, too, and round less.
ROWS = 8
PIECES = 64

# With so many others, and from twice ROWS on, one product is as fast: 32 rows and 64 others take 10 ms, in pieces 14.
MANY = 32


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the type that sums are kept in."""
    return tensor.to(wide_type(tensor.dtype))


def wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def operand(vectors: Tensor) -> Tensor:
    """The vectors in a type whose products come out in float32: their own on a GPU, else a wide copy."""
    return vectors if vectors.is_cuda else wide(vectors)


def with_ones(vectors: Tensor) -> Tensor:
    """Vectors `[..., n]` with a 1 behind each, `[..., n + 1]`."""
    made = vectors.new_empty(*vectors.shape[:-1], vectors.shape[-1] + 1)
    made[..., :-1] = vectors
    made[..., -1] = 1.0
    return made


def add_gram(total: Tensor, vectors: Tensor, positions: Tensor, bias: bool) -> None:
    """Adds Σ v vᵀ over some positions to the lower triangle of `total` `[n, n]`, block by block.

    `vectors` `[positions, features]`, of which the rows `positions` count; with `bias` each gets a 1 as its
    last entry. `mirror` completes the upper triangle.
    """
    features, block = vectors.shape[1], BLOCK[total.device.type]
    for some in positions.split(POSITIONS[total.device.type]):
        chosen = operand(vectors.index_select(0, some)).T
        if onednn.suits(chosen, chosen.T):
            chosen = chosen.contiguous()  # or each block would be copied
        for start in range(0, features, block):
            stop = min(start + block, features)
            _add_product(total[start:features, start:stop], chosen[start:], chosen[start:stop])
        if bias:
            summed = chosen.sum(1, dtype=total.dtype)
            total[-1, :-1] += summed
            total[:-1, -1] += summed
            total[-1, -1] += len(some)


def covariance_cost(features: int, device: str = "cpu") -> int:
    """Multiplications per position of `add_gram`."""
    block = BLOCK[device]
    return sum((features - start) * min(block, features - start) for start in range(0, features, block))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left rightᵀ, `[left rows, right rows]`."""
    if onednn.suits(left, right.T):
        total += onednn.multiply(left, right.T)
    elif left.dtype == total.dtype:
        total.addmm_(left, right.T)
    else:
        total += torch.mm(left, right.T, out_dtype=total.dtype)


def mirror(total: Tensor) -> None:
    """Copies the lower triangle of a symmetric matrix of `add_gram` to the upper one, in place."""
    block = BLOCK[total.device.type]
    for start in range(0, len(total), block):
        stop = start + block
        total[start:stop, stop:] = total[stop:, start:stop].T


def times(vectors: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """vectors `[..., n]` times a wide matrix `[n, m]`, plus a bias `[m]`, in the matrix's type."""
    flat = vectors.flatten(0, -2)
    if vectors.dtype == matrix.dtype or not vectors.is_cuda:
        return _affine(flat.to(matrix.dtype), matrix, bias).unflatten(0, vectors.shape[:-1])
    terms = torch.cat(_terms(_aligned(matrix), vectors.dtype))
    product = torch.mm(torch.cat([flat, flat], 1), terms, out_dtype=matrix.dtype)[:, : matrix.shape[1]]
    return (product if bias is None else product.add_(bias)).unflatten(0, vectors.shape[:-1])


def _affine(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """left `[n, k]` right `[k, m]` + bias `[m]`, of one type."""
    if onednn.suits(left, right):
        return onednn.multiply(left, right, bias)
    return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)


def mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left `[n, k]` right `[k, m]` of one type, written to `out` if there is one."""
    if not onednn.suits(left, right, copied=out is not None):
        return torch.mm(left, right, out=out)
    product = onednn.multiply(left, right)
    return product if out is None else out.copy_(product)


def sandwich(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """left `[k, m]` times matrices `[..., m, n]` times right `[n, l]`, `[..., k, l]`."""
    if not onednn.suits(left, middle):
        return left @ middle @ right
    flat = middle.reshape(-1, *middle.shape[-2:])
    met = mm(flat.flatten(0, 1), right).unflatten(0, flat.shape[:2])
    # Turned, so that all of them meet the left side in one product, too: two thirds of the time of one by one.
    turned = met.transpose(1, 2).flatten(0, 1)
    del met
    made = mm(turned, left.T).unflatten(0, (len(flat), right.shape[1])).transpose(1, 2)
    return made.reshape(*middle.shape[:-2], *made.shape[1:])


def outer(left: Tensor, right: Tensor, out: Tensor, narrow: torch.dtype | None = None) -> Tensor:
    """Σ_t l_t r_tᵀ of each row: left `[rows, t, m]`, right `[rows, t, n]` of one type; `[rows, m, n]` in `out`'s type.

    Written to `out` where that spares memory. `narrow` is the type that wide vectors were computed from.
    """
    shape = out.shape
    if left.is_cuda and narrow is not None and narrow != left.dtype:
        (high, low), (also_high, also_low) = _terms(_aligned(left), narrow), _terms(_aligned(right), narrow)
        left, right = torch.cat([high, high, low], 1), torch.cat([also_high, also_low, also_high], 1)
    if onednn.suits(left.transpose(1, 2), right, copied=True):
        for row, (one, other) in enumerate(zip(left, right, strict=True)):
            mm(one.T, other, out[row])
        return out
    if left.dtype == out.dtype:
        return torch.bmm(left.transpose(1, 2), right, out=out)
    product = torch.bmm(_aligned(left).transpose(1, 2), _aligned(right), out_dtype=out.dtype)
    return product[:, : shape[1], : shape[2]]


def _aligned(matrices: Tensor) -> Tensor:
    """With zeros up to a multiple of 8 columns; others, as a bias makes them, take tensor cores five times as long."""
    extra = -matrices.shape[-1] % 8
    return functional.pad(matrices, (0, extra)) if extra else matrices


def pairwise(vectors: Tensor) -> Tensor:
    """Inner products of a row's vectors `[rows, t, n]` with each other, `[rows, t, t]`."""
    vectors = operand(vectors)
    if vectors.dtype == wide_type(vectors.dtype):
        return vectors @ vectors.transpose(1, 2)
    return torch.bmm(vectors, vectors.transpose(1, 2), out_dtype=wide_type(vectors.dtype))


def _terms(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two matrices of a narrower type whose sum is the matrix, but for 2⁻¹⁷ of each entry in bfloat16."""
    high = matrix.to(dtype)
    return high, (matrix - high).to(dtype)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Every row of `left` `[rows, ...]` times every row of `right` `[others, ...]`, `[rows, others]`.

    By oneDNN with the others first, which takes 1.0 ms of 16 rows and 8 others of 263,168 entries, the rows first 1.3.
    Without it a CPU takes a few rows at a time, cut into pieces side by side: one product so long and thin occupies one
    core.
    """
    left, right = left.flatten(1), right.flatten(1)
    if onednn.suits_long(left, right.T):
        return onednn.multiply(right, left.T).T
    if left.is_cuda or left.shape[1] % PIECES:
        return left @ right.T
    if len(left) >= 2 * ROWS and len(right) >= MANY:
        return (right @ left.T).T  # a fifth faster than the rows first
    cut = right.unflatten(1, (PIECES, -1)).permute(1, 2, 0)
    some = (rows.unflatten(1, (PIECES, -1)).transpose(0, 1) for rows in left.split(ROWS))
    return torch.cat([torch.bmm(rows, cut).sum(0) for rows in some])
