"""The package against the dense float64 reference: never a correlation, always the numbers.

Errors are relative to the largest magnitude of what is compared. Damping and alpha are 1/1000 of the mean
eigenvalue, so that the curvature, not the damping, decides the scores.
"""

from contextlib import nullcontext
from dataclasses import replace

import models
import pipeline
import pytest
import reference
import torch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
DTYPES = list(TOLERANCE)
KINDS = ("gpt_neox", "gpt2", "llama")
SMALL = {"strength": 1e-3, "damping": 1e-3}


def build_stages(kind, seed=0, count=24):
    """Three stages: ragged texts in several windows; masked prompts, sampled; masked prompts, empirical."""
    tokenizer = models.build_tokenizer()
    first = models.build_model(kind, seed)
    second = models.perturb(first, seed + 1)
    third = models.perturb(second, seed + 2)
    texts = models.random_documents(seed, count, words=(2, 26))
    answers = models.random_documents(seed + 1, count, words=(2, 10), completions=True)
    others = models.random_documents(seed + 2, count, words=(2, 12), completions=True)
    return [
        reference.StageSpec("pretrain", first, tokenizer, texts, max_tokens=12, seed=seed, **SMALL),
        reference.StageSpec("tune", second, tokenizer, answers, max_tokens=16, seed=seed, **SMALL),
        reference.StageSpec("align", third, tokenizer, others, labels="empirical", seed=seed, **SMALL),
    ]


QUERIES = models.random_documents(7, 3, words=(2, 9), completions=True, prefix="query")
SHORT = [{"id": "one token", "text": "the"}, {"id": "empty", "text": ""}]


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """(stages, names, reference fits), with llama's norms in float64."""
    with models.exact_norms() if request.param == "llama" else nullcontext():
        stages = build_stages(request.param)
        names = reference.tracked_names(stages[-1].model)
        yield stages, names, [reference.fit(stage, names) for stage in stages]


@pytest.fixture(scope="module")
def fits(case):
    """The package's fits of the same stages, per dtype.

    Most of a float32 score's error is the rounding of the covariances' products, which turns the eigenvectors;
    it grows with the positions per product, so batches are small.
    """
    stages = case[0]
    return {dtype: [pipeline.fit(pipeline.in_dtype(s, dtype), 60) for s in stages] for dtype in DTYPES}


def error(found, expected):
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def score_error(found, expected):
    """Largest relative errors of (scores, norms); pairs, token counts and skipped documents must be equal."""
    (pairs, skipped), (expected_pairs, expected_skipped) = found, expected
    assert pairs.keys() == expected_pairs.keys() and skipped.keys() == expected_skipped.keys()
    assert all(pairs[key][2] == expected_pairs[key][2] for key in pairs)
    columns = [([pairs[key][i] for key in pairs], [expected_pairs[key][i] for key in pairs]) for i in (0, 1)]
    return tuple(error(*column) for column in columns)


def package_scores(stages, factors, documents, scored=0, tokens_per_batch=150):
    carried = pipeline.carry(stages, factors, QUERIES, scored)
    return pipeline.score(pipeline.dense(carried), stages[scored], QUERIES, documents, tokens_per_batch)


