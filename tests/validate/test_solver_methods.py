"""The compared methods against dense float64 matrices, on a tiny random model, and what the experiment writes."""

import json
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

from msif_ray.influence.modules import find_linear_maps
from msif_ray.validate import methods, report
from msif_ray.validate.agreement import agreement
from msif_ray.validate.problem import Problem, relative_damping
from msif_ray.validate.setting import Setting, Sizes
from msif_ray.validate.solvers import Budget, Experiment

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
    found = methods.lissa(problem, dict.fromkeys(problem.setting.maps, damping), 120, seed=0)
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
    cosines = methods.cosine(scores, norms, gradients)
    assert np.abs(cosines).max() <= 1 + 1e-6
    own, _ = problem.scores(gradients, problem.setting.queries)
    _, own_norms = problem.scores(gradients, problem.setting.queries)
    assert np.allclose(np.diag(methods.cosine(own, own_norms, gradients)), 1, atol=1e-5)


def test_hidden_similarity_is_one_of_a_document_with_itself(problem: Problem) -> None:
    setting = problem.setting
    itself = Setting(**(vars(setting) | {"queries": setting.scored}))
    assert np.allclose(np.diag(methods.hidden_similarity(itself)), 1, atol=1e-6)


def test_agreement_of_scores_with_themselves_and_with_noise() -> None:
    truth = np.random.default_rng(0).standard_normal((30, 200))
    same = agreement(2 * truth + 1, truth)
    assert same["pearson"] == pytest.approx(1) and same["spearman_interval"] == pytest.approx([1, 1])
    noise = agreement(np.random.default_rng(1).standard_normal(truth.shape), truth)
    low, high = noise["pearson_interval"]
    assert low < noise["pearson"] < high and abs(noise["pearson"]) < 0.05 and high - low < 0.1


def test_an_experiment_writes_its_tables_and_does_nothing_twice(problem: Problem, tmp_path: Path) -> None:
    budget = Budget((0.5, 1.0), 1e-3, 12, 1, 4, 2, 5, 6, 2)
    said: list[str] = []

    def experiment() -> Experiment:
        made = Experiment(Sizes(tokens_per_batch=pipeline.TOGETHER), budget, 0, tmp_path, said.append)
        made.__dict__["setting"] = problem.setting
        return made

    found: dict[str, Any] = experiment().run() | {"machine": report.machine(1)}
    report.write_solvers(tmp_path, found)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    compared = {row["method"]: row for row in pq.read_table(tmp_path / "compared.parquet").to_pylist()}
    assert {"EK-FAC, all maps", "EK-FAC, MLP only", "K-FAC, all maps", "hidden-state cosine", "gradient cosine"} < set(
        compared
    )
    itself = next(row for name, row in compared.items() if name.startswith("CG"))
    assert itself["pearson"] == pytest.approx(1) and itself["query_seconds"] > 0
    refined = pq.read_table(tmp_path / "refined.parquet").to_pylist()
    assert {row["damping"] for row in refined} == {0.5, 1.0} and refined[0]["iteration"] == 0
    assert (tmp_path / "solvers.png").read_bytes().startswith(b"\x89PNG")
    said.clear()
    assert experiment().run() | {"machine": found["machine"]} == found and not said


def test_damping_is_a_multiple_of_each_maps_mean(problem: Problem) -> None:
    factors = problem.fit(problem.setting.documents).ekfac
    assert relative_damping(factors, 0.1) == {n: 0.1 * float(f.eigenvalues.double().mean()) for n, f in factors.items()}
