"""Gauss-Newton products, and conjugate gradients on them, against a dense float64 matrix over all maps."""

from dataclasses import replace

import models
import pipeline
import pytest
import reference
import reference_solve
import torch

from msif_ray.corpus.windows import to_batch
from msif_ray.errors import UserError
from msif_ray.influence.capture import Capture
from msif_ray.influence.conjugate import System, solve
from msif_ray.influence.gauss_newton import ProductSums
from msif_ray.influence.modules import find_linear_maps

DOCUMENTS = models.random_documents(1, 8, (3, 14), prefix="base")
PROMPTED = models.random_documents(2, 6, (2, 8), completions=True, prefix="tune")
QUERIES = models.random_documents(3, 2, (3, 6), completions=True, prefix="query")
SMALL = {"hidden": 8, "intermediate": 12}


def make_stage(kind: str, prompted: bool = False, **options) -> reference.StageSpec:
    model = models.build_model(kind, seed=4, **SMALL)
    documents = PROMPTED if prompted else DOCUMENTS
    return reference.StageSpec("base", model, models.build_tokenizer(), documents, max_tokens=9, **options)


def stage_batches(stage, tokens_per_batch=60):
    encoded, _ = pipeline.encode_rows(stage, stage.documents)
    return [to_batch(windows) for windows in pipeline.batches(stage, encoded, tokens_per_batch)], len(encoded)


def products_of(stage, tokens_per_batch=60):
    """H v by the package, as a function of directions by map."""
    batches, documents = stage_batches(stage, tokens_per_batch)
    maps = find_linear_maps(stage.model)

    def product(directions):
        sums = ProductSums(directions)
        with Capture(stage.model, maps) as capture:
            for batch in batches:
                assert torch.isfinite(sums.add(capture, batch)).all()
        return {name: total / documents for name, total in sums.sums.items()}

    return product


def dense_products(stage, names):
    """H v by the reference's matrix, for solves of many steps."""
    dense = reference_solve.gauss_newton(stage, names)

    def product(directions):
        parts = (flat(directions) @ dense).split([each[0].numel() for each in directions.values()], dim=1)
        return {name: part.reshape(directions[name].shape) for name, part in zip(directions, parts, strict=True)}

    return product


def systems_of(stage, fit, scored=True):
    """The package's systems, with the factors and strengths of the reference's fit."""
    systems = {}
    for name, factor in pipeline.fit(stage).factors.items():
        mean = float(fit[name].Lambda.mean())
        strength, relative = (stage.damping, stage.damping_relative) if scored else (stage.strength, stage.relative)
        systems[name] = System(factor, strength * (mean if relative else 1.0))
    return systems


def random_directions(maps, queries=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(queries, *each.shape, generator=generator, dtype=torch.float64) for name, each in maps.items()
    }


