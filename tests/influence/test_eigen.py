"""Eigendecompositions, by whichever library."""

import sys

import numpy
import pytest
import torch
from threadpoolctl import threadpool_info

from msif_ray.influence import eigen, onednn
from msif_ray.influence.ekfac import eigenbasis


@pytest.fixture(params=("pytorch", "numpy"))
def library(request, monkeypatch):
    """Each library, on whatever processor this is; sees to it that it is the one that is used."""
    used = []
    for module, name in ((torch.linalg, "pytorch"), (numpy.linalg, "numpy")):
        whole = module.eigh
        monkeypatch.setattr(module, "eigh", lambda matrix, whole=whole, name=name: used.append(name) or whole(matrix))
    monkeypatch.setattr(onednn, "available", lambda: request.param == "numpy")
    yield request.param
    assert set(used) == {request.param}


def covariance(size, rank, dtype=torch.float64):
    vectors = torch.randn(rank, size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    return vectors.T @ vectors / rank


@pytest.mark.parametrize("size, rank", [(1, 1), (2, 9), (65, 200), (129, 40)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_an_eigenbasis_is_orthonormal_and_makes_the_matrix(library, size, rank, dtype):
    matrix = covariance(size, rank, dtype)
    before = matrix.clone()
    for given in (matrix, matrix.T, torch.stack([matrix, matrix], 2)[:, :, 0]):
        values, vectors = eigenbasis(given)
        assert values.dtype == vectors.dtype == torch.float64
        assert (values.shape, vectors.shape) == ((size,), (size, size))
        assert torch.equal(values, values.sort().values)
        scale = float(before.double().norm())
        assert torch.allclose(vectors @ (values[:, None] * vectors.T), before.double(), rtol=0, atol=1e-6 * scale)
        assert torch.allclose(vectors.T @ vectors, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
        exact = before.double() @ vectors - values * vectors
        assert float(exact.norm()) < (1e-6 if dtype == torch.float32 else 1e-13) * scale * size
    assert torch.equal(matrix, before)


def test_both_sides_of_what_rounding_made_unequal_count(library):
    matrix = torch.tensor([[1.0, 0.5], [0.3, 2.0]], dtype=torch.float64)
    values, vectors = eigenbasis(matrix)
    assert torch.allclose(vectors @ values.diag() @ vectors.T, (matrix + matrix.T) / 2)


def test_values_that_repeat_and_a_matrix_of_zeros(library):
    for matrix in (torch.zeros(40, 40), torch.eye(40), torch.diag(torch.tensor([3.0] * 20 + [0.0] * 20))):
        values, vectors = eigenbasis(matrix)
        assert torch.allclose(vectors @ values.diag() @ vectors.T, matrix.double(), atol=1e-14)
        assert torch.allclose(vectors.T @ vectors, torch.eye(40, dtype=torch.float64), atol=1e-13)


@pytest.mark.parametrize("threads", (1, 2))
def test_numpy_takes_as_many_threads_as_pytorch_does(monkeypatch, threads):
    monkeypatch.setattr(onednn, "available", lambda: True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        eigenbasis(covariance(65, 65))
        (numpys,) = (each for each in threadpool_info() if "numpy" in each["filepath"])
        assert numpys["num_threads"] == threads
    finally:
        torch.set_num_threads(before)


def test_without_the_library_that_limits_numpy_it_is_pytorchs(monkeypatch):
    monkeypatch.setattr(onednn, "available", lambda: True)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setattr(eigen, "_numpys_openblas", eigen._numpys_openblas.__wrapped__)
    monkeypatch.delattr(numpy.linalg, "eigh")
    values, _ = eigenbasis(covariance(65, 65))
    assert len(values) == 65
