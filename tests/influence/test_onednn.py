"""Products by oneDNN in the place of PyTorch's own, on whatever processor this is."""

import models
import pytest
import torch

from msif_ray.influence import onednn
from msif_ray.influence.batch import Batch, WindowKey
from msif_ray.influence.capture import Capture
from msif_ray.influence.modules import find_linear_maps


@pytest.fixture
def multiplied(monkeypatch):
    """Lets oneDNN make every float32 product; gives the shapes that it made."""
    shapes, multiply = [], onednn.multiply

    def watched(left, right, bias=None):
        shapes.append((*left.shape, right.shape[1]))
        return multiply(left, right, bias)

    monkeypatch.setattr(onednn, "available", lambda: True)
    monkeypatch.setattr(onednn, "LEAST", 1)
    monkeypatch.setattr(onednn, "ROWS", 1)
    monkeypatch.setattr(onednn, "multiply", watched)
    return shapes


def layouts(matrix):
    """The same matrix in every layout that a product may meet."""
    wide = torch.zeros(matrix.shape[0], matrix.shape[1] + 5)
    wide[:, 2:-3] = matrix
    tall = torch.zeros(matrix.shape[1] + 4, matrix.shape[0])
    tall[1:-3] = matrix.T
    spread = torch.zeros(2 * matrix.shape[0], matrix.shape[1])
    spread[::2] = matrix
    return [matrix, matrix.T.contiguous().T, wide[:, 2:-3], tall[1:-3].T, spread[::2], wide.T.contiguous().T[:, 2:-3]]


@pytest.mark.parametrize("bias", (None, "dense", "strided"))
@pytest.mark.parametrize("rows", (1, onednn.COPIED_ROWS))
def test_product_of_any_layout(monkeypatch, bias, rows):
    monkeypatch.setattr(onednn, "COPIED_ROWS", rows)  # operands of an odd width copied first, or not
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(33, 17, generator=generator), torch.randn(17, 9, generator=generator)
    added = torch.randn(9, 2, generator=generator)[:, 0] if bias else None
    added = added.contiguous() if bias == "dense" else added
    wanted = left.double() @ right.double() + (0 if added is None else added.double())
    for one in layouts(left):
        for other in layouts(right):
            assert torch.allclose(onednn.multiply(one, other, added).double(), wanted, rtol=0, atol=1e-5)


def test_no_operand_has_gaps():
    """For matrices with gaps oneDNN falls back on a product of hundredfold time."""
    for matrix in layouts(torch.randn(8, 6)):
        dense = onednn._dense(matrix)
        assert torch.equal(dense, matrix)
        assert dense.is_contiguous() or dense.t().is_contiguous()


def test_what_suits(monkeypatch):
    monkeypatch.setattr(onednn, "available", lambda: True)
    large = torch.zeros(onednn.ROWS, 1024)
    fits = torch.zeros(1024, onednn.LEAST // (1024 * onednn.ROWS))
    assert onednn.suits(large, fits)
    assert not onednn.suits(large.double(), fits.double())
    assert not onednn.suits(large.bfloat16(), fits.bfloat16())
    assert not onednn.suits(large[:-1], torch.zeros(1024, 4096))
    assert not onednn.suits(large, fits[:, :-1])
    for pay in (True, False):
        monkeypatch.setattr(onednn, "copies_pay", lambda pay=pay: pay)
        assert onednn.suits(large, fits, copied=True) is pay
    monkeypatch.setattr(onednn, "available", lambda: False)
    for exists in (True, False):
        monkeypatch.setattr(onednn, "exists", lambda exists=exists: exists)
        assert not onednn.suits(large, fits)
        assert onednn.suits_long(large, fits) is exists
        assert not onednn.suits_long(large.double(), fits.double())


@pytest.mark.parametrize("cpu, used, for_long", [
    ({"cpu_name": "AMD EPYC", "avx512_f": True}, True, True),
    ({"cpu_name": "AMD EPYC", "avx512_f": False}, False, False),
    ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False, True),
    ({}, False, False),
])  # fmt: skip
def test_processors(monkeypatch, cpu, used, for_long):
    monkeypatch.setattr(onednn, "exists", onednn.exists.__wrapped__)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert onednn.available.__wrapped__() is used and onednn.exists() is for_long
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert onednn.available.__wrapped__() is False and onednn.exists() is False


@pytest.mark.parametrize("cpu, pay", [({"avx_vnni": True}, True), ({"avx_vnni": False}, False), ({}, False)])
def test_processors_on_which_results_are_worth_a_copy(monkeypatch, cpu, pay):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert onednn.copies_pay.__wrapped__() is pay


def batch(model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, model.config.vocab_size, (3, 12), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    targets = mask.clone()
    targets[:, 0] = False
    return Batch(ids, mask, targets, tuple(WindowKey(str(row), 0) for row in range(3)))


@pytest.mark.parametrize("kind", ("gpt_neox", "gpt2", "opt"))
def test_a_pass_is_the_same(multiplied, kind):
    model = models.build_model(kind, 0)
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        maps = find_linear_maps(model)
        multiplied.clear()
        with Capture(model, maps) as capture:
            captured = capture.run(batch(model))
            made = list(multiplied)
            curved = capture.curve(batch(model), {name: captured_ones(each, dtype) for name, each in maps.items()})
        assert bool(made) == (dtype == torch.float32)
        if made:  # forward and backward, of every map but that at which the backward pass ends
            assert len(made) >= 2 * len(maps) - 2
        found[dtype] = [each.double() for name in maps for each in (*captured.vectors(name), *curved.vectors(name))]
        found[dtype].append(captured.losses.double())
    for narrow, wide in zip(found[torch.float32], found[torch.float64], strict=True):
        assert float((narrow - wide).abs().max()) <= 2e-5 * float(wide.abs().max())


def captured_ones(described, dtype):
    return torch.full(described.shape, 0.01, dtype=dtype)


def test_nothing_is_replaced_outside(multiplied):
    torch.ones(4, 4) @ torch.ones(4, 4)
    assert not multiplied
    with onednn.model_products(torch.device("cpu")):
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert multiplied == [(4, 4, 4)]
    torch.ones(4, 4) @ torch.ones(4, 4)
    assert len(multiplied) == 1
