"""Responses against their formulas in exact arithmetic, and their limits."""

from fractions import Fraction
from math import exp, expm1, inf

import pytest
import torch

from msif_ray.influence.ekfac import Basis, Factor
from msif_ray.influence.queries import carry_back
from msif_ray.influence.response import DampedInverse, Identity, Proximal, UnrolledFilter, UnrolledInverse

VALUES = [0.0, 1e-300, 1e-12, 3e-5, 0.5, 7.0, 4e6]
FORMULAS = {
    DampedInverse(0.25): lambda v: float(1 / (Fraction(v) + Fraction(1, 4))),
    Proximal(0.25): lambda v: float(Fraction(1, 4) / (Fraction(v) + Fraction(1, 4))),
    UnrolledFilter(0.3): lambda v: exp(-0.3 * v),
    UnrolledInverse(0.3): lambda v: -expm1(-0.3 * v) / v if v else 0.3,
    Identity(): lambda v: 1.0,
    Proximal(inf): lambda v: 1.0,
}


@pytest.mark.parametrize("response", FORMULAS, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), ((torch.float64, 1e-14), (torch.float32, 1e-6)))
def test_formulas(response, dtype, rtol):
    values = torch.tensor(VALUES, dtype=dtype)
    before = values.clone()
    expected = torch.tensor([FORMULAS[response](float(value)) for value in values], dtype=dtype)
    torch.testing.assert_close(response(values), expected, rtol=rtol, atol=1e-40)
    assert torch.equal(values, before)


def test_a_stage_without_a_factor_must_be_the_identity():
    gradient = torch.randn(2, 3, 4)
    assert torch.equal(carry_back(gradient, [(None, Identity())]), gradient)
    with pytest.raises(ValueError, match="Proximal"):
        carry_back(gradient, [(None, Proximal(1.0))])


@pytest.mark.parametrize("seed", range(3))
def test_apply_is_the_response_of_the_dense_matrix(seed):
    generator = torch.Generator().manual_seed(seed)
    q_a, q_s = (torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0] for n in (5, 3))
    factor = Factor(Basis(q_a, q_s), torch.rand(3, 5, generator=generator).double())
    basis = torch.kron(q_s, q_a)
    hessian = (basis * factor.eigenvalues.flatten()) @ basis.T
    gradient = torch.randn(2, 3, 5, generator=generator).double()
    solved = torch.linalg.solve(hessian + 1e-3 * torch.eye(15).double(), gradient.flatten(1).T).T.view(2, 3, 5)
    torch.testing.assert_close(factor.apply(DampedInverse(1e-3), gradient), solved, rtol=1e-10, atol=1e-10)
    assert factor.mean_eigenvalue == pytest.approx(float(hessian.trace()) / 15)