def error(found, wanted):
    scale = max(float(each.abs().max()) for each in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / scale


def flat(vectors):
    return torch.cat([each.flatten(1) for each in vectors.values()], dim=1)


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("kind", models.KINDS)
def test_a_product_equals_the_dense_matrix(kind, prompted):
    """All maps together, ragged windows padded in one batch; biases (gpt_neox, gpt2, opt) and none (llama)."""
    with models.exact_norms():
        stage = make_stage(kind, prompted)
        maps = find_linear_maps(stage.model)
        directions = random_directions(maps)
        dense = reference_solve.gauss_newton(stage, list(maps))
        found = products_of(stage)(directions)
        assert list(found) == list(maps)
        wanted = flat(directions) @ dense
        assert (flat(found) - wanted).abs().max() < 1e-10 * wanted.abs().max()


def test_a_product_does_not_depend_on_batches_and_repeats():
    stage = make_stage("gpt_neox")
    directions = random_directions(find_linear_maps(stage.model))
    before = {name: each.clone() for name, each in directions.items()}
    together, alone = products_of(stage, pipeline.TOGETHER), products_of(stage, pipeline.ALONE)
    first = together(directions)
    assert error(alone(directions), first) < 1e-12
    assert all(torch.equal(first[name], again) for name, again in together(directions).items())
    assert all(torch.equal(before[name], direction) for name, direction in directions.items())
    assert all(weight.requires_grad for weight in stage.model.parameters())
    assert not any(module._forward_hooks for module in stage.model.modules())


def test_an_infinite_loss_adds_nothing():
    stage = make_stage("gpt_neox")
    maps = find_linear_maps(stage.model)
    (batch, *_), _ = stage_batches(stage)
    with torch.no_grad():
        stage.model.get_output_embeddings().weight.fill_(float("nan"))
    sums = ProductSums(random_directions(maps))
    with Capture(stage.model, maps) as capture:
        assert not torch.isfinite(sums.add(capture, batch)).any()
    assert not sums.sums


class Opaque(torch.autograd.Function):
    """The identity, without a forward-mode derivative, as a fused kernel would be."""

    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient


def test_an_operation_without_a_forward_mode_derivative_is_the_users_to_know():
    stage = make_stage("gpt_neox")
    (batch, *_), _ = stage_batches(stage)
    maps = find_linear_maps(stage.model)
    stage.model.gpt_neox.final_layer_norm.register_forward_hook(lambda module, args, output: Opaque.apply(output))
    with Capture(stage.model, maps) as capture:
        with pytest.raises(UserError, match="solver: the model has an operation without a forward-mode derivative"):
            ProductSums(random_directions(maps)).add(capture, batch)
        assert torch.isfinite(capture.run(batch).losses).all()


@pytest.mark.parametrize(
    ("kind", "damping", "scored"), [("gpt_neox", 0.1, True), ("gpt_neox", 1e-2, True), ("llama", 1e-2, False)]
)
def test_conjugate_gradients_reach_the_dense_solve(kind, damping, scored):
    with models.exact_norms():
        stage = make_stage(kind, damping=damping, strength=damping)
        names = list(find_linear_maps(stage.model))
        fit = reference.fit(stage, names)
        right = reference_solve.query_gradients(stage, names, QUERIES)
        wanted = reference_solve.solved(stage, fit, right, scored)
        systems = systems_of(stage, fit, scored)
        found = solve(systems, right, dense_products(stage, names), iterations=5000, tolerance=1e-9)
    answers = {name: vectors * (1.0 if scored else systems[name].damping) for name, vectors in found.solution.items()}
    assert error(answers, wanted) < 1e-6
    assert found.residuals[-1].max() <= 1e-9 < 1 < found.residuals[0].min()


def test_the_start_is_ek_fac_and_the_residuals_are_the_true_ones():
    stage = make_stage("gpt_neox", damping=0.1)
    names = list(find_linear_maps(stage.model))
    fit = reference.fit(stage, names)
    right = reference_solve.query_gradients(stage, names, QUERIES)
    systems, seen = systems_of(stage, fit), []
    found = solve(
        systems, right, products_of(stage), iterations=5, seen=lambda vectors, numbers: seen.append((vectors, numbers))
    )
    assert len(seen) == len(found.residuals) == 6
    dense = reference_solve.gauss_newton(stage, names) + torch.diag(reference_solve.strengths(stage, fit, True))
    for vectors, numbers in seen:
        true = (flat(right) - flat(vectors) @ dense).norm(dim=1) / flat(right).norm(dim=1)
        assert torch.allclose(numbers.relative, true, rtol=1e-9)
    for name in names:
        n = fit[name].Lambda.numel()
        damped = fit[name].hessian() + float(systems[name].damping) * torch.eye(n, dtype=torch.float64)
        wanted = torch.linalg.solve(damped, right[name].flatten(1).T).T.reshape(right[name].shape)
        assert error({name: seen[0][0][name]}, {name: wanted}) < 1e-9


def test_the_energy_falls_with_every_step_though_the_residual_need_not():
    stage = make_stage("gpt_neox", damping=1e-3)
    names = list(find_linear_maps(stage.model))
    fit = reference.fit(stage, names)
    right = reference_solve.query_gradients(stage, names, QUERIES)
    dense = reference_solve.gauss_newton(stage, names) + torch.diag(reference_solve.strengths(stage, fit, True))
    energies = []

    def energy(vectors, numbers):
        x = flat(vectors)
        energies.append(0.5 * (x * (x @ dense)).sum(1) - (x * flat(right)).sum(1))

    solve(systems_of(stage, fit), right, dense_products(stage, names), iterations=12, seen=energy)
    assert (torch.stack(energies).diff(dim=0) < 0).all()


def test_a_query_that_is_solved_stands_still_and_a_zero_one_is_solved_at_once():
    stage = make_stage("gpt_neox", damping=1.0)
    names = list(find_linear_maps(stage.model))
    right = reference_solve.query_gradients(stage, names, QUERIES)
    right = {name: torch.cat([vectors, torch.zeros_like(vectors[:1])]) for name, vectors in right.items()}
    systems = systems_of(stage, reference.fit(stage, names))
    product = dense_products(stage, names)
    found = solve(systems, right, product, iterations=400, tolerance=1e-8)
    assert found.residuals[0, 2] == 0 and found.residuals[-1].max() <= 1e-8
    assert all(not vectors[2].any() for vectors in found.solution.values())
    alone = solve(systems, {name: vectors[:1] for name, vectors in right.items()}, product, 400, tolerance=1e-8)
    assert error({name: vectors[:1] for name, vectors in found.solution.items()}, alone.solution) < 1e-6


def test_float32_products_and_solves_are_those_of_float64_up_to_rounding():
    stage = make_stage("gpt_neox", damping=1.0)
    names = list(find_linear_maps(stage.model))
    right = reference_solve.query_gradients(stage, names, QUERIES)
    fit = reference.fit(stage, names)
    wanted = reference_solve.solved(stage, fit, right, scored=True)
    single = pipeline.in_dtype(stage, torch.float32)
    systems = {
        name: replace(system, factor=pipeline.fit(single).factors[name])
        for name, system in systems_of(stage, fit).items()
    }
    found = solve(
        systems, {name: vectors.float() for name, vectors in right.items()}, products_of(single), 80, tolerance=1e-4
    )
    assert all(vectors.dtype == torch.float32 for vectors in found.solution.values())
    assert found.residuals[-1].max() <= 1e-4
    assert error({name: vectors.double() for name, vectors in found.solution.items()}, wanted) < 1e-3
