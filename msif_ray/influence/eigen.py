"""Eigendecompositions by NumPy where PyTorch's own are slow.

On a CPU PyTorch takes MKL's, and MKL holds back on AMD's processors. NumPy's are OpenBLAS's: of 1,024 columns 223 and
not 276 ms, two side by side, of 4,097 12.5 and not 20.2 s of one thread, on a Zen 4. On Intel's both take as long.
"""

from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor

from msif_ray.influence import onednn


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, `[n]`) and eigenvectors (columns, `[n, n]`) of a symmetric matrix, in its type."""
    openblas = _numpys_openblas() if matrix.device.type == "cpu" and onednn.available() else None
    if openblas is None:
        return torch.linalg.eigh(matrix)
    # Left so, since other threads may be in the middle of one; NumPy's products are used for nothing large here.
    openblas.limit(limits=torch.get_num_threads())
    values, vectors = numpy.linalg.eigh(matrix.numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)


@cache
def _numpys_openblas() -> Any:
    """What sets the number of NumPy's threads; None where its library is another, or nothing here can set it."""
    try:
        from threadpoolctl import ThreadpoolController
    except ModuleNotFoundError:  # a machine with PyTorch and transformers alone
        return None
    every = ThreadpoolController().select(internal_api="openblas")
    paths = [each["filepath"] for each in every.info() if "numpy" in each["filepath"]]
    return every.select(filepath=paths) if paths else None
