"""kill -9 of the driver, of replicas and of a task that writes vectors, in the middle of a solve."""

import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from cluster import chaos, runs

from msif_ray import layout
from msif_ray.store import load_tensors

pytestmark = [pytest.mark.long, pytest.mark.timeout(2000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("solver_kills")


def started(folder: Path, name: str, machines: chaos.Machines) -> chaos.Job:
    """A run of one stage, solved in blocks of three documents, the three queries together."""
    found = runs.two_stages(folder, f"{name}/run", replicas={"min": 1, "max": 2}, documents_per_block=3)
    found["stages"][0]["solver"] = {"kind": "cg", "iterations": 12, "tolerance": 1e-6}
    found["stages"][0]["damping"] = {"relative": 1.0}
    found["stages"][1]["response"] = {"kind": "identity"}
    found["score"] = [{"stage": "pretrain"}]
    (folder / name).mkdir()
    job = chaos.Job(found, folder / name, machines.cluster.address, seconds_per_block=0.15)
    job.start()
    return job


@pytest.fixture(scope="module")
def undisturbed(folder: Path, machines: chaos.Machines) -> chaos.Job:
    job = started(folder, "undisturbed", machines)
    job.finish(seconds=800)
    return job


def directions(job: chaos.Job) -> dict[str, dict[str, Any]]:
    found = layout.directions(job.description["run_dir"], "pretrain")
    tensors = {path.name: load_tensors(path) for path in sorted(Path(found).rglob("*.safetensors"))}
    assert tensors
    return tensors


def residuals(job: chaos.Job) -> dict[tuple[str, int], float]:
    folder = layout.directions(job.description["run_dir"], "pretrain")
    rows = pq.read_table(layout.residuals_file(folder)).to_pylist()
    found = {(row["query_id"], row["iteration"]): row["relative_residual"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_solve_that_is_killed_again_and_again_gives_the_same_directions(
    folder: Path, machines: chaos.Machines, undisturbed: chaos.Job
) -> None:
    job = started(folder, "killed", machines)
    plan = [
        chaos.Kill("pretrain:ProductJob:0", 1, 0.05, "driver"),
        chaos.Kill("pretrain:ProductJob:1", 2, 0.05, "replica"),
        chaos.Kill("pretrain:ProductJob:3", 2, 0.05, "driver"),
        chaos.Kill("iterate", 40, 0.05, "rank"),
        chaos.Kill("iterate", 50, 0.05, "driver"),
        chaos.Kill("pretrain:ProductJob:8", 1, 0.05, "node"),
    ]
    killer = chaos.Killer(job, machines, plan, random.Random(0))
    job.finish(killer, seconds=1100)

    for kill in plan:
        print(f"killed a {kill.kind} in {kill.step}, in the middle of {kill.hit}")
    assert sum(kill.hit is not None for kill in plan) >= len(plan) - 1
    assert any(kill.hit for kill in plan if kill.kind == "driver")
    found, wanted = directions(job), directions(undisturbed)
    assert found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        for key, tensor in tensors.items():
            scale = float(tensor.double().abs().max())
            assert float((found[name][key].double() - tensor.double()).abs().max()) <= 1e-6 * scale, (name, key)
    again, before = residuals(job), residuals(undisturbed)
    assert again.keys() == before.keys()
    assert all(again[key] == pytest.approx(before[key], rel=1e-4) for key in before)
    times = chaos.computed(job.events())
    products = {unit: count for unit, count in times.items() if "ProductJob" in unit[0]}
    assert products and max(products.values()) <= 2
