"""FLOPs and bytes by formula against PyTorch's own count of the operations that the code performs."""

from collections.abc import Iterator

import families
import models
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from msif_ray.influence.batch import Batch, WindowKey
from msif_ray.influence.capture import Capture, Captured
from msif_ray.influence.curvature import CurvatureMetric, curvature_squares
from msif_ray.influence.ekfac import Basis, CorrectionSums, CovarianceSums
from msif_ray.influence.modules import find_linear_maps
from msif_ray.influence.scoring import Scorer
from msif_ray.plan import counts
from msif_ray.plan.tokens import Tally

ROWS, TOKENS = 3, 24
# Every position but the last of a window predicts a target.
TALLY = Tally(ROWS, 0, ROWS * TOKENS, ROWS * (TOKENS - 1), {TOKENS: ROWS})


def addmm_flops(self: list[int], left: list[int], right: list[int], **_: object) -> int:
    """PyTorch's counter does not know the in-place form, nor products into memory that is there."""
    return 2 * left[0] * left[1] * right[1]


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})


def first_maps(model: torch.nn.Module) -> int:
    """The weights of the maps at which the backward pass ends."""
    found = []

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not args[0].requires_grad:
            found.append(module.weight.numel())

    handles = [model.get_submodule(name).register_forward_hook(hook) for name in find_linear_maps(model)]
    with Capture(model, find_linear_maps(model)) as capture:
        capture.run(batch())
    for handle in handles:
        handle.remove()
    return sum(found)


def batch() -> Batch:
    ids = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % len(models.VOCABULARY)
    targets = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    targets[:, 0] = False
    return Batch(ids, torch.ones_like(targets), targets, tuple(WindowKey(str(row), 0) for row in range(ROWS)))


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    built = models.build_model(request.param, seed=1, hidden=32, intermediate=80)
    built.set_attn_implementation("eager")  # the counter knows no fused attention on the CPU
    return built


@pytest.fixture(scope="module")
def captured(model: torch.nn.Module) -> Iterator[Captured]:
    with Capture(model, find_linear_maps(model)) as capture:
        yield capture.run(batch())


def shapes_of(captured: Captured) -> dict[str, tuple[int, int]]:
    return {name: found.shape for name, found in captured.maps.items()}


def test_a_pass(model: torch.nn.Module) -> None:
    with Capture(model, find_linear_maps(model)) as capture, counter() as count:
        capture.run(batch())
    size = counts.ModelSize.of_model(model, model.config)
    not_done = 2 * first_maps(model) * TALLY.positions
    # Rotary embeddings are a product of each position with each frequency: not in the formula.
    assert counts.pass_flops(size, TALLY) - not_done == pytest.approx(count.get_total_flops(), rel=0.01)
    assert 0 < not_done < 0.2 * counts.pass_flops(size, TALLY)


def test_covariances(captured: Captured) -> None:
    sums = CovarianceSums()
    with counter() as count:
        sums.add(captured)
    # The formulas count a bias's column as if it were multiplied: it is summed, or added.
    planned = counts.covariance_flops(shapes_of(captured), TALLY)
    assert planned == pytest.approx(count.get_total_flops(), rel=0.02) and planned >= count.get_total_flops()
    entries = sum(total.numel() for total in sums.sums.values())
    assert counts.covariance_bytes(shapes_of(captured), 8) == 8 * entries


def test_corrections(captured: Captured) -> None:
    bases = {
        name: Basis(torch.eye(columns).double(), torch.eye(out).double())
        for name, (out, columns) in shapes_of(captured).items()
    }
    sums = CorrectionSums(bases)
    with counter() as count:
        sums.add(captured)
    planned = counts.correction_flops(shapes_of(captured), TALLY)
    assert planned == pytest.approx(count.get_total_flops(), rel=0.02) and planned >= count.get_total_flops()
    assert counts.corrected_bytes(shapes_of(captured), 8) == 8 * sum(total.numel() for total in sums.sums.values())