def smallest_gap(dense):
    """Between neighbouring eigenvalues of A or S, relative to the largest: with a repeated one Λ is arbitrary."""
    values = [torch.linalg.eigvalsh(matrix) for matrix in (dense.A, dense.S)]
    return min(float(v.diff().min() / v[-1]) for v in values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_covariances_and_corrected_eigenvalues(case, fits, dtype, record_property):
    _, names, expected = case
    worst = {"A": 0.0, "S": 0.0, "eigenvalues": 0.0}
    for fitted, dense in zip(fits[dtype], expected, strict=True):
        assert list(fitted.factors) == names
        for name in names:
            assert smallest_gap(dense[name]) > 1e-12
            found = {
                "A": (fitted.covariances[f"A/{name}"], dense[name].A),
                "S": (fitted.covariances[f"S/{name}"], dense[name].S),
                "eigenvalues": (fitted.factors[name].eigenvalues, dense[name].Lambda),
            }
            worst |= {key: max(worst[key], error(*pair)) for key, pair in found.items()}
    for key, value in worst.items():
        record_property(f"{key} {dtype}", value)
    assert max(worst.values()) < TOLERANCE[dtype], worst


RESPONSES = {
    "three stages": ({}, 0, slice(0, 3)),
    "two stages": ({}, 0, slice(0, 2)),
    "later stage scored": ({}, 1, slice(0, 3)),
    "one stage": ({}, 0, slice(0, 1)),
    "last stage scored": ({}, 2, slice(0, 3)),
    "unrolled": ({"response": "unrolled", "rate": 0.01, "steps": 3}, 0, slice(0, 2)),
    "identity": ({"response": "identity"}, 0, slice(0, 2)),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_scores(case, fits, name, record_property):
    stages, names, expected = case
    changes, scored, part = RESPONSES[name]
    stages = [replace(stage, **changes) for stage in stages][part]
    documents = [*stages[scored].documents[:10], *(SHORT if scored == 0 else [])]
    dense = reference.scores(stages, QUERIES, documents, scored, names, expected[part])
    for dtype, tolerance in TOLERANCE.items():
        cast = [pipeline.in_dtype(stage, dtype) for stage in stages]
        found = package_scores(cast, [fitted.factors for fitted in fits[dtype][part]], documents, scored)
        scores, norms = score_error(found, dense)
        record_property(f"{name} {dtype}", scores)
        assert scores < tolerance and norms < tolerance, dtype
        if scored == 0:
            assert found[1] == {"one token": "fewer than two tokens", "empty": "text is empty"}


@pytest.mark.parametrize("seed", (11, 12, 13))
def test_two_stages_of_other_seeds(seed):
    stages = build_stages("gpt_neox", seed, count=18)[:2]
    names = reference.tracked_names(stages[-1].model)
    documents = stages[0].documents[:6]
    dense = reference.scores(stages, QUERIES, documents, 0, names)
    found = package_scores(stages, [pipeline.fit(stage, 90).factors for stage in stages], documents)
    assert max(score_error(found, dense)) < 1e-9


@pytest.mark.parametrize("tokens_per_batch", (pipeline.ALONE, 150, pipeline.TOGETHER))
def test_batching_and_padding_change_nothing(case, fits, tokens_per_batch):
    """Labels sampled at padding would leak into real positions through attention (DESIGN 2)."""
    stages, names, _ = case
    other = pipeline.fit(stages[1], tokens_per_batch)
    fitted = fits[torch.float64][1]
    for key, value in fitted.covariances.items():
        assert error(other.covariances[key], value) < 1e-12, key
    for name in names:
        assert error(other.factors[name].eigenvalues, fitted.factors[name].eigenvalues) < 1e-9, name
    factors = [fit.factors for fit in fits[torch.float64]]
    documents = stages[0].documents[:10]
    expected = package_scores(stages, factors, documents)
    assert max(score_error(package_scores(stages, factors, documents, 0, tokens_per_batch), expected)) < 1e-12


def test_repeated_calls_change_neither_factors_nor_scores(case, fits):
    stages = case[0]
    factors = [fit.factors for fit in fits[torch.float64]]
    tensors = [
        tensor
        for stage in factors
        for factor in stage.values()
        for tensor in (factor.eigenvalues, factor.basis.activations, factor.basis.gradients)
    ]
    before = [tensor.clone() for tensor in tensors]
    runs = [package_scores(stages, factors, stages[0].documents[:6]) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
    again = pipeline.fit(stages[1], 60)
    for key, value in fits[torch.float64][1].covariances.items():
        assert torch.equal(again.covariances[key], value)


def test_infinite_alpha_is_the_single_stage_score(case, fits):
    stages = case[0]
    factors = [fit.factors for fit in fits[torch.float64]]
    documents = stages[0].documents[:6]
    stiff = [stages[0], *(replace(stage, strength=1e12) for stage in stages[1:])]
    left_out = [stages[0], *(replace(stage, response="identity") for stage in stages[1:])]
    single = package_scores(left_out, factors, documents)
    assert score_error(package_scores(stiff, factors, documents), single)[0] < 1e-9
    assert score_error(package_scores(stages, factors, documents), single)[0] > 1e-2


def test_swapping_the_stages_factors_changes_the_score(case, fits):
    stages = case[0][:2]
    first, second = (fit.factors for fit in fits[torch.float64][:2])
    documents = stages[0].documents[:6]
    right = package_scores(stages, [first, second], documents)
    assert score_error(package_scores(stages, [second, first], documents), right)[0] > 1e-2


def test_documents_of_equal_length(case):
    stage = case[0][0]
    equal = replace(stage, documents=models.random_documents(3, 12, words=(9, 9)), max_tokens=None)
    together, alone = pipeline.fit(equal, pipeline.TOGETHER), pipeline.fit(equal, pipeline.ALONE)
    for key, value in alone.covariances.items():
        assert error(together.covariances[key], value) < 1e-12
