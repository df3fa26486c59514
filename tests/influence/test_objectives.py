"""Stages with another objective than a language model's, against their dense float64 reference."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import families
import models
import pipeline
import pytest
import reference
import reference_objectives
import torch
from objective_stages import (
    ASKED,
    CLASSES,
    LABELLED,
    MEANS,
    PAIRED,
    PAIRS,
    QUERIES,
    SMALL,
    TEXTS,
    Classified,
    Preferred,
    classified,
    normalised,
    preferring,
    referred,
    told,
)
from transformers import AutoConfig, AutoModelForSequenceClassification

from msif_ray.cluster.references import ReferenceJob
from msif_ray.corpus.preferences import Pairs
from msif_ray.corpus.windows import to_batch
from msif_ray.errors import UserError
from msif_ray.influence.capture import Capture
from msif_ray.influence.gauss_newton import ProductSums
from msif_ray.influence.labels import batch_uniforms
from msif_ray.influence.modules import find_linear_maps
from msif_ray.influence.padded import check_padding


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


def texts_apart(stage: reference.StageSpec) -> float:
    """The largest relative error of a text's gradient in a padded batch, of that of the text alone by autograd."""
    encoded, _ = pipeline.encode_rows(stage, stage.documents)
    with Capture(stage.model, find_linear_maps(stage.model)) as capture:
        captured = [capture.run(to_batch(windows)) for windows in pipeline.batches(stage, encoded, 10**6)]
    loose, texts = replace(stage, model=families.loosened(stage.model)), {each["id"]: each for each in stage.documents}
    worst = 0.0
    for together, row in ((each, row) for each in captured for row in range(len(each.losses))):
        loss = reference_objectives.loss(loose, texts[together.batch.keys[row].document_id])
        for name, gradient in reference_objectives.gradient(loose, list(together.maps), loss).items():
            found = together.gradients(name)[row].T @ together.activations(name)[row]
            largest = gradient.abs().max().clamp_min(1e-6)  # zero where attention sees one token
            worst = max(worst, float((found - gradient).abs().max() / largest))
    return worst


CLASSIFYING = [family for family in families.FAMILIES if family not in ("olmoe", "llama4")]  # transformers has none


@pytest.mark.parametrize("family", CLASSIFYING)
def test_families_classify_over_the_maps_of_their_language_models(family: str) -> None:
    base = families.build(family, 0)
    made = models.classifier(base, 2, attention="eager")
    assert find_linear_maps(made) == find_linear_maps(base)
    with families.Exact():
        assert texts_apart(Classified("c", made, models.build_tokenizer(), LABELLED[:6], **SMALL)) < 1e-7


def test_an_encoder_is_read_where_it_says() -> None:
    sizes = families.SIZES | {"vocab_size": len(models.VOCABULARY), "num_labels": 3, "pad_token_id": 3}
    made = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **sizes))
    stage = Classified("c", models.randomise(made, 0), models.build_tokenizer(), LABELLED[:6], **SMALL)
    assert texts_apart(stage) < 1e-7


def encoder(kind: str, **changes: Any) -> Any:
    sizes = {
        "vocab_size": len(models.VOCABULARY),
        "num_labels": 3,
        "pad_token_id": 3,
        "emb_dim": 8,
        "embedding_size": 8,
    }
    config = AutoConfig.for_model(kind, **(sizes | families.SIZES | {"n_layers": 2, "n_heads": 2} | changes))
    return models.randomise(AutoModelForSequenceClassification.from_config(config), 0)


MIXING = [("xlm", {"summary_type": "last"}), ("flaubert", {"summary_type": "mean"}), ("convbert", {}), ("fnet", {})]


