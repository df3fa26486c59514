"""The dense reference against truths more basic than itself: differences, enumerated labels, refitting."""

from __future__ import annotations

import itertools

import models
import pytest
import reference
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer()


def stage(kind="gpt_neox", seed=1, scale=0.0, **options):
    """A stage of a tiny model fitted on ragged documents, enough of them for A and S to be of full rank."""
    model = models.perturb(models.build_model(kind, seed, hidden=8, intermediate=12), seed + 1, scale)
    options = {"documents": models.random_documents(seed, 12), "name": f"stage{seed}"} | options
    return reference.StageSpec(model=model, tokenizer=models.build_tokenizer(), **options)


def test_windows_make_every_target_exactly_once(tokenizer):
    document = models.random_documents(3, 1, (17, 17))[0]
    ids = tokenizer(document["text"])["input_ids"]
    for max_tokens in (2, 3, 4, 5, 17, 18, 19):
        cut = reference.windows(tokenizer, document, max_tokens)
        predicted = [token for part, flags in cut for token, flag in zip(part, flags, strict=True) if flag]
        assert predicted == ids[1:]
        assert all(len(part) <= max_tokens and not flags[0] for part, flags in cut)


def test_a_prompt_is_masked_and_the_eos_is_a_target(tokenizer):
    document = {"id": 0, "prompt": "the king is", "completion": " old"}
    ids, flags = reference.tokenise(tokenizer, document)
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "Ġking", "Ġis", "Ġold", "<eos>"]
    assert flags == [False, False, False, True, True]
    assert reference.tokenise(tokenizer, document, append_eos=False)[1] == [False, False, False, True]
    with_bos = reference.tokenise(models.build_tokenizer(bos=True), document)[0]
    assert with_bos == [models.VOCABULARY.index("<bos>"), *ids]
    assert [part for part, _ in reference.windows(tokenizer, document, 3)] == [ids[2:5]]


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "stablelm", "opt", "llama"])
def test_window_gradients_equal_finite_differences_and_token_sums(kind, tokenizer):
    model = models.build_model(kind, 5)
    names = reference.tracked_names(model)
    document = {"id": 0, "prompt": "the king of the sea", "completion": " is a green house."}
    ids, flags = reference.tokenise(tokenizer, document)
    labels = reference.data_labels(ids, flags)
    with models.exact_norms():
        gradients = reference.window_gradients(model, names, ids, flags)
        for name, (a, g) in reference.token_vectors(model, names, ids, labels).items():
            torch.testing.assert_close(g.T @ a, gradients[name], rtol=1e-11, atol=1e-12)
        for name in names:
            module = model.get_submodule(name)
            weight = module.weight.data.T if kind == "gpt2" else module.weight.data
            parameters = [(weight[3, 2:3], (3, 2))]
            parameters += [] if module.bias is None else [(module.bias.data[3:4], (3, -1))]
            for entry, index in parameters:
                difference = torch.tensor(0.0, dtype=torch.float64)
                for step in (1e-5, -1e-5):
                    entry += step
                    with torch.no_grad():
                        difference += reference.summed_nll(model, ids, labels) / (2 * step)
                    entry -= step
                torch.testing.assert_close(difference, gradients[name][index], rtol=1e-6, atol=1e-8)


def logit_jacobian(model, name: str, ids: list[int], t: int) -> Tensor:
    """d logits of position t / d vec [W b] of a map with a bias, [V, o*(i+1)]."""
    module = model.get_submodule(name)
    rows = []
    for logit in model(input_ids=torch.tensor([ids])).logits[0, t]:
        weight, bias = torch.autograd.grad(logit, [module.weight, module.bias], retain_graph=True)
        rows.append(torch.cat([weight, bias[:, None]], dim=1).flatten())
    return torch.stack(rows)


def test_fisher_of_all_labels_is_the_gauss_newton_matrix():
    """E[vec G vec Gᵀ] over the model's labels = Σ_t J_tᵀ (diag p_t - p_t p_tᵀ) J_t; all label pairs."""
    model = models.build_model("gpt_neox", 2, vocab=6, hidden=4, intermediate=4, layers=1)
    name, ids = "gpt_neox.layers.0.attention.query_key_value", [1, 4, 3]
    probability = reference.log_probabilities(model, ids).exp().detach()
    fisher = 0
    for first, second in itertools.product(range(6), repeat=2):
        labels = [first, second, reference.MASKED]
        gradient = reference.window_gradients(model, [name], ids, [False, True, True], labels)[name].flatten()
        fisher += probability[0, first] * probability[1, second] * torch.outer(gradient, gradient)
    exact = 0
    for t in (0, 1):
        jacobian, p = logit_jacobian(model, name, ids, t), probability[t]
        exact += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    torch.testing.assert_close(fisher, exact, rtol=1e-10, atol=1e-12)
    assert exact.norm() > 1e-3


