"""What a run would refuse when it starts, and no description has in itself, is a note of its plan."""

from pathlib import Path
from typing import Any

import pytest
from cluster import runs

from msif_ray.config import parse_run
from msif_ray.plan.make import make_plan
from msif_ray.preflight import check
from msif_ray.record import keep_record


def notes(description: dict[str, Any]) -> list[str]:
    return [note for note in make_plan(parse_run(description), measured=False).notes if "would stop" in note]


def test_a_run_dir_of_another_run(tmp_path: Path) -> None:
    description = runs.two_stages(tmp_path, "run")
    keep_record(check(parse_run(description)), print)
    assert notes(description) == []
    (note,) = notes(description | {"seed": 99})
    assert "run.json: this directory holds another run: seed was 3 and is 99; name a new run_dir" in note
    Path(description["run_dir"], "scores").mkdir()
    Path(description["run_dir"], "run.json").unlink()
    (note,) = notes(description)
    assert "has scores but no run.json" in note


def test_replicas_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    description = runs.two_stages(tmp_path, "run", replicas=3)
    (note,) = notes(description)
    assert "On this machine" in note and "cluster.replicas.min: 3 replicas need 3 cores" in note
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # it may grow
    assert notes(description) == []
