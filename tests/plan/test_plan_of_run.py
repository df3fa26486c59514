"""The plan of a small run against what the run then writes."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from test_plan import Description, description, plan, stored

from msif_ray.config import parse_run
from msif_ray.plan.make import Plan
from msif_ray.run import run

__all__ = ["description", "plan"]  # fixtures


@pytest.fixture(scope="module")
def finished(ray_cluster: None, description: Description, plan: Plan) -> Path:
    """The run folder after the run, which the plan was made before."""
    assert not Path(description["run_dir"]).exists()
    run(parse_run(description))
    return Path(description["run_dir"])


def entries_bytes(folder: Path) -> int:
    """Bytes of all tensors under a folder, without the files' headers and what is kept of each query."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = set(file.keys()) - {"ranks", "kept"}
            total += sum(file.get_tensor(name).nbytes for name in names)
    return total


def test_groups_are_those_of_the_run(plan: Plan, finished: Path) -> None:
    for groups in plan.groups:
        kept = json.loads((finished / "factors" / groups.stage / "groups.json").read_text())
        assert groups.passes == len(kept["groups"]) > 1
        assert groups.largest <= 40_000
    covariance = next(step for step in plan.steps if step.name == "pretrain: covariance")
    assert covariance.passes == plan.groups[0].passes


def test_bytes_of_factors_and_directions_are_those_on_disk(plan: Plan, finished: Path) -> None:
    for stage in ("pretrain", "tune"):
        assert stored(plan, f"factors of {stage}") == entries_bytes(finished / "factors" / stage)
        on_disk = entries_bytes(finished / "queries" / f"stage={stage}")
        assert stored(plan, f"query directions for {stage}") == on_disk


def test_bytes_of_parquet_are_those_on_disk(plan: Plan, finished: Path) -> None:
    for stage in ("pretrain", "tune"):
        parts = list((finished / "scores" / f"stage={stage}").glob("*.parquet"))
        assert sum(pq.read_metadata(part).num_rows for part in parts) > 0
        # In blocks of four documents a part's footer is most of it, and takes reasons for skips too.
        on_disk = sum(part.stat().st_size for part in parts)
        assert stored(plan, f"scores of {stage} (Parquet)") == pytest.approx(on_disk, rel=0.15)
