"""Stages with another objective than a language model's, against their dense float64 reference."""

from dataclasses import dataclass, replace
from typing import Any

import models
import pipeline
import pytest
import reference
import reference_objectives
import torch

from msif_ray.corpus.objectives import Classes
from msif_ray.corpus.windows import to_batch
from msif_ray.influence.capture import Capture
from msif_ray.influence.gauss_newton import ProductSums
from msif_ray.influence.labels import batch_uniforms
from msif_ray.influence.modules import find_linear_maps

SMALL = {"strength": 1e-3, "damping": 1e-3, "seed": 3}
CLASSES = Classes(("no", "maybe", "yes"))
TEXTS = models.random_documents(1, 12, words=(2, 20))
LABELLED = models.random_texts(2, 14)
ASKED = models.random_texts(5, 2, (3, 9))


@dataclass
class Classified(reference_objectives.Classified):
    """With what the package is told of it."""

    objective: Any = CLASSES


def classified(kind: str, **config: Any) -> list[reference.StageSpec]:
    """A language model, and one moved away from it that classifies."""
    first, tokenizer = models.build_model(kind, 0), models.build_tokenizer()
    tuned = models.classifier(models.perturb(first, 1), 2, **config)
    return [
        reference.StageSpec("pretrain", first, tokenizer, TEXTS, max_tokens=12, **SMALL),
        Classified("classify", tuned, tokenizer, LABELLED, **SMALL),
    ]


def largest_error(stages: list[reference.StageSpec], queries: Any, documents: Any, scored: int) -> float:
    """Of scores and of norms, relative to the largest."""
    factors = [pipeline.fit(stage, 90).factors for stage in stages]
    carried = pipeline.dense(pipeline.carry(stages, factors, queries, scored))
    found, _ = pipeline.score(carried, stages[scored], queries, documents, 150)
    expected = reference_objectives.scores(stages, queries, documents, scored)
    assert found.keys() == expected.keys()
    assert all(found[pair][2] == expected[pair][2] for pair in found)
    return max(
        max(abs(found[pair][i] - expected[pair][i]) for pair in found) / max(abs(each[i]) for each in expected.values())
        for i in (0, 1)
    )


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "stablelm", "opt"])
@pytest.mark.parametrize("scored", [0, 1])
def test_a_classifying_stage_equals_the_dense_reference(kind: str, scored: int) -> None:
    stages = classified(kind)
    assert largest_error(stages, ASKED, stages[scored].documents[:6], scored) < 1e-8


def test_labels_of_the_data_equal_the_dense_reference() -> None:
    first, second = classified("gpt_neox")
    assert largest_error([first, replace(second, labels="empirical")], ASKED, TEXTS[:4], 0) < 1e-8


@pytest.mark.parametrize("padding", [None, 0, models.VOCABULARY.index(".")])
def test_a_padded_batch_equals_each_text_alone(padding: int | None) -> None:
    """Also where no padding token is configured, and where the texts themselves end with it."""
    _, stage = classified("gpt_neox", pad_token_id=padding)
    encoded, _ = pipeline.encode_rows(stage, LABELLED)
    windows = [next(text.windows(64)) for text in encoded]
    assert any(text.ids[-1] == padding for text in encoded) == (padding == models.VOCABULARY.index("."))
    with Capture(stage.model, find_linear_maps(stage.model)) as capture:
        for _ in range(2):
            together = capture.run(to_batch(windows))
    assert stage.model.config.pad_token_id == padding
    for row, text in enumerate(LABELLED):
        expected = reference_objectives.gradient(
            stage, list(together.maps), loss := reference_objectives.loss(stage, text)
        )
        assert float(together.losses[row]) == pytest.approx(loss.item(), rel=1e-10)
        for name, gradient in expected.items():
            found = together.gradients(name)[row].T @ together.activations(name)[row]
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-10)


def test_sampled_classes_follow_the_model_and_not_the_batch() -> None:
    _, stage = classified("gpt_neox")
    encoded, _ = pipeline.encode_rows(stage, models.random_texts(9, 600, (1, 3)))
    windows = [next(text.windows(64)) for text in encoded]
    batch = to_batch(windows)
    with Capture(stage.model, find_linear_maps(stage.model)) as capture:
        drawn = capture.run(batch, batch_uniforms(3, "classify", batch)).labels
        alone = to_batch(windows[7:8])
        assert int(capture.run(alone, batch_uniforms(3, "classify", alone)).labels) == int(drawn[7])
    with torch.no_grad():
        chances = torch.stack(
            [reference_objectives.log_classes(stage, text).exp() for text in models.random_texts(9, 600, (1, 3))]
        )
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    assert (shares - chances.mean(0)).abs().max() < 3 * 0.5 / 600**0.5


def test_the_gauss_newton_product_of_a_classifier() -> None:
    _, stage = classified("gpt_neox")
    stage = replace(stage, documents=LABELLED[:5])
    maps = find_linear_maps(stage.model)
    encoded, _ = pipeline.encode_rows(stage, stage.documents)
    generator = torch.Generator().manual_seed(0)
    vectors = {
        name: torch.randn(2, *each.shape, generator=generator, dtype=torch.float64) for name, each in maps.items()
    }
    sums = ProductSums(vectors)
    with Capture(stage.model, maps) as capture:
        for windows in pipeline.batches(stage, encoded, 30):
            losses = sums.add(capture, to_batch(windows))
            assert len(losses) == len(windows) and bool((losses > 0).all())
    dense = reference_objectives.gauss_newton(stage, list(maps))
    flat = torch.cat([vectors[name].flatten(1) for name in maps], dim=1)
    found = torch.cat([sums.sums[name].flatten(1) for name in maps], dim=1) / 5
    torch.testing.assert_close(found, flat @ dense, rtol=1e-9, atol=1e-9 * float(found.abs().max()))
