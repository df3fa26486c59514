"""Pseudo-tokens: best in their metric, exact at full rank, and small without overflow."""

from collections.abc import Callable

import pytest
import torch

from msif_ray.influence import compress
from msif_ray.influence.compress import Metric, Packed
from msif_ray.influence.ekfac import Basis, Factor
from msif_ray.influence.scoring import DenseDirections, LowRankDirections

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
OUT, COLUMNS = 18, 25


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_factor(seed: int = 0) -> Factor:
    basis = Basis(*(torch.linalg.qr(random(n, n, seed=seed + n))[0] for n in (COLUMNS, OUT)))
    return Factor(basis, random(OUT, COLUMNS, seed=seed).mul(2).exp())


def random_tokens(tokens: int, windows: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """With singular values that fall off."""
    fall = torch.exp(-0.3 * torch.arange(tokens, dtype=torch.float64))[:, None]
    return random(windows, tokens, COLUMNS, seed=seed), random(windows, tokens, OUT, seed=seed + 1) * fall


def gradient(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return gradients.transpose(1, 2) @ activations


def whitened(metric: Metric, found: torch.Tensor) -> torch.Tensor:
    return metric.gradient_weights[:, None] * metric.basis.rotate(found) * metric.activation_weights


def test_separable_weights_are_exact_where_the_eigenvalues_are_separable() -> None:
    left, right = random(OUT, seed=1).exp(), random(COLUMNS, seed=2).exp()
    metric = Metric.of(Factor(random_factor().basis, torch.outer(left, right) - 0.01), 0.01)
    found = torch.outer(metric.gradient_weights, metric.activation_weights)
    torch.testing.assert_close(found, torch.outer(left, right) ** -0.5, **CLOSE)


@pytest.mark.parametrize("tokens", (4, 12, 60))
def test_full_rank_is_exact(tokens: int) -> None:
    metric, given = Metric.of(random_factor(), 0.3), random_tokens(tokens)
    exact = whitened(metric, gradient(*given))
    for rank in (tokens, OUT):
        if rank >= min(tokens, OUT):
            pseudo = compress.compress(metric, *given, rank)
            assert pseudo[0].shape[1] <= rank
            torch.testing.assert_close(gradient(*pseudo), exact, **CLOSE)


@pytest.mark.parametrize("rank", (1, 2, 5))
def test_the_error_is_what_eckart_and_young_say(rank: int) -> None:
    metric, given = Metric.of(random_factor(), 0.3), random_tokens(compress.REDUCED * rank)
    exact = whitened(metric, gradient(*given))
    pseudo = compress.compress(metric, *given, rank)
    assert pseudo[0].shape == (3, rank, COLUMNS) and pseudo[1].shape == (3, rank, OUT)
    least = torch.linalg.svdvals(exact)[:, rank:].square().sum(1)
    torch.testing.assert_close((gradient(*pseudo) - exact).square().sum((1, 2)), least, **CLOSE)


def test_long_windows_are_nearly_as_good(record_property: Callable[[str, object], None]) -> None:
    metric, given = Metric.of(random_factor(), 0.3), random_tokens(60)
    exact = whitened(metric, gradient(*given))
    pseudo = compress.compress(metric, *given, 3)
    least = torch.linalg.svdvals(exact)[:, 3:].square().sum(1)
    ratio = (gradient(*pseudo) - exact).square().sum((1, 2)) / least
    record_property("error over the least", float(ratio.max()))
    assert (ratio > 1 - 1e-9).all() and (ratio < 1.02).all()


def test_padding_changes_nothing() -> None:
    metric, (activations, gradients) = Metric.of(random_factor(), 0.3), random_tokens(6)
    padded = torch.cat([gradients, torch.zeros(3, 5, OUT)], 1)
    filled = torch.cat([activations, random(3, 5, COLUMNS, seed=9)], 1)
    found = gradient(*compress.compress(metric, filled, padded, 2))
    torch.testing.assert_close(found, gradient(*compress.compress(metric, activations, gradients, 2)), **CLOSE)


def test_products_with_directions_are_kept_whatever_their_form() -> None:
    metric, given = Metric.of(random_factor(), 0.3), random_tokens(5)
    low = LowRankDirections.stacked(random(4, 2, OUT, seed=4), random(4, 2, COLUMNS, seed=5))
    expected = torch.einsum("qoc,woc->wq", low.dense, gradient(*given))
    white = whitened(metric, gradient(*given))
    for directions in (low, DenseDirections(low.dense)):
        dual = metric.directions(directions)
        assert type(dual) is type(directions)
        torch.testing.assert_close(torch.einsum("qoc,woc->wq", dual.dense, white), expected, **CLOSE)


@pytest.mark.parametrize(("dtype", "error"), (("int8", 1e-2), ("float16", 1e-3), ("bfloat16", 6e-3), ("float32", 1e-7)))
def test_rounding(dtype: str, error: float) -> None:
    activations, gradients = random_tokens(7)
    # Far outside what float16 can hold, and nothing at all.
    gradients = gradients * torch.tensor([1e-25, 1e25, 0.0], dtype=torch.float64)[:, None, None]
    packed = Packed.of(activations, gradients, getattr(torch, dtype))
    assert str(packed.activations.dtype) == str(packed.gradients.dtype) == f"torch.{dtype}"
    exact = gradient(activations, gradients)
    found = gradient(*packed.unpack(torch.float64))
    assert torch.equal(found[2], torch.zeros(OUT, COLUMNS))
    for window in (0, 1):
        assert (found[window] - exact[window]).norm() < error * exact[window].norm()
    torch.testing.assert_close(gradient(*packed.padded(9).unpack(torch.float64)), found)
    assert packed.padded(9).scales.shape == (3, 9)
