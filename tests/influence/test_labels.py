"""Sampled labels: the model's distribution, reproducible, the same whatever the batch."""

import models
import pipeline
import pytest
import reference
import torch

from msif_ray.corpus.windows import to_batch
from msif_ray.influence import loss
from msif_ray.influence.capture import Capture
from msif_ray.influence.labels import draw, window_uniforms


def test_labels_follow_the_models_distribution():
    probabilities = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).softmax(-1).expand(20_000, 5)
    found = draw(probabilities, window_uniforms(0, "s", "d", 0, 20_000))
    shares = torch.bincount(found, minlength=5) / 20_000
    assert (shares - probabilities[0]).abs().max() < 0.015  # five standard errors are 0.018


def test_edges_of_the_distribution():
    impossible = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    found = draw(impossible.expand(4, 5), torch.tensor([0.0, 0.499, 0.501, 1 - 1e-16]).double())
    assert found.tolist() == [1, 1, 3, 4]  # the last number rounds to 1: clamped to the vocabulary


@pytest.mark.parametrize("vocabulary", (5, 64, 65, 300, 320))
def test_labels_are_those_of_the_whole_cumulative_distribution(vocabulary, monkeypatch):
    monkeypatch.setitem(loss.LOGIT_ENTRIES, "cpu", 100 * vocabulary)
    count = 203
    logits = torch.randn(count, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniforms = window_uniforms(1, "s", "d", 0, count)
    cumulative = logits.softmax(1).cumsum(1)
    wanted = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(1)
    assert torch.equal(loss.differentiate_sampled(logits, uniforms)[1], wanted)


def test_uniforms_depend_on_seed_stage_document_and_window_alone():
    base = window_uniforms(0, "stage", "doc", 0, 9)
    assert torch.equal(base, window_uniforms(0, "stage", "doc", 0, 9))
    assert torch.equal(base[:5], window_uniforms(0, "stage", "doc", 0, 5))
    for other in ((1, "stage", "doc", 0), (0, "egats", "doc", 0), (0, "stage", "doc2", 0), (0, "stage", "doc", 1)):
        assert not (base == window_uniforms(*other, 9)).any()


@pytest.mark.parametrize("seed", range(3))
def test_a_padded_batch_draws_the_labels_of_batch_size_one(seed):
    rows = models.random_documents(seed, 8, words=(2, 14), completions=True)
    model = models.build_model("gpt_neox", seed)
    stage = reference.StageSpec("s", model, models.build_tokenizer(), rows, max_tokens=9, seed=seed)
    encoded, _ = pipeline.encode_rows(stage, rows)
    (windows,) = pipeline.batches(stage, encoded, pipeline.TOGETHER)
    batch = to_batch(windows)
    with Capture(model, {}) as capture:
        drawn = capture.run(batch, pipeline.uniforms(stage, batch)).labels
    positions = batch.predicts.nonzero()[:, 0]
    for row, window in enumerate(windows):
        key = (stage.seed, stage.name, window.key.document_id, window.key.window)
        expected = reference.sample_labels(model, list(window.ids), list(window.targets), *key)
        assert drawn[positions == row].tolist() == [label for label in expected if label != reference.MASKED]
