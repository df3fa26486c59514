"""The closed form of the loss and its gradient, against autograd."""

import pytest
import torch
from torch.nn import functional

from msif_ray.influence import loss


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("scale", (1.0, 40.0))
def test_terms_and_gradient_equal_autograd(dtype, scale, monkeypatch):
    monkeypatch.setitem(loss.LOGIT_ENTRIES, "cpu", 60)  # three rows at once
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(11, 20, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_(True)
    labels = torch.randint(20, (11,), generator=generator)
    exact = logits.detach().double().requires_grad_(True)
    wanted = functional.cross_entropy(exact, labels, reduction="none")
    wanted.sum().backward()
    terms = loss.differentiate(logits, labels)
    assert terms.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(terms.double(), wanted.detach(), rtol=min(tolerance, 1e-6), atol=1e-6 * scale)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_a_label_that_the_model_rules_out_has_its_whole_loss():
    logits = torch.tensor([[0.0, -200.0], [0.0, -80.0], [-300.0, 0.0]], requires_grad=True)
    terms = loss.differentiate(logits, torch.tensor([1, 1, 0]))
    torch.testing.assert_close(terms, torch.tensor([200.0, 80.0, 300.0]))
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]))


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_sampled_labels_have_the_gradient_and_terms_of_given_ones(dtype, monkeypatch):
    monkeypatch.setitem(loss.LOGIT_ENTRIES, "cpu", 300)
    generator = torch.Generator().manual_seed(2)
    drawn, given = (
        (3 * torch.randn(11, 100, dtype=torch.float64, generator=generator.manual_seed(2))).to(dtype).requires_grad_()
        for _ in range(2)
    )
    terms, labels = loss.differentiate_sampled(drawn, torch.rand(11, dtype=torch.float64, generator=generator))
    assert len(set(labels.tolist())) > 3
    assert torch.equal(terms, loss.differentiate(given, labels))
    assert torch.equal(drawn.grad, given.grad)


def sure(dtype):
    """Logits `[margins, 50]` of models surer and surer of label 7, whose probability rounds to 1 in the end."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 50, dtype=torch.float64, generator=generator)
    logits[:, 7] = torch.tensor([0.0, 5.0, 10.0, 17.0, 25.0, 33.0])
    return logits.to(dtype)


def exact(logits):
    """Probabilities, and their difference from label 7, which is the sum of the others and not 1 − p, in float64."""
    probabilities = logits.double().softmax(1)
    gradient = probabilities.clone()
    gradient[:, 7] = 0
    gradient[:, 7] = -gradient.sum(1)
    return probabilities, gradient


def assert_rows_close(found, wanted, tolerance):
    """Row by row, in proportion to what the row is."""
    error = (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(error.max()) < tolerance, error


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-4)])
def test_what_a_sure_model_has_left_is_as_exact_as_all_else(dtype, tolerance):
    logits, labels = sure(dtype), torch.full((6,), 7)
    probabilities, gradient = exact(logits)
    leaf = logits.clone().requires_grad_(True)
    loss.differentiate(leaf, labels)
    assert_rows_close(leaf.grad, gradient, tolerance)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 0.25], dtype=dtype)
    assert_rows_close(loss.slopes(logits, labels, weights), weights.double()[:, None] * gradient, tolerance)
    tangents = torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(dtype)
    along = (gradient * tangents.double()).sum(1)
    assert_rows_close(loss.slopes_along(logits, labels, tangents)[:, None], along[:, None], tolerance)
    moved = tangents.double() - tangents.double()[:, 7:8]  # the Hessian takes nothing from what is the same for all
    curved = probabilities * (moved - (probabilities * moved).sum(1, keepdim=True))
    assert_rows_close(loss.softmax_curvature(logits, tangents), curved, tolerance)
