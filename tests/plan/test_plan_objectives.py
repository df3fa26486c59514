"""The plan of stages with other objectives: their documents as they are read, their steps, and their calibration."""

from pathlib import Path

import pytest
from cluster.objective_runs import BAD, LABELLED, NO_PAIRS, PAIRED, classifying, preferring

from msif_ray.config import parse_run
from msif_ray.plan.make import make_plan


def test_texts_with_classes_are_counted_whole(tmp_path: Path) -> None:
    plan = make_plan(parse_run(classifying(tmp_path, "run")), measured=False)
    corpora = {corpus.name: corpus for corpus in plan.corpora}
    tune = corpora["tune, scored"]
    assert (tune.documents, tune.skipped) == (len(LABELLED) + len(BAD), len(BAD))
    assert tune.tokens == sum(len(text["text"].split()) + 1 for text in LABELLED)
    assert not any("reference" in step.name for step in plan.steps)


def test_pairs_are_two_sequences_that_a_reference_model_reads_once(tmp_path: Path) -> None:
    plan = make_plan(parse_run(preferring(tmp_path, "run")), measured=False)
    corpora = {corpus.name: corpus for corpus in plan.corpora}
    prefer = corpora["prefer, fitted"]
    assert (prefer.documents, prefer.skipped) == (len(PAIRED) + len(NO_PAIRS), len(NO_PAIRS))
    words = [pair[key].split() for pair in PAIRED for key in ("prompt", "prompt", "chosen", "rejected")]
    # A full stop for each of them, and two ends.
    assert prefer.tokens == sum(len(each) + 1 for each in words) + 2 * len(PAIRED)
    first = plan.steps[0]
    assert [step.name for step in plan.steps if "reference" in step.name] == [first.name] == ["prefer: reference model"]
    assert (first.documents, first.tokens, first.passes) == (prefer.documents, prefer.tokens, 1)
    covariance = next(step for step in plan.steps if step.name == "prefer: covariance")
    assert 0 < first.flops < covariance.flops / 2


@pytest.mark.long
@pytest.mark.parametrize("make", [classifying, preferring])
def test_a_stage_with_an_objective_is_calibrated(tmp_path: Path, make: object) -> None:
    description = make(tmp_path, "run")  # type: ignore[operator]
    last = description["stages"][-1]
    last["solver"] = {"kind": "cg", "iterations": 2}
    description["index"] = [{"stage": last["name"]}]
    plan = make_plan(parse_run(description))
    assert all(step.hours is not None and step.hours > 0 for step in plan.steps)
    assert any("conjugate gradients" in step.name for step in plan.steps)
