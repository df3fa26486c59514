"""The compared methods against dense float64 matrices, on a tiny random model, and what the experiment writes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pyarrow.parquet as pq
import pytest
import reference
import reference_solve
import torch
from influence import pipeline

from msif_ray.corpus.windows import Encoded
from msif_ray.errors import UserError
from msif_ray.influence.conjugate import State, solve
from msif_ray.influence.modules import find_linear_maps
from msif_ray.store import read_json
from msif_ray.validate import methods, report, similarity
from msif_ray.validate.agreement import agreement
from msif_ray.validate.experiment import Budget, Experiment
from msif_ray.validate.joint import ALL, joined, joint_system, parted
from msif_ray.validate.problem import Problem, relative_damping
from msif_ray.validate.roots import largest_roots
from msif_ray.validate.setting import Setting, Sizes
from msif_ray.validate.solvers import run
from msif_ray.validate.trak import Projection, Trak

DOCUMENTS = models.random_documents(1, 8, (3, 12), prefix="base")
QUERIES = models.random_documents(3, 2, (3, 6), completions=True, prefix="query")


@pytest.fixture(scope="module")
def stage() -> reference.StageSpec:
    model = models.build_model("gpt_neox", seed=4, hidden=8, intermediate=12, layers=1)
    return reference.StageSpec("validate", model, models.build_tokenizer(), DOCUMENTS)


@pytest.fixture(scope="module")
def problem(stage: reference.StageSpec) -> Problem:
    """In float32, all documents in one batch."""
    single = pipeline.in_dtype(stage, torch.float32)
    encoded, _ = pipeline.encode_rows(single, DOCUMENTS)
    queries, _ = pipeline.encode_rows(single, [row | {"append_eos": False} for row in QUERIES])
    maps = find_linear_maps(single.model)
    setting = Setting(single.model, single.tokenizer, maps, encoded, [], encoded, queries, 0.0)
    return Problem(setting, pipeline.TOGETHER)


@pytest.fixture(scope="module")
def dense(stage: reference.StageSpec, problem: Problem) -> torch.Tensor:
    return reference_solve.gauss_newton(stage, list(problem.setting.maps))


def flat(vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.flatten(1) for each in vectors.values()], dim=1).double()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_lissa_comes_to_the_dense_solve(problem: Problem, dense: torch.Tensor) -> None:
    damping = float(torch.linalg.eigvalsh(dense)[-1])
    right = flat(problem.query_gradients)
    wanted = torch.linalg.solve(dense + damping * torch.eye(len(dense)), right.T).T
    found = methods.lissa(problem, dict.fromkeys(problem.setting.maps, damping), 40, len(DOCUMENTS), seed=0)
    assert relative_error(flat(found), wanted) < 1e-3


def test_arnoldi_inverts_the_largest_eigenvalues(problem: Problem, dense: torch.Tensor) -> None:
    values, vectors = torch.linalg.eigh(dense)
    largest, directions = values[-3:], vectors[:, -3:]
    wanted = (flat(problem.query_gradients) @ directions / largest) @ directions.T
    assert relative_error(flat(methods.arnoldi(problem, 60, 3, seed=0)), wanted) < 1e-2


def test_factors_are_those_of_the_reference(stage: reference.StageSpec, problem: Problem) -> None:
    fitted, wanted = problem.fit(problem.setting.documents), reference.fit(stage, list(problem.setting.maps))
    targets = sum(len(document.ids) - 1 for document in problem.setting.documents) / len(DOCUMENTS)
    for name, factor in fitted.ekfac.items():
        assert relative_error(factor.eigenvalues.double(), wanted[name].Lambda) < 1e-3
        kron = targets * torch.kron(wanted[name].S, wanted[name].A)
        kfac = fitted.kfac[name]
        basis = torch.kron(kfac.basis.gradients, kfac.basis.activations).double()
        assert relative_error((basis * kfac.eigenvalues.double().reshape(-1)) @ basis.T, kron) < 1e-3


def test_more_labels_come_closer_to_the_operators_trace(problem: Problem, dense: torch.Tensor) -> None:
    def trace(draws: int) -> float:
        factors = problem.fit(problem.setting.documents, draws).ekfac
        return sum(float(factor.eigenvalues.sum()) for factor in factors.values())

    wanted = float(dense.trace())
    assert abs(trace(24) - wanted) < 0.15 * wanted


def test_scores_of_one_map_and_cosines(problem: Problem) -> None:
    gradients = problem.query_gradients
    scores, norms = problem.scores(gradients)
    parts = [problem.scores({name: vectors})[0] for name, vectors in gradients.items()]
    assert np.allclose(sum(parts), scores, rtol=1e-4, atol=1e-4 * np.abs(scores).max())
    cosines = similarity.gradient_cosine(scores, norms, gradients)
    assert np.abs(cosines).max() <= 1 + 1e-6
    own, _ = problem.scores(gradients, problem.setting.queries)
    _, own_norms = problem.scores(gradients, problem.setting.queries)
    assert np.allclose(np.diag(similarity.gradient_cosine(own, own_norms, gradients)), 1, atol=1e-5)


def test_hidden_similarity_is_one_of_a_document_with_itself(problem: Problem) -> None:
    setting = problem.setting
    itself = Setting(**(vars(setting) | {"queries": setting.scored}))
    assert np.allclose(np.diag(similarity.hidden_cosine(itself)), 1, atol=1e-6)


def test_cka_is_that_of_centred_gram_matrices(problem: Problem) -> None:
    setting = problem.setting
    found = similarity.linear_cka(setting)

    def gram(row: Encoded) -> np.ndarray:
        out = setting.model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        states = out.hidden_states[-1][0].detach().double().numpy().T  # [units, tokens]
        centring = np.eye(len(states)) - 1 / len(states)
        return centring @ states @ states.T @ centring

    for q, query in enumerate(setting.queries):
        for d, document in enumerate(setting.scored):
            k, m = gram(query), gram(document)
            assert found[q, d] == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()), rel=1e-5)
    itself = Setting(**(vars(setting) | {"queries": setting.scored}))
    assert np.allclose(np.diag(similarity.linear_cka(itself)), 1, atol=1e-9)


def test_trak_equals_the_dense_formula(problem: Problem) -> None:
    setting, dimension = problem.setting, 4
    maps, model = setting.maps, setting.model
    found = Trak.fit(setting, setting.scored, dimension, seed=7).scores()
    signs = torch.cat(list(Projection.draw(maps, dimension, 7).signs.values()), dim=1).double()
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.05

    def gradient(row: Encoded, of_loss: bool) -> torch.Tensor:
        """One target at a time: log p / (1 − p), or the loss as (1 − p) times its gradient."""
        total: torch.Tensor | float = 0.0
        for t in range(1, len(row.ids)):
            if row.targets[t]:
                p = model(input_ids=torch.tensor([row.ids])).logits[0, t - 1].double().softmax(0)[row.ids[t]]
                margin = (p / (1 - p)).log()
                total = total + (-(1 - p).detach() * margin if of_loss else margin)
        modules = [model.get_submodule(name) for name in maps]
        weights = torch.autograd.grad(total, [w for m in modules for w in (m.weight, m.bias)])
        pairs = zip(weights[::2], weights[1::2], strict=True)
        return torch.cat([torch.cat([w, b[:, None]], 1).flatten() for w, b in pairs]).double()

    project = signs.T / dimension**0.5
    features = torch.stack([gradient(row, False) for row in setting.scored]) @ project
    queries = torch.stack([gradient(row, False) for row in setting.queries]) @ project
    losses = torch.stack([gradient(row, True) for row in setting.scored]) @ project
    wanted = -queries @ torch.linalg.inv(features.T @ features) @ losses.T
    assert relative_error(torch.tensor(found), wanted) < 1e-3
    with pytest.raises(ValueError, match="needs as many documents"):
        Trak.fit(setting, setting.scored, len(setting.scored) + 1, seed=7)


def test_all_roots_make_the_operator(problem: Problem, dense: torch.Tensor) -> None:
    maps, roots = problem.setting.maps, largest_roots(problem, 10**6)
    vectors = random_vectors(problem)
    along = [each.transposed(each.times(vectors), list(maps)) for each in roots]
    found = {name: sum(each[name] for each in along) / len(roots) for name in maps}
    assert relative_error(flat(found), flat(vectors) @ dense) < 1e-4


def random_vectors(problem: Problem) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(2, *each.shape, generator=generator) for name, each in problem.setting.maps.items()}


def test_the_truths_preconditioner_inverts_the_operator_where_every_direction_counts(
    problem: Problem, dense: torch.Tensor
) -> None:
    maps, right = problem.setting.maps, problem.query_gradients
    means = {name: 1e-2 * (1 + number) for number, name in enumerate(maps)}
    multiple = 0.5 * float(torch.linalg.eigvalsh(dense)[-1])
    diagonal = torch.cat([torch.full((each.parameters,), means[name]) for name, each in maps.items()]).double()
    damped = dense + multiple * torch.diag(diagonal)
    wanted = torch.linalg.solve(damped, flat(right).T).T
    system = replace(joint_system(largest_roots(problem, 10**6), maps, means), multiple=multiple)
    assert relative_error(flat(parted({ALL: system.precondition(joined(right)[ALL])}, maps)), wanted) < 1e-3
    vectors = random_vectors(problem)
    products = system.damped(joined(problem.product(vectors))[ALL], joined(vectors)[ALL])
    assert relative_error(products[:, 0].double(), flat(vectors) @ damped) < 1e-5

    few = replace(joint_system(largest_roots(problem, 20), maps, means), multiple=multiple)
    assert len(few.crossed) == 20
    began = State.begun({ALL: few}, joined(right))
    found = solve({ALL: few}, began, lambda v: joined(problem.product(parted(v, maps))), 60, 1e-5)
    assert relative_error(flat(parted(found.solution, maps)), wanted) < 1e-3


def test_agreement_of_scores_with_themselves_and_with_noise() -> None:
    truth = np.random.default_rng(0).standard_normal((30, 200))
    same = agreement(2 * truth + 1, truth)
    assert same["pearson"] == pytest.approx(1) and same["spearman_interval"] == pytest.approx([1, 1])
    noise = agreement(np.random.default_rng(1).standard_normal(truth.shape), truth)
    low, high = noise["pearson_interval"]
    assert low < noise["pearson"] < high and abs(noise["pearson"]) < 0.05 and high - low < 0.1


def test_an_experiment_writes_its_tables_and_does_nothing_twice(problem: Problem, tmp_path: Path) -> None:
    budget = Budget((0.5, 1.0), 1e-3, 12, 1, 4, 2, 5, 2, 6, trak=3, trak_documents=8, draws=2, rows=30)
    said: list[str] = []

    def experiment(budget: Budget = budget, seed: int = 0) -> Experiment:
        made = Experiment(Sizes(tokens_per_batch=pipeline.TOGETHER), budget, seed, tmp_path, said.append)
        made.__dict__["setting"] = problem.setting
        return made

    found: dict[str, Any] = run(experiment()) | {"machine": report.machine(1)}
    report.write_solvers(tmp_path, found)
    assert read_json(tmp_path / "results.json") == found
    compared = {row["method"]: row for row in pq.read_table(tmp_path / "compared.parquet").to_pylist()}
    assert {"EK-FAC, MLP only", "K-FAC, all maps", "CKA of hidden states", "TRAK, dimension 3"} < set(compared)
    separates = pq.read_table(tmp_path / "separates.parquet").to_pylist()
    assert ("exact blocks", "CG") in {(r["change"], r["against"]) for r in separates}
    itself = next(row for name, row in compared.items() if name.startswith("CG"))
    assert itself["pearson"] == pytest.approx(1) and itself["query_seconds"] > 0
    refined = pq.read_table(tmp_path / "refined.parquet").to_pylist()
    assert {row["damping"] for row in refined} == {0.5, 1.0} and refined[0]["iteration"] == 0
    assert (tmp_path / "solvers.png").read_bytes().startswith(b"\x89PNG")
    said.clear()
    assert run(experiment()) | {"machine": found["machine"]} == found and not said
    more = run(experiment(replace(budget, dampings=(0.5, 1.0, 2.0))))
    assert more["refined"][: len(refined)] == refined and more["refined"][-1]["damping"] == 2.0
    assert more["compared"] == found["compared"] and more["setting"]["budget"]["dampings"] == [0.5, 1.0, 2.0]
    other = {
        "budget.dampings": replace(budget, dampings=(1.0, 0.5)),
        "budget.iterations": replace(budget, iterations=9),
    }
    for key, changed in other.items():
        with pytest.raises(UserError, match=f"--folder: .*{key} .*; give another folder"):
            run(experiment(changed))
    with pytest.raises(UserError, match="seed 0, not 1;"):
        run(experiment(seed=1))


def test_damping_is_a_multiple_of_each_maps_mean(problem: Problem) -> None:
    factors = problem.fit(problem.setting.documents).ekfac
    assert relative_damping(factors, 0.1) == {n: 0.1 * float(f.eigenvalues.double().mean()) for n, f in factors.items()}