def test_norms_in_the_inverse_curvature(captured: Captured) -> None:
    metrics = {
        name: CurvatureMetric(
            Basis(torch.eye(columns).double(), torch.eye(out).double()), torch.ones(out, columns).double()
        )
        for name, (out, columns) in shapes_of(captured).items()
    }
    with counter() as count:
        curvature_squares(metrics, captured)
    planned = counts.curvature_flops(shapes_of(captured), TALLY)
    # The counter knows no product of a matrix and a vector, which is one in T + out + columns here.
    assert planned == pytest.approx(count.get_total_flops(), rel=0.04) and planned >= count.get_total_flops()
    tensors = [t for m in metrics.values() for t in (m.basis.activations, m.basis.gradients, m.weights)]
    assert counts.curvature_bytes(shapes_of(captured), 8) == 8 * sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("rank", "dense_entries"), [(None, 2**28), (2, 2**28), (2, 0)])
def test_scores(captured: Captured, rank: int | None, dense_entries: int, norms: bool) -> None:
    directions = counts.make_directions(shapes_of(captured), 7, rank, torch.float64, torch.device("cpu"))
    scorer = Scorer(directions, dense_entries, norms)
    planned = counts.scoring_flops(scorer, TALLY)
    held = counts.scorer_bytes(scorer, TALLY)
    for each in directions.values():
        assert each.dense.shape  # expanding is done once, not per batch
    with counter() as count:
        scorer.score(captured)
    # The scorer counts elementwise multiplications too: 1 in T + Q + 1 of them, and 1 in out + columns + 1.
    assert planned == pytest.approx(count.get_total_flops(), rel=0.05)
    expanded = [name for name in directions if scorer.keeps(name) and scorer.materialises(name, TOKENS)]
    entries = sum(7 * out * columns for name, (out, columns) in shapes_of(captured).items() if name in expanded)
    assert held == counts.directions_bytes(directions) + 8 * entries


def test_token_scores(captured: Captured) -> None:
    for rank in (None, 2):
        directions = counts.make_directions(shapes_of(captured), 3, rank, torch.float64, torch.device("cpu"))
        scorer = Scorer(directions)
        with counter() as count:
            scorer.pair_shares(captured, [(row, 1) for row in range(ROWS)])
        assert counts.token_score_flops(scorer, ROWS * TOKENS) == count.get_total_flops()


def test_carrying_back() -> None:
    shapes = {"a": (8, 5), "b": (4, 12)}
    with counter() as count:
        for out, columns in shapes.values():
            basis = Basis(torch.eye(columns), torch.eye(out))
            for _ in range(2):
                basis.rotate_back(basis.rotate(torch.randn(3, out, columns)))
    assert counts.carry_flops(shapes, queries=3, stages=2) == count.get_total_flops()


def test_eigendecomposition_and_truncation_grow_with_the_cube() -> None:
    assert counts.eigen_flops({"a": (10, 20)}) == 9 * (1000 + 8000)
    assert counts.truncation_flops({"a": (10, 20)}, 2, rank=None, energy=None) == 0
    assert counts.truncation_flops({"a": (10, 20)}, 2, rank=10, energy=None) == 0  # no smaller than dense
    assert counts.truncation_flops({"a": (10, 20)}, 2, rank=1, energy=None) == 2 * (6 * 20 * 100 + 20 * 1000)


def test_directions_on_meta_have_the_same_bytes_and_take_none() -> None:
    shapes = {"a": (8, 500), "b": (4, 12)}
    for rank in (None, 3):
        real = counts.make_directions(shapes, 5, rank, torch.float32, torch.device("cpu"))
        meta = counts.make_directions(shapes, 5, rank, torch.float32, torch.device("meta"))
        assert counts.directions_bytes(real) == counts.directions_bytes(meta)


def test_a_token_meets_the_experts_that_it_is_sent_to() -> None:
    model = families.build("mixtral", 0)  # 2 of 4 experts, each 24 x 8 and 8 x 12; attention 8 x (8 + 4 + 4 + 8)
    size = counts.ModelSize.of_model(model, model.config)
    assert size.multiplied == 2 * (2 * (24 * 8 + 8 * 12) + 8 * 24)


@pytest.mark.parametrize(("family", "attention"), [("gpt2", 16), ("bloom", 16), ("gemma3", 16), ("rwkv", 0)])
def test_heads_are_found_by_any_name_and_there_may_be_none(family: str, attention: int) -> None:
    """Two layers of two heads of 4."""
    if family == "rwkv":
        config = AutoConfig.for_model(family, hidden_size=8, num_hidden_layers=2, vocab_size=16)
    else:
        config = families.build(family, 0).config
    model = AutoModelForCausalLM.from_config(config)
    size = counts.ModelSize.of_model(model, config.get_text_config())
    assert size.attention == attention and size.multiplied > 0
