"""float32 products by oneDNN where PyTorch's own take half the processor.

PyTorch multiplies float32 matrices with MKL, which has AVX-512 products for Intel's processors alone and takes AVX2's
on AMD's: 105 GFLOP/s of a thread of a Zen 5, where oneDNN, which PyTorch has for other things, comes to 240. It has no
public function for that, so this is the one that `torch.compile` uses for linear maps; without it, on other processors
and for other types products stay PyTorch's. Both round as float32 sums do, in another order.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Multiplications, and rows, from which oneDNN is as fast as MKL although it costs 10 µs to call.
LEAST = 2**20
ROWS = 8

# Rows from which a right operand whose own rows are of an odd length is copied first, up to so many entries (128 MB).
# With what a bias makes of 1,024 columns, 1,025, 4,096 rows else take 54 to 64 ms, not 43, of which the copy is 0.7.
COPIED_ROWS = 1024
COPIED_ENTRIES = 2**25
ALIGNED = 16  # entries, of 64 bytes in all

# Bytes that a process holds for the products it has done, when batches of many lengths have been seen, and for
# operands copied.
HELD = 200 * 2**20

_aten = torch.ops.aten


@cache
def exists() -> bool:
    """Whether PyTorch has oneDNN's products, and this processor the AVX-512 that they are good for."""
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has and bool(_processor().get("avx512_f"))


@cache
def available() -> bool:
    """Whether this processor is one on which oneDNN's float32 products are faster, whatever their shape."""
    return exists() and str(_processor().get("cpu_name", "")).startswith("AMD")


@cache
def copies_pay() -> bool:
    """Whether products are better done here although they are copied to where they belong.

    On a Zen 5, which multiplies 512 bits at a time as its AVX-VNNI tells. A Zen 4 takes two steps for these: the
    gradients of windows come to 105 GFLOP/s with two threads, and to 140 by MKL, which writes to their places.
    """
    return bool(_processor().get("avx_vnni"))


def _processor() -> dict[str, Any]:
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch does not tell
    return found


def suits(left: Tensor, right: Tensor, copied: bool = False) -> bool:
    """Whether left `[..., n, k]` times right `[..., k, m]` is better done here, `copied` from where it comes out."""
    if copied and not copies_pay():
        return False
    return available() and _enough(left, right)


def suits_long(left: Tensor, right: Tensor) -> bool:
    """Whether left `[n, k]` times right `[k, m]` is better done here where k is long and n and m are not: MKL's product
    takes up to twice as long for these, whatever the processor."""
    return exists() and _enough(left, right)


def _enough(left: Tensor, right: Tensor) -> bool:
    if left.dtype != torch.float32 or right.dtype != torch.float32 or left.is_cuda:
        return False
    return left.shape[-2] >= ROWS and left.shape[-2] * left.shape[-1] * right.shape[-1] >= LEAST


def multiply(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left `[n, k]` right `[k, m]` + bias `[m]`."""
    weight = _dense(right).t()
    if len(left) >= COPIED_ROWS and len(weight) % ALIGNED and weight.numel() <= COPIED_ENTRIES:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()  # of one with gaps oneDNN reads what is in them
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(_dense(left), weight, bias, "none", [], "")
    return product


def _dense(matrix: Tensor) -> Tensor:
    """Without gaps between rows, or between columns: for others oneDNN has a product of hundredfold time alone."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def model_products(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a model's products, forward and backward, are oneDNN's where these suit."""
    return _ModelProducts() if device.type == "cpu" and available() else nullcontext()


class _ModelProducts(TorchDispatchMode):
    """Below autograd, so that a backward pass run in the context takes them, too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not kwargs and func in _INSTEAD:
            replaced = _INSTEAD[func](*args)
            if replaced is not None:
                return replaced
        return func(*args, **(kwargs or {}))


def _mm(left: Tensor, right: Tensor) -> Tensor | None:
    return multiply(left, right) if suits(left, right) else None


def _addmm(bias: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    return multiply(left, right, bias) if bias.dim() == 1 and suits(left, right) else None


_INSTEAD: dict[Any, Callable[..., Tensor | None]] = {_aten.mm.default: _mm, _aten.addmm.default: _addmm}
