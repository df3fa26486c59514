"""Scores and norms of all traced methods against dense float64 references, on a tiny random pair of models."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import models
import numpy as np
import pytest
import reference
import torch
from influence import pipeline

from msif_ray.demo.factbook import Document
from msif_ray.demo.questions import Question
from msif_ray.errors import UserError
from msif_ray.influence.labels import batch_uniforms
from msif_ray.influence.modules import find_linear_maps
from msif_ray.validate import fact_report, tracing
from msif_ray.validate.fact_settings import FactSetting
from msif_ray.validate.fact_tracing import FactTracing, packed, unpacked
from msif_ray.validate.recording import Recording
from msif_ray.validate.setting import CONTEXT

DOCUMENTS = models.random_documents(1, 9, (3, 12), prefix="base")
ASKED = models.random_documents(2, 5, (3, 6), completions=True, prefix="asked")
QUERIES = models.random_documents(3, 3, (3, 6), completions=True, prefix="query")
FITTED = 7
DAMPINGS, ALPHA = (0.1, 0.001), 0.5


@pytest.fixture(scope="module")
def stages() -> list[reference.StageSpec]:
    model = models.build_model("gpt_neox", seed=4, hidden=8, intermediate=12, layers=1)
    tuned = models.perturb(model, seed=5)
    tokenizer = models.build_tokenizer()
    first = reference.StageSpec("stage 0", model, tokenizer, DOCUMENTS[:FITTED])
    return [
        first,
        reference.StageSpec("stage 1", tuned, tokenizer, ASKED),
        reference.StageSpec("stage 1", tuned, tokenizer, DOCUMENTS[:FITTED]),
    ]


@pytest.fixture(scope="module")
def passes(stages: list[reference.StageSpec], tmp_path_factory: pytest.TempPathFactory) -> tracing.Passes:
    folder = tmp_path_factory.mktemp("passes")
    maps = find_linear_maps(stages[0].model)

    def recorded(name: str, stage: int, rows: Sequence[dict[str, str]], drawn: bool = False) -> Recording:
        single = pipeline.in_dtype(stages[stage], torch.float32)
        recording = Recording(folder / name, maps, pipeline.encode_rows(single, rows)[0], tokens_per_batch=40)
        uniforms = partial(batch_uniforms, 0, f"stage {stage}") if drawn else None
        recording.make(lambda: copy.deepcopy(single.model), uniforms)
        return recording

    return tracing.Passes(
        documents=(recorded("documents-0", 0, DOCUMENTS), recorded("documents-1", 1, DOCUMENTS)),
        queries=(recorded("queries-0", 0, QUERIES), recorded("queries-1", 1, QUERIES)),
        fitted=(
            recorded("fitted-0", 0, DOCUMENTS[:FITTED], drawn=True),
            recorded("fitted-1", 1, DOCUMENTS[:FITTED], drawn=True),
        ),
        finetuning=recorded("finetuning-1", 1, ASKED, drawn=True),
    )


@pytest.fixture(scope="module")
def traced(passes: tracing.Passes) -> tracing.Traced:
    parts = [packed(tracing.trace(name, passes, DAMPINGS, ALPHA)) for name in passes.documents[0].maps]
    return unpacked({key: sum((part[key] for part in parts), torch.zeros(())) for key in parts[0]})


@pytest.fixture(scope="module")
def fits(stages: list[reference.StageSpec]) -> list[dict[str, reference.Fit]]:
    return [reference.fit(stage, reference.tracked_names(stage.model)) for stage in stages]


def close(found: torch.Tensor, wanted: np.ndarray, tolerance: float = 2e-3) -> bool:
    return float(np.abs(found.numpy() - wanted).max()) < tolerance * float(np.abs(wanted).max())


def dense_scores(stages: list[reference.StageSpec], fits: list[dict[str, reference.Fit]]) -> np.ndarray:
    found, _ = reference.scores(stages, QUERIES, DOCUMENTS, fits=fits)
    return np.array([[found[query["id"], document["id"]][0] for document in DOCUMENTS] for query in QUERIES])


def changed(stage: reference.StageSpec, **fields: object) -> reference.StageSpec:
    found = copy.copy(stage)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize("damping", DAMPINGS)
def test_scores_are_those_of_the_dense_reference(
    stages: list[reference.StageSpec], fits: list[dict[str, reference.Fit]], traced: tracing.Traced, damping: float
) -> None:
    first, later, second = (changed(stage, damping=damping, strength=ALPHA) for stage in stages)
    left_out = changed(later, response="identity")
    wanted = {
        tracing.PROXIMAL: dense_scores([first, later], fits[:2]),
        tracing.FIRST: dense_scores([first, left_out], fits[:2]),
        tracing.FIRST_OWN: dense_scores([first], fits[:1]),
        tracing.SECOND: dense_scores([second], fits[2:]),
    }
    for method, scores in wanted.items():
        assert close(traced.scores[method, damping], scores), method


def test_the_dot_product_meets_the_documents_before_fine_tuning(
    stages: list[reference.StageSpec], fits: list[dict[str, reference.Fit]], traced: tracing.Traced
) -> None:
    plain = [changed(stages[0], scored_response="identity"), changed(stages[1], response="identity")]
    assert close(traced.scores[tracing.DOT_PRODUCT, 0.0], dense_scores(plain, fits[:2]))


def test_the_unrolled_filter_has_the_time_of_one_over_alpha(
    stages: list[reference.StageSpec], fits: list[dict[str, reference.Fit]], passes: tracing.Passes
) -> None:
    name = list(passes.documents[0].maps)[1]
    mean = float(fits[1][name].Lambda.mean())
    later = changed(stages[1], response="unrolled", rate=1 / (ALPHA * mean), steps=1)
    first = changed(stages[0], damping=0.1)
    of_map = [{name: fit[name]} for fit in fits[:2]]
    found, _ = reference.scores([first, later], QUERIES, DOCUMENTS, names=[name], fits=of_map)
    wanted = np.array([[found[query["id"], document["id"]][0] for document in DOCUMENTS] for query in QUERIES])
    assert close(tracing.trace(name, passes, (0.1,), ALPHA).scores[tracing.UNROLLED, 0.1], wanted)


@pytest.mark.parametrize("stage", [0, 1])
def test_norms_are_those_of_the_dense_inverse(
    stages: list[reference.StageSpec], fits: list[dict[str, reference.Fit]], traced: tracing.Traced, stage: int
) -> None:
    spec, fitted = (stages[0], fits[0]) if stage == 0 else (stages[2], fits[2])
    for damping in DAMPINGS:
        wanted = {tracing.FROBENIUS: [], tracing.INVERSE: [], tracing.STEP: []}
        for document in DOCUMENTS:
            window = reference.tokenise(spec.tokenizer, document)
            gradients = reference.window_gradients(spec.model, list(fitted), *window)
            squares = dict.fromkeys(wanted, 0.0)
            for name, gradient in gradients.items():
                hessian, vector = fitted[name].hessian(), gradient.flatten()
                damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
                solved = torch.linalg.solve(damped, vector)
                squares[tracing.FROBENIUS] += float(vector @ vector)
                squares[tracing.INVERSE] += float(vector @ solved)
                squares[tracing.STEP] += float(solved @ solved)
            for norm, value in squares.items():
                wanted[norm].append(value)
        for norm, values in wanted.items():
            found = traced.squares[stage, norm, 0.0 if norm == tracing.FROBENIUS else damping]
            assert np.allclose(found.numpy(), values, rtol=5e-3), (norm, damping)


@pytest.fixture
def experiment(stages: list[reference.StageSpec], tmp_path: Path) -> FactTracing:
    folders = (tmp_path / "first", tmp_path / "tuned")
    for folder, stage in zip(folders, stages[:2], strict=True):
        models.save(stage.model, stage.tokenizer, folder, torch.float32)
    documents = [
        Document(id=f"d{n}", text=row["text"], country="x", field="", states="") for n, row in enumerate(DOCUMENTS)
    ]
    asked = [Question(**row, country="x", relation="capital") for row in QUERIES]
    setting = FactSetting(documents, asked, asked, folders, ["*.mlp.*"], 5, {})
    return FactTracing(setting, tmp_path / "facts", 0, DAMPINGS, ALPHA, 40, lambda line: None)


def test_a_folder_holds_one_setting(experiment: FactTracing) -> None:
    experiment.check()
    first = experiment.traced().scores
    replace(experiment).check()
    assert all(torch.equal(value, first[key]) for key, value in replace(experiment).traced().scores.items())
    setting = experiment.setting
    others = {
        "alpha 0.5, not 2.0": replace(experiment, alpha=2.0),
        "seed 0, not 5": replace(experiment, seed=5),
        r"dampings \[0.1, 0.001\], not \[1.0\]": replace(experiment, dampings=(1.0,)),
        "tokens_per_batch 40, not 2048": replace(experiment, tokens_per_batch=2048),
        "documents": replace(experiment, setting=replace(setting, documents=setting.documents[1:])),
        "queries": replace(experiment, setting=replace(setting, queries=setting.queries[1:])),
        "models": replace(experiment, setting=replace(setting, models=setting.models[::-1])),
        "fitted 5, not 4": replace(experiment, setting=replace(setting, fitted=4)),
    }
    for what, other in others.items():
        with pytest.raises(UserError, match=f"--folder: .*{what}.*; give another folder"):
            fact_report.results(other)


def test_a_recording_is_made_once_and_refuses_long_documents(passes: tracing.Passes) -> None:
    def never() -> None:
        raise AssertionError("recorded again")

    passes.documents[0].make(never)  # type: ignore[arg-type]
    long = pipeline.Encoded("long", (1,) * (CONTEXT + 1), (False, *(True,) * CONTEXT))
    with pytest.raises(ValueError, match=str(CONTEXT)):
        Recording(passes.documents[0].folder, passes.documents[0].maps, [long], 40)
