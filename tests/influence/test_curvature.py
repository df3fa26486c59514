"""Norms in the inverse curvature against the dense float64 reference, by either way to rotate a gradient."""

from dataclasses import replace

import models
import pipeline
import pytest
import reference
import torch

from msif_ray.influence import ekfac
from msif_ray.influence.curvature import CurvatureMetric, curvature_squares
from msif_ray.influence.ekfac import Basis

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
SHORT = [{"id": "one token", "text": "the"}]


@pytest.fixture(scope="module")
def case():
    """A stage of ragged texts in several windows with little damping, some documents, and their norms."""
    texts = models.random_documents(0, 24, words=(2, 26))
    model = models.build_model("gpt_neox", 0)  # with biases
    stage = reference.StageSpec("pretrain", model, models.build_tokenizer(), texts, max_tokens=12, damping=1e-3)
    documents = [*texts[:10], *SHORT]
    fitted = reference.fit(stage, reference.tracked_names(model))
    return stage, documents, reference.curvature_norms(stage, fitted, documents)


def error(found, wanted):
    assert found.keys() == wanted.keys()
    return max(abs(found[name] - wanted[name]) for name in wanted) / max(wanted.values())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vectors", (True, False, None))
def test_norms_of_documents_of_several_windows(case, dtype, vectors, monkeypatch):
    stage, documents, wanted = case
    factors = pipeline.fit(pipeline.in_dtype(stage, dtype), 60).factors
    assert any(len(reference.windows(stage.tokenizer, each, stage.max_tokens)) > 1 for each in documents)
    if vectors is not None:
        monkeypatch.setattr(ekfac, "rotates_vectors", lambda *_: vectors)
    found = pipeline.curvature_norms(pipeline.in_dtype(stage, dtype), factors, documents)
    assert error(found, wanted) < TOLERANCE[dtype]


def test_batching_padding_and_repeated_calls_change_nothing(case, monkeypatch):
    stage, documents, wanted = case
    factors = pipeline.fit(stage).factors
    kept = [tensor.clone() for f in factors.values() for tensor in (f.eigenvalues, *vars(f.basis).values())]
    for together in (pipeline.ALONE, 150, pipeline.TOGETHER):
        assert error(pipeline.curvature_norms(stage, factors, documents, together), wanted) < 1e-9
    monkeypatch.setitem(ekfac.GRADIENT_ENTRIES, "cpu", 300)  # a few rows at a time, or one
    assert error(pipeline.curvature_norms(stage, factors, documents), wanted) < 1e-9
    now = [tensor for f in factors.values() for tensor in (f.eigenvalues, *vars(f.basis).values())]
    assert all(torch.equal(one, other) for one, other in zip(kept, now, strict=True))


def test_with_much_damping_it_is_the_plain_norm(case):
    stage, documents, wanted = case
    names, plain = reference.tracked_names(stage.model), {}
    for document in documents:
        cut = reference.windows(stage.tokenizer, document, stage.max_tokens)
        gradients = [g for w in cut for g in reference.window_gradients(stage.model, names, *w).values()]
        if gradients:
            plain[document["id"]] = float(torch.cat([g.flatten() for g in gradients]).norm())
    stiff = replace(stage, damping=1e9, damping_relative=False)
    found = pipeline.curvature_norms(stiff, pipeline.fit(stage).factors, documents)
    assert error({name: norm * 1e9**0.5 for name, norm in found.items()}, plain) < 1e-6
    assert error({name: norm * wanted["doc-0"] / plain["doc-0"] for name, norm in plain.items()}, wanted) > 0.1


def test_a_map_without_a_position_has_no_part(case):
    """As an expert that none of a row's tokens is sent to."""
    metric = CurvatureMetric(Basis(torch.eye(4), torch.eye(3)), torch.ones(3, 4))
    assert metric.squared_norms(torch.zeros(2, 0, 3), torch.zeros(2, 0, 3), bias=True).tolist() == [0.0, 0.0]
    stage, documents, _ = case
    batch = pipeline.captures(stage, documents)[0]
    assert curvature_squares({}, batch).tolist() == [0.0] * len(batch.batch.keys)
