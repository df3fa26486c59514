"""A run of many queries whose directions do not fit in the memory that a rank may use: the plain run's scores."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pyarrow.parquet as pq
import pytest
from cluster import runs

from msif_ray import layout
from msif_ray.config import parse_run
from msif_ray.run import run
from msif_ray.store import read_json

pytestmark = pytest.mark.usefixtures("ray_cluster")
QUERIES = 80


def describe(folder: Path, run_dir: str, **cluster: Any) -> dict[str, Any]:
    """Many queries, no factors to be fitted, two entries that share a pass."""
    description = runs.two_stages(folder, run_dir, **cluster)
    for stage in description["stages"]:
        stage["response"] = {"kind": "identity"}
    queries = models.random_documents(3, QUERIES, (2, 4), completions=True, prefix="query")
    path = runs.write_lines(folder / "queries.jsonl", queries)
    description["queries"] = {"path": path, "id": "id", "energy": 0.9}
    description["score"] = [{"stage": "pretrain"}, {"stage": "pretrain", "name": "again"}]
    description["top"] = 2
    return description


@pytest.mark.timeout(900)
def test_a_little_memory_and_no_norms_give_the_same_scores(tmp_path: Path) -> None:
    found: list[dict[runs.Pair, tuple[float, float, int]]] = []
    tops = []
    for run_dir, memory in (("plain", {}), ("little", {"directions_memory": "60KiB"})):
        description = describe(tmp_path, run_dir, **memory)
        description["detail"] = {"norm": run_dir == "plain"}
        run(parse_run(description))
        found.append(runs.read_scores(description["run_dir"], "pretrain"))
        tops.append(pq.read_table(f"{description['run_dir']}/top.parquet").to_pylist())
        assert runs.read_scores(description["run_dir"], "again") == found[-1]
    assert len(found[0]) == QUERIES * 14
    assert {norm for _, norm, _ in found[1].values()} == {None} == {row["norm"] for row in tops[1]}
    with_norms = {pair: (score, found[0][pair][1], tokens) for pair, (score, _, tokens) in found[1].items()}
    assert runs.largest_error(with_norms, found[0]) < runs.FLOAT32

    folder = layout.directions(description["run_dir"], "pretrain")
    manifest = read_json(layout.directions_manifest(folder))
    assert len(manifest["shards"]) > 10
    stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert stored > 10 * 60 * 1024
    partials = list(layout.query_partials(description["run_dir"]).glob("*/manifest.json"))
    assert {len(read_json(path)["blocks"]) for path in partials} == {1} and len(partials) == QUERIES // 8

    assert len(tops[0]) == 2 * QUERIES * 2 * 2  # entries, queries, sides, k
    for plain, little in zip(*tops, strict=True):
        assert (plain["query_id"], plain["side"], plain["rank"]) == (little["query_id"], little["side"], little["rank"])
        assert sum(little["token_scores"]) == pytest.approx(little["score"], rel=1e-4, abs=1e-5)


@pytest.mark.long
def test_peaks_stay_within_the_budgets(tmp_path: Path) -> None:
    """In a process of its own: the peak of memory is the process's. Libraries print there, too."""
    command = [sys.executable, str(Path(__file__).parent / "peaks.py"), str(tmp_path)]
    result = subprocess.run(command, check=True, timeout=280, stdout=subprocess.PIPE, text=True)
    for step, (allowed, found, whole) in json.loads(result.stdout.splitlines()[-1]).items():
        print(f"{step}: {found / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f}, of a whole {whole / 2**20:.0f} MiB")
        assert found <= allowed < whole / 3, step
