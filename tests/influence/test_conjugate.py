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
from msif_ray.influence.conjugate import Numbers, State, System, solve
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


def solved(systems, right, product, iterations, tolerance=0.0):
    """The last state, and all on the way."""
    seen = []
    return solve(systems, State.begun(systems, right), product, iterations, tolerance, seen.append), seen


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
        found, _ = solved(systems, right, dense_products(stage, names), 5000, tolerance=1e-9)
    answers = {name: vectors * (1.0 if scored else systems[name].damping) for name, vectors in found.solution.items()}
    assert error(answers, wanted) < 1e-6
    assert found.residuals[-1].max() <= 1e-9 < 1 < found.numbers.relative_of_ekfac.min()


def test_residuals_are_the_true_ones_and_ek_facs_is_told_without_a_product():
    stage = make_stage("gpt_neox", damping=0.1)
    names = list(find_linear_maps(stage.model))
    fit = reference.fit(stage, names)
    right = reference_solve.query_gradients(stage, names, QUERIES)
    systems, products, product = systems_of(stage, fit), [], products_of(stage)
    found, seen = solved(systems, right, lambda vectors: products.append(vectors) or product(vectors), 5)
    assert len(seen) == len(products) == found.iterations == 5 and len(found.residuals) == 6
    dense = reference_solve.gauss_newton(stage, names) + torch.diag(reference_solve.strengths(stage, fit, True))

    def residual(vectors):
        return (flat(right) - flat(vectors) @ dense).norm(dim=1) / flat(right).norm(dim=1)

    for state in seen:
        assert torch.allclose(state.numbers.relative, residual(state.solution), rtol=1e-9)
    ekfac = {}
    for name in names:
        n = fit[name].Lambda.numel()
        damped = fit[name].hessian() + float(systems[name].damping) * torch.eye(n, dtype=torch.float64)
        ekfac[name] = torch.linalg.solve(damped, right[name].flatten(1).T).T.reshape(right[name].shape)
    assert error(products[0], ekfac) < 1e-9
    assert torch.allclose(found.numbers.relative_of_ekfac, residual(ekfac), rtol=1e-7)


def errors(stage, fit, names, right, states):
    """The error of every state in the operator's norm, [states, queries]."""
    dense = reference_solve.gauss_newton(stage, names) + torch.diag(reference_solve.strengths(stage, fit, True))
    exact = torch.linalg.solve(dense, flat(right).T).T
    beyond = torch.stack([flat(state.solution) - exact for state in states])
    return (beyond * (beyond @ dense)).sum(2)


def test_the_error_falls_with_every_step_and_is_less_than_of_a_query_alone():
    stage = make_stage("gpt_neox", damping=1e-2)
    names = list(find_linear_maps(stage.model))
    fit = reference.fit(stage, names)
    right = reference_solve.query_gradients(stage, names, [*QUERIES, *DOCUMENTS[:4]])
    systems, product = systems_of(stage, fit), dense_products(stage, names)
    _, together = solved(systems, right, product, 12)
    found = errors(stage, fit, names, right, together)
    assert (found.diff(dim=0) < 0).all()
    of_alone = []
    for query in range(len(found[0])):
        own = {name: vectors[query : query + 1] for name, vectors in right.items()}
        _, alone = solved(systems, own, product, 12)
        of_alone.append(errors(stage, fit, names, own, alone)[:, 0])
    assert (found <= torch.stack(of_alone, dim=1) * (1 + 1e-9)).all()
    assert found[-1].sum() < 0.8 * torch.stack(of_alone)[:, -1].sum()


def test_the_first_step_is_better_than_ek_fac():
    """The best combination of EK-FAC's answers has the smaller error."""
    stage = make_stage("gpt_neox", damping=1e-3)
    names = list(find_linear_maps(stage.model))
    fit = reference.fit(stage, names)
    right = reference_solve.query_gradients(stage, names, QUERIES)
    systems, product = systems_of(stage, fit), dense_products(stage, names)
    found, seen = solved(systems, right, product, 1)
    ekfac = replace(found, iterates={name: replace(it, solution=it.direction) for name, it in found.iterates.items()})
    first, of_ekfac = errors(stage, fit, names, right, [*seen, ekfac])
    assert (first < of_ekfac).all()


def test_a_query_that_is_solved_stands_still_and_a_zero_one_is_solved_at_once():
    stage = make_stage("gpt_neox", damping=1.0)
    names = list(find_linear_maps(stage.model))
    right = reference_solve.query_gradients(stage, names, QUERIES)
    right = {name: torch.cat([vectors, torch.zeros_like(vectors[:1])]) for name, vectors in right.items()}
    systems = systems_of(stage, reference.fit(stage, names))
    found, seen = solved(systems, right, dense_products(stage, names), 400, tolerance=1e-8)
    assert found.residuals[0].tolist() == [1, 1, 0] and found.residuals[-1].max() <= 1e-8
    assert all(not vectors[2].any() for vectors in found.solution.values())
    done = next(state for state in seen if (state.numbers.relative[:2] <= 1e-8).any())
    still = int(done.numbers.relative[:2].argmin())
    assert all(torch.equal(done.solution[name][still], found.solution[name][still]) for name in names)


def test_queries_that_are_the_same_or_combinations_of_others_are_solved_too():
    stage = make_stage("gpt_neox", damping=1.0)
    names = list(find_linear_maps(stage.model))
    right = reference_solve.query_gradients(stage, names, QUERIES)
    right = {name: torch.cat([v, v[:1], v[:1] - 2 * v[1:]]) for name, v in right.items()}
    fit = reference.fit(stage, names)
    wanted = reference_solve.solved(stage, fit, right, scored=True)
    found, _ = solved(systems_of(stage, fit), right, dense_products(stage, names), 400, tolerance=1e-8)
    assert found.residuals[-1].max() <= 1e-8
    assert error(found.solution, wanted) < 1e-6


def test_a_solve_goes_on_from_a_state():
    stage = make_stage("gpt_neox", damping=0.1)
    names = list(find_linear_maps(stage.model))
    right = reference_solve.query_gradients(stage, names, QUERIES)
    systems, product = systems_of(stage, reference.fit(stage, names)), dense_products(stage, names)
    whole, seen = solved(systems, right, product, 9)
    again = solve(systems, seen[3], product, 9)
    assert len(again.residuals) == 10 and error(again.solution, whole.solution) < 1e-12


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
    narrow = {name: vectors.float() for name, vectors in right.items()}
    found, _ = solved(systems, narrow, products_of(single), 80, tolerance=1e-4)
    assert all(vectors.dtype == torch.float32 for vectors in found.solution.values())
    assert found.residuals[-1].max() <= 1e-4
    assert error({name: vectors.double() for name, vectors in found.solution.items()}, wanted) < 1e-3


def test_an_answer_is_refined_where_it_is_within_the_tolerance_and_no_worse_than_ekfac():
    squares = {"squares": [0.01, 0.01, 0.04, 0.04], "first": [0.02, 0.005, 0.09, 0.03]}  # of residuals; b·b is 1
    numbers = replace(
        Numbers.begun(torch.ones(4, dtype=torch.float64)),
        **{name: torch.tensor(each, dtype=torch.float64) for name, each in squares.items()},
    )
    assert numbers.refined(0.15).tolist() == [True, False, False, False]
