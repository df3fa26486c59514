"""Products that accumulate in float32, against float64: on the CPU, and on a GPU where there is one."""

import pytest
import torch

from msif_ray.influence import onednn, products

DEVICES = ["cpu", "onednn", *(["cuda"] if torch.cuda.is_available() else [])]
# Largest error over largest entry: a float32 matrix is two bfloat16 terms to 4e-6 of each entry.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-5}


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    """`onednn`: the CPU, as if all float32 products were faster there."""
    for whether in ("exists", "available"):
        monkeypatch.setattr(onednn, whether, lambda: request.param == "onednn")
    monkeypatch.setattr(onednn, "copies_pay", lambda: True)
    monkeypatch.setattr(onednn, "LEAST", 1)
    monkeypatch.setattr(onednn, "ROWS", 1)
    device = "cuda" if request.param == "cuda" else "cpu"
    monkeypatch.setitem(products.BLOCK, device, 5)
    monkeypatch.setitem(products.POSITIONS, device, 7)
    return device


def random(*shape, dtype, device, seed=0):
    made = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.to(device, dtype)


def error(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("features", (1, 5, 13, 20))
@pytest.mark.parametrize("bias", (False, True))
def test_gram(device, dtype, features, bias):
    vectors = random(40, features, dtype=dtype, device=device)
    positions = torch.arange(1, 40, 2, device=device)
    total = torch.zeros(features + bias, features + bias, dtype=products.wide_type(dtype), device=device)
    chosen = vectors[positions].double()
    chosen = torch.nn.functional.pad(chosen, (0, int(bias)), value=1.0)
    for times in (1, 2):  # adds to what is there, also after it was mirrored
        products.add_gram(total, vectors, positions, bias)
        products.mirror(total)
        assert error(total, times * chosen.T @ chosen) < TOLERANCE[dtype]
        assert torch.equal(total, total.T) or error(total, total.T.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_times_a_wide_matrix(device, dtype):
    vectors = random(3, 11, 64, dtype=dtype, device=device)
    matrix = random(64, 9, dtype=products.wide_type(dtype), device=device, seed=1)
    bias = random(9, dtype=matrix.dtype, device=device, seed=2)
    wanted = vectors.double() @ matrix.double()
    for added, expected in ((None, wanted), (bias, wanted + bias.double())):
        found = products.times(vectors, matrix, added)
        assert found.dtype == matrix.dtype and found.shape == (3, 11, 9)
        assert error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("shape", ((), (1,), (3, 2)))
def test_sandwich(device, dtype, shape):
    left, middle, right = (
        random(*size, dtype=dtype, device=device, seed=seed)
        for seed, size in enumerate(((9, 12), (*shape, 12, 17), (17, 5)))
    )
    found = products.sandwich(left, middle, right)
    assert found.shape == (*shape, 9, 5) and found.dtype == dtype
    assert error(found, left.double() @ middle.double() @ right.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outer(device, dtype):
    pair = [random(4, 33, size, dtype=dtype, device=device, seed=size) for size in (6, 8)]
    out = torch.full((4, 6, 8), torch.nan, dtype=products.wide_type(dtype), device=device)
    for narrow in (None, dtype):  # the model's own vectors, and wide ones computed from such
        left, right = pair if narrow is not None else (products.operand(each) for each in pair)
        if narrow is not None:
            left, right = (random(*each.shape, dtype=out.dtype, device=device, seed=9) for each in pair)
        found = products.outer(left, right, out, narrow)
        assert found.dtype == out.dtype
        assert error(found, left.double().transpose(1, 2) @ right.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("rows", (1, products.ROWS, 2 * products.ROWS + 1, products.MANY + 1))
@pytest.mark.parametrize("others", (5, products.MANY))
@pytest.mark.parametrize("entries", (products.PIECES * 3, products.PIECES * 3 + 1))
def test_inner(device, dtype, rows, others, entries):
    left, right = (random(n, 2, entries, dtype=dtype, device=device, seed=n) for n in (rows, others))
    wanted = left.double().flatten(1) @ right.double().flatten(1).T
    assert error(products.inner(left, right), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_pairwise(device, dtype):
    vectors = random(3, 6, 40, dtype=dtype, device=device)
    found = products.pairwise(vectors)
    assert found.dtype == products.wide_type(dtype)
    assert error(found, vectors.double() @ vectors.double().transpose(1, 2)) < TOLERANCE[dtype]