@pytest.mark.parametrize(("kind", "changes"), MIXING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_classifier_that_padding_reaches_is_refused(kind: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=r"^objective: some \(.*\) reads a text in a padded batch otherwise than alone"):
        check_padding(encoder(kind, **changes).to(dtype), "some")


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2", "xlm", "flaubert", "albert", "modernbert"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_that_it_does_not_reach_is_taken(kind: str, dtype: torch.dtype) -> None:
    check_padding(encoder(kind).to(dtype), "some")


@pytest.mark.parametrize("padding", [None, 0, 5])
@pytest.mark.parametrize("kind", models.KINDS)
def test_so_is_a_decoder_with_or_without_a_padding_token(kind: str, padding: int | None) -> None:
    made = models.classifier(models.build_model(kind, 0), 1, pad_token_id=padding)
    check_padding(made, "some")
    assert made.config.pad_token_id == padding


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


@pytest.mark.parametrize("make", [classified, preferring, normalised])
def test_gauss_newton_products(make: Callable[[str], list[reference.StageSpec]]) -> None:
    stage = make("gpt_neox")[-1]
    stage = replace(stage, documents=stage.documents[:5])
    maps = find_linear_maps(stage.model)
    encoded, _ = pipeline.encode_rows(stage, stage.documents)
    generator = torch.Generator().manual_seed(0)
    options: Any = {"generator": generator, "dtype": torch.float64}
    vectors = {name: torch.randn(2, *each.shape, **options) for name, each in maps.items()}
    sums = ProductSums(vectors)
    with Capture(stage.model, maps) as capture:
        for windows in pipeline.batches(stage, encoded, 60):
            losses = sums.add(capture, to_batch(windows))
            assert len(losses) == len(windows) and bool((losses > 0).all())
    dense = reference_objectives.gauss_newton(stage, list(maps))
    flat = torch.cat([vectors[name].flatten(1) for name in maps], dim=1)
    found = torch.cat([sums.sums[name].flatten(1) for name in maps], dim=1) / 5
    torch.testing.assert_close(found, flat @ dense, rtol=1e-9, atol=1e-9 * float(found.abs().max()))


SCORED = [("gpt_neox", 0), ("gpt_neox", 1), ("gpt_neox", 2), ("gpt2", 0), ("stablelm", 2), ("opt", 0), ("opt", 2)]
SCORED_MEANS = [("gpt_neox", 0), ("gpt_neox", 2), ("gpt2", 2), ("opt", 0)]
OF_PAIRS = [pytest.param(PAIRS, id="sums"), pytest.param(MEANS, id="means")]


@pytest.mark.parametrize(
    ("pairs", "kind", "scored"),
    [*((PAIRS, *each) for each in SCORED), *((MEANS, *each) for each in SCORED_MEANS)],
)
def test_a_stage_of_preferences_equals_the_dense_reference(pairs: Pairs, kind: str, scored: int) -> None:
    stages = preferring(kind, pairs)
    assert largest_error(stages, QUERIES, stages[scored].documents[:6], scored) < 1e-8


@pytest.mark.parametrize("pairs", OF_PAIRS)
def test_preferences_of_the_data_equal_the_dense_reference(pairs: Pairs) -> None:
    *before, last = preferring("gpt_neox", pairs)
    assert largest_error([*before, replace(last, labels="empirical")], QUERIES, TEXTS[:4], 0) < 1e-8


@pytest.mark.parametrize("pairs", OF_PAIRS)
def test_pairs_in_one_padded_batch_equal_each_alone(pairs: Pairs) -> None:
    stage = preferring("gpt_neox", pairs)[-1]
    encoded, _ = pipeline.encode_rows(stage, stage.documents)
    windows = [next(pair.windows(64)) for pair in encoded]
    assert len({window.width for window in windows}) > 3 and any(w.width > len(w.ids) for w in windows)
    with Capture(stage.model, find_linear_maps(stage.model)) as capture:
        for _ in range(2):
            together = capture.run(to_batch(windows))
    for row, pair in enumerate(stage.documents):
        loss = reference_objectives.loss(stage, pair)
        assert float(together.losses[row]) == pytest.approx(loss.item(), rel=1e-10)
        for name, gradient in reference_objectives.gradient(stage, list(together.maps), loss).items():
            found = together.gradients(name)[row].T @ together.activations(name)[row]
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("pairs", OF_PAIRS)
def test_sampled_preferences_follow_the_margin_and_not_the_batch(pairs: Pairs) -> None:
    stage = preferring("gpt_neox", pairs)[-1]
    documents = [referred(stage, pair) for pair in models.random_pairs(9, 300, (2, 6))]
    encoded, _ = pipeline.encode_rows(stage, documents)
    windows = [next(pair.windows(64)) for pair in encoded]
    batch = to_batch(windows)
    with Capture(stage.model, find_linear_maps(stage.model)) as capture:
        drawn = capture.run(batch, batch_uniforms(3, "prefer", batch)).labels
        alone = to_batch(windows[7:8])
        assert int(capture.run(alone, batch_uniforms(3, "prefer", alone)).labels) == int(drawn[7])
    with torch.no_grad():
        chances = torch.stack([reference_objectives.margin(stage, pair).sigmoid() for pair in documents])
    for likely in (chances > 0.6, chances < 0.4):  # of which the other's share is 0.2 off at least
        share, count = float((drawn[likely] == 0).double().mean()), int(likely.sum())
        assert count > 60 and abs(share - float(chances[likely].mean())) < 3 * 0.5 / count**0.5


def test_a_pair_without_its_reference_has_no_finite_loss() -> None:
    stage = preferring("gpt_neox")[-1]
    encoded, _ = pipeline.encode_rows(stage, PAIRED[:1])
    with Capture(stage.model, find_linear_maps(stage.model)) as capture:
        assert capture.run(to_batch(list(encoded[0].windows(64)))).losses.isnan().all()


@pytest.mark.parametrize("pairs", OF_PAIRS)
def test_without_a_backward_pass_the_sequences_of_a_pair_apart_give_the_reference(pairs: Pairs) -> None:
    stage = preferring("gpt_neox", pairs)[-1]
    apart = replace(stage, objective=replace(pairs, apart=True))
    encoded, _ = pipeline.encode_rows(apart, PAIRED)
    windows = [window for pair in encoded for window in pair.windows(64)]
    found = dict.fromkeys((pair["id"] for pair in PAIRED), 0.0)
    work = ReferenceJob(pairs.length_normalised).start([], torch.device("cpu"))
    with Capture(stage.reference_model, {}) as capture:
        work.add(capture.run(to_batch(windows)))
    for document, sequence, loss in work.take():
        found[document] += loss if sequence else -loss
    assert found == pytest.approx({pair["id"]: pair["reference"] for pair in stage.documents}, rel=1e-10)


def sharing(stage: reference.StageSpec) -> reference.StageSpec:
    """Its second layer's MLP is the first one's, which is used twice in a pass."""
    model = copy.deepcopy(stage.model)
    model.gpt_neox.layers[1].mlp = model.gpt_neox.layers[0].mlp
    return replace(stage, model=model)


@pytest.mark.parametrize("make", [classified, preferring, normalised])
def test_a_layer_that_is_used_twice(make: Callable[[str], list[reference.StageSpec]]) -> None:
    stage = sharing(make("gpt_neox")[-1])
    names = ["gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.layers.0.mlp.dense_4h_to_h"]
    found, expected = pipeline.fit(stage, 90), reference_objectives.fit(stage, names)
    for name in names:
        torch.testing.assert_close(found.covariances[f"A/{name}"], expected[name].A, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.covariances[f"S/{name}"], expected[name].S, rtol=1e-9, atol=1e-10)
        found_mean, mean = found.factors[name].mean_eigenvalue, float(expected[name].Lambda.mean())
        assert found_mean == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("objective", [CLASSES, PAIRS, MEANS])
def test_experts_of_a_mixture(objective: Any) -> None:
    base = families.build("mixtral", 0)
    options = {"tokenizer": models.build_tokenizer(), **SMALL}
    if objective is CLASSES:
        stage: Any = Classified("classify", models.classifier(base, 2), documents=LABELLED[:6], **options)
    else:
        before = families.loosened(models.perturb(base, 1))
        stage = Preferred("prefer", base, documents=[], reference_model=before, **told(objective), **options)
        with families.Exact():
            stage = replace(stage, documents=[referred(stage, pair) for pair in PAIRED[:6]])
    encoded, _ = pipeline.encode_rows(stage, stage.documents)
    windows = [next(each.windows(64)) for each in encoded]
    loose = replace(stage, model=families.loosened(stage.model))
    with families.Exact():
        with Capture(stage.model, find_linear_maps(stage.model)) as capture:
            together = capture.run(to_batch(windows))
        for row, document in enumerate(stage.documents):
            loss = reference_objectives.loss(loose, document)
            for name, gradient in reference_objectives.gradient(loose, list(together.maps), loss).items():
                found = together.gradients(name)[row].T @ together.activations(name)[row]
                torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-9)
