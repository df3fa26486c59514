"""Corpora of which nothing can be used: refused where a stage needs them and that is certain, else a note."""

from pathlib import Path
from typing import Any

import pytest
from cluster import runs

from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.plan import tokens
from msif_ray.plan.make import make_plan

ROWS = [{"id": "short", "text": "the"}, *({"id": f"null-{number}", "text": None} for number in range(5))]
NOTHING = "none of its {} documents can be used, most often because: text is null."


def fitting_nothing(folder: Path) -> dict[str, Any]:
    """A run of which the first stage's documents are of no use."""
    description = runs.two_stages(folder, "run") | {"score": [{"stage": "pretrain"}]}
    description["stages"][0]["documents"] = nothing(folder)
    return description


def nothing(folder: Path) -> dict[str, Any]:
    return {"path": runs.write_lines(folder / "nothing.jsonl", ROWS), "text": "text", "id": "id"}


def test_a_stage_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        make_plan(parse_run(fitting_nothing(tmp_path)), measured=False)
    assert str(error.value) == (
        f"stages.0.documents.path: {tmp_path / 'nothing.jsonl'}: no document of stage 'pretrain' can be used: 6 were "
        "skipped, most often because: text is null; name other documents or columns"
    )


def test_of_a_sample_it_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "COUNTED", 3)
    plan = make_plan(parse_run(fitting_nothing(tmp_path)), measured=False)
    noted = NOTHING.format("3 sampled")
    assert plan.notes[:2] == [f"pretrain, fitted: {noted}", f"pretrain, scored: {noted}"]


@pytest.mark.parametrize("measured", [False, pytest.param(True, marks=pytest.mark.long)])
def test_nothing_to_score_is_a_note(tmp_path: Path, measured: bool) -> None:
    score = [{"stage": "pretrain", "documents": nothing(tmp_path)}, {"stage": "tune"}]
    plan = make_plan(parse_run(runs.two_stages(tmp_path, "run") | {"score": score}), measured)
    assert plan.notes[0] == f"pretrain, scored: {NOTHING.format(6)}"
    assert sum("can be used" in note for note in plan.notes) == 1
    steps = {step.name: step for step in plan.steps}
    assert (steps["pretrain: scores"].hours, steps["pretrain: top documents"].hours) == (0.0, 0.0)
    assert all(step.hours is not None for step in plan.steps) == measured