def test_labels_are_drawn_from_the_model_and_only_where_a_target_is_predicted():
    model = models.build_model("gpt_neox", 2, vocab=6, hidden=4, intermediate=4, layers=1)
    ids, flags = [1, 4, 3, 2], [False, False, True, True]
    draws = 600
    count = torch.zeros(4, 6)
    for document in range(draws):
        labels = reference.sample_labels(model, ids, flags, 0, "pretrain", str(document), 0)
        assert [label == reference.MASKED for label in labels] == [True, False, False, True]
        for t in (1, 2):
            count[t, labels[t]] += 1
    probability = reference.log_probabilities(model, ids).exp().detach()[1:3]
    chi_square = (count[1:3] - draws * probability) ** 2 / (draws * probability)
    assert chi_square.sum() < 30  # 10 degrees of freedom: exceeded once in a thousand
    keys = itertools.product((0, 1), ("a", "b"), ("x", "y"), (0, 1))
    long = [1, 2, 3, 4] * 8
    drawn = {tuple(reference.sample_labels(model, long, [t > 0 for t in range(32)], *key)) for key in keys}
    assert len(drawn) == 16


def test_fit_diagonalises_its_factors_and_is_the_best_diagonal_in_their_basis():
    """Λ is the diagonal of (Q_S ⊗ Q_A)ᵀ F (Q_S ⊗ Q_A), F = (1/N) Σ vec G vec Gᵀ, so H has the trace of F."""
    fitted_stage = stage(max_tokens=9)
    names = reference.tracked_names(fitted_stage.model)[:2]
    fitted = reference.fit(fitted_stage, names)
    fisher = {name: 0 for name in names}
    documents = reference.labelled_windows(fitted_stage)
    for ids, flags, labels in itertools.chain(*documents):
        for name, g in reference.window_gradients(fitted_stage.model, names, ids, flags, labels).items():
            fisher[name] += torch.outer(g.flatten(), g.flatten()) / len(documents)
    for name, own in fitted.items():
        basis = torch.kron(own.QS, own.QA)
        diagonal = (basis.T @ fisher[name] @ basis).diagonal()
        torch.testing.assert_close(own.Lambda.flatten(), diagonal, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(own.hessian().trace(), fisher[name].trace())
        for matrix, q in ((own.A, own.QA), (own.S, own.QS)):
            rotated = q.T @ matrix @ q
            assert (rotated - rotated.diagonal().diag()).norm() < 1e-12 * matrix.norm()
        gradient = torch.randn(own.Lambda.shape, dtype=torch.float64)
        applied = own.QS @ (own.Lambda * (own.QS.T @ gradient @ own.QA)) @ own.QA.T
        torch.testing.assert_close(own.hessian() @ gradient.flatten(), applied.flatten())


def quadratic(seed: int, n: int = 5) -> tuple[Tensor, Tensor]:
    """A positive definite H [n, n] and vectors V [n, 2]."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return root @ root.T / n + 0.1 * torch.eye(n), torch.randn(n, 2, generator=generator, dtype=torch.float64)


def test_responses_are_functions_of_the_eigenvalues():
    hessian, vectors = quadratic(1)
    values, basis = torch.linalg.eigh(hessian)
    expected = {
        "damped": 1 / (values + 0.3),
        "proximal": 0.3 / (values + 0.3),
        "unrolled": torch.exp(-0.7 * values),
        "scored_unrolled": -torch.expm1(-0.7 * values) / values,
        "identity": torch.ones(5),
    }
    for kind, filtered in expected.items():
        found = reference.respond(hessian, kind, vectors, strength=0.3, time=0.7)
        torch.testing.assert_close(found, basis @ (filtered[:, None] * (basis.T @ vectors)))
    assert torch.allclose(reference.respond(0 * hessian, "scored_unrolled", vectors, time=0.7), 0.7 * vectors)


def test_later_stages_responses_are_what_training_does_to_the_starting_point():
    """theta_2 of a quadratic stage moves with theta_1 as proximal (exactly) and unrolled (to O(rate)) say."""
    hessian, vectors = quadratic(2)
    optimum, alpha = torch.ones(5, dtype=torch.float64), 0.4
    eye = torch.eye(5, dtype=torch.float64)

    def proximal(start: Tensor) -> Tensor:
        return torch.linalg.solve(hessian + alpha * eye, hessian @ optimum + alpha * start)

    def descent(start: Tensor, rate: float = 1e-4, steps: int = 5000) -> Tensor:
        for _ in range(steps):
            start = start - rate * hessian @ (start - optimum)
        return start

    v = vectors[:, :1]
    for train, kind, tolerance in ((proximal, "proximal", 1e-9), (descent, "unrolled", 3e-4)):
        moved = train(v[:, 0]) - train(0 * v[:, 0])
        predicted = reference.respond(hessian, kind, v, strength=alpha, time=0.5)[:, 0]
        torch.testing.assert_close(moved, predicted, rtol=tolerance, atol=tolerance)


def test_two_stage_score_predicts_leaving_a_document_out():
    """Ridge regression, then a proximal stage: d log-likelihood / d weight of z in the mean loss = score."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(40, generator=generator, dtype=torch.float64)
    eye, ridge, alpha = torch.eye(4, dtype=torch.float64), 0.05, 0.3
    tuned, target = quadratic(4, 4)[0], torch.ones(4, dtype=torch.float64)
    query = torch.tensor([1.0, -2.0, 0.5, 1.0], dtype=torch.float64)

    def train(weights: Tensor) -> tuple[Tensor, Tensor]:
        """argmin Σ w (x·θ - y)²/2 + ridge |θ|²/2, then the proximal stage; (theta_1, theta_2)."""
        one = torch.linalg.solve((x.T * weights) @ x + ridge * eye, (x.T * weights) @ y)
        return one, torch.linalg.solve(tuned + alpha * eye, tuned @ target + alpha * one)

    def log_likelihood(weights: Tensor) -> Tensor:
        return -((query @ train(weights)[1] - 0.3) ** 2) / 2

    uniform = torch.full((40,), 1 / 40, dtype=torch.float64)
    one, two = train(uniform)
    carried = reference.respond(tuned, "proximal", ((query @ two - 0.3) * query)[:, None], alpha)
    carried = reference.respond(x.T @ x / 40, "damped", carried, ridge)[:, 0]
    score = (x @ one - y) * (x @ carried)
    for z in (0, 7, 21):
        step = 1e-5 * torch.eye(40, dtype=torch.float64)[z]
        slope = (log_likelihood(uniform + step) - log_likelihood(uniform - step)) / 2e-5
        torch.testing.assert_close(slope, score[z], rtol=1e-6, atol=1e-9)
        removed = log_likelihood(uniform - uniform[z] * 1e5 * step) - log_likelihood(uniform)
        torch.testing.assert_close(removed, -score[z] / 40, rtol=0.5, atol=2e-4)


def test_scores_of_stages_limits_order_and_skips():
    """Alpha to infinity is the single-stage score; swapped factors change it; a document supports itself."""
    documents = [*models.random_documents(9, 3), {"id": "short", "text": "a"}, {"id": "none", "text": ""}]
    queries = models.random_documents(8, 2, (3, 6), completions=True, prefix="q")
    first, last = stage(max_tokens=8, damping=0.01), stage(seed=4, scale=0.1, strength=1e9)
    names = reference.tracked_names(first.model)
    fits = [reference.fit(s, names) for s in (first, last)]
    far, skipped = reference.scores([first, last], queries, documents, 0, names, fits)
    assert skipped == {"short": "fewer than two tokens", "none": "fewer than two tokens"}
    last.response = "identity"
    single, _ = reference.scores([first, last], queries, documents, 0, names, fits)
    last.response, last.strength = "proximal", 0.1
    near, _ = reference.scores([first, last], queries, documents, 0, names, fits)
    swapped, _ = reference.scores([first, last], queries, documents, 0, names, fits[::-1])
    assert len(far) == 6
    for pair in far:
        assert far[pair][0] == pytest.approx(single[pair][0], rel=1e-6)
        assert abs(near[pair][0] / single[pair][0] - 1) > 1e-3
        assert abs(near[pair][0] / swapped[pair][0] - 1) > 1e-3
    itself, _ = reference.scores([last], queries, queries, 0, names, fits[1:])
    for query in queries:
        assert itself[query["id"], query["id"]][0] > 0
