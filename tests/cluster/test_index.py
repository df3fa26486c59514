"""An index on a real local Ray cluster: built, resumed, and scored from with other queries."""

from pathlib import Path
from typing import Any

import models
import pyarrow.parquet as pq
import pytest
import torch
from cluster import runs

from msif_ray.config import parse_run
from msif_ray.plan.make import make_plan
from msif_ray.run import run
from msif_ray.store import load_tensors, read_json

pytestmark = pytest.mark.usefixtures("ray_cluster")
OTHERS = models.random_documents(8, 4, (2, 8), completions=True, prefix="other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def indexing(folder: Path) -> dict[str, Any]:
    """Full rank, in several passes."""
    description = runs.two_stages(folder, "index", factor_memory=90_000)
    description["stages"][0]["fit"]["documents"] = 12
    return description | {"index": [{"stage": "pretrain", "rank": 64, "dtype": "float64"}]}


@pytest.fixture(scope="module")
def built(folder: Path) -> Path:
    description = indexing(folder)
    run(parse_run(description), until="index")
    return Path(description["run_dir"])


def blocks(built: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in built.glob("index/stage=pretrain/*/block-*.safetensors")}


def gradients(path: Path) -> dict[str, torch.Tensor]:
    """What a file of an index stands for, by map: Σ_k g_k a_kᵀ of each document."""
    tensors = load_tensors(path)
    names = [key.removeprefix("scales/") for key in tensors if key.startswith("scales/")]
    return {
        name: torch.einsum(
            "dko,dkc,dk->doc", tensors[f"gradients/{name}"], tensors[f"activations/{name}"], tensors[f"scales/{name}"]
        )
        for name in names
    }


def modules(run_dir: str, stage: str) -> dict[tuple[str, str], tuple[list[float], float, int]]:
    """Every pair's scores by map, and the other columns."""
    rows = pq.read_table(Path(run_dir) / "scores" / f"stage={stage}", partitioning=None).to_pylist()
    return {(row["query_id"], row["doc_id"]): (row["module_scores"], row["norm"], row["n_tokens"]) for row in rows}


def test_an_index_takes_no_more_than_it_needs_and_says_what_was_fitted(built: Path) -> None:
    assert sorted(path.name for path in (built / "factors").iterdir()) == ["pretrain"]
    assert not (built / "queries").exists() and not (built / "scores").exists()
    about = read_json(built / "run.json")["index"]["pretrain"]
    usable = [row["text"] for row in runs.BASE if row["text"] and row["id"] != "short"]
    assert (about["rank"], about["dtype"], about["documents"]) == (64, "float64", len(usable))
    assert about["tokens"] == sum(len(text.split()) + 1 for text in usable)
    assert about["bytes"] == sum(path.stat().st_size for path in blocks(built))
    fitted = read_json(built / "factors" / "pretrain" / "manifest.json")
    assert fitted["share_covered"] == 12 / len(runs.BASE)
    means = fitted["maps"]
    assert about["damping"] == {name: pytest.approx(0.001 * each["mean_eigenvalue"]) for name, each in means.items()}
    groups = read_json(built / "index" / "stage=pretrain" / "manifest.json")["groups"]
    assert len(groups) > 1 and [name for group in groups for name in group] == list(means)
    assert len(blocks(built)) == 4 * len(groups)


@pytest.mark.long
def test_it_takes_the_bytes_that_are_planned(folder: Path, built: Path) -> None:
    """Every document has one token at least, so at rank 1 what it takes at most is what it takes."""
    description = runs.two_stages(folder, "small", factor_memory=90_000)
    description["stages"][0]["factors"] = str(built)
    description["index"] = [{"stage": "pretrain", "rank": 1, "dtype": "int8"}]
    plan = make_plan(parse_run(description), measured=False)
    run(parse_run(description), until="index")
    files = Path(description["run_dir"], "index").rglob("*.safetensors")
    found = sum(tensor.nbytes for path in files for tensor in load_tensors(path).values())
    assert found == next(each.bytes for each in plan.stored if each.name == "index of pretrain, at most")


def test_only_what_is_missing_is_built_again(folder: Path, built: Path) -> None:
    before = blocks(built)
    run(parse_run(indexing(folder)), until="index")
    assert blocks(built) == before
    lost = sorted(before)[1]
    content = gradients(lost)
    lost.unlink()
    run(parse_run(indexing(folder)), until="index")
    after = blocks(built)
    assert {path for path in before if before[path] != after[path]} == {lost}
    torch.testing.assert_close(gradients(lost), content, rtol=1e-10, atol=1e-12)


def test_new_queries_are_scored_from_it_without_its_documents(folder: Path, built: Path) -> None:
    description = runs.two_stages(folder, "asking", documents_per_block=3)
    description["queries"]["path"] = runs.write_lines(folder / "others.jsonl", OTHERS)
    description["stages"][0]["factors"] = str(built)
    description["stages"][0]["damping"] = {"relative": 0.01}  # not the index's
    from_index = {"stage": "pretrain", "index": str(built)}
    other = {"tune": {"kind": "identity"}}
    description["score"] = [
        {"stage": "pretrain"},
        from_index | {"name": "indexed"},
        {"stage": "pretrain", "name": "single", "responses": other},
        from_index | {"name": "single-indexed", "responses": other},
    ]
    description["detail"] = {"modules": True}
    run(parse_run(description))
    run_dir = description["run_dir"]
    for exact, indexed in (("pretrain", "indexed"), ("single", "single-indexed")):
        found = runs.read_scores(run_dir, indexed)
        assert runs.largest_error(found, runs.read_scores(run_dir, exact)) < runs.FLOAT32
        assert runs.largest_error(modules(run_dir, indexed), modules(run_dir, exact)) < runs.FLOAT32
    parts = sorted((Path(run_dir) / "scores" / "stage=indexed").glob("part-*"))
    assert len(parts) == 4  # of the index's blocks
    schemas = [pq.read_schema(part) for part in (parts[0], next(Path(run_dir).glob("scores/stage=pretrain/part-*")))]
    assert schemas[0].equals(schemas[1], check_metadata=False)
    assert schemas[0].metadata[b"index"] == str(built / "index" / "stage=pretrain").encode()
    assert (schemas[0].metadata[b"index_rank"], schemas[0].metadata[b"index_dtype"]) == (b"64", b"float64")
    assert b"index" not in schemas[1].metadata
    assert read_json(Path(run_dir) / "run.json")["identity"]["indexes"]["score.1"]["rank"] == 64
    skipped = pq.read_table(f"{run_dir}/skipped.parquet").to_pylist()
    assert {row["doc_id"] for row in skipped if row["stage"] == "indexed"} == {"short", "null"}
    top = pq.read_table(f"{run_dir}/top.parquet").to_pylist()
    for row in (row for row in top if row["stage"] == "indexed"):
        assert sum(row["token_scores"]) == pytest.approx(row["score"], rel=1e-4, abs=1e-6)


def test_a_run_may_build_its_own(folder: Path, built: Path) -> None:
    description = runs.two_stages(folder, "own")
    description["stages"][0]["factors"] = str(built)
    description["stages"][1]["response"] = {"kind": "identity"}
    description["index"] = [{"stage": "pretrain", "rank": 4}]
    description["score"] = [{"stage": "pretrain", "index": description["run_dir"]}]
    run(parse_run(description), until="score")
    run(parse_run(description), until="score")
    assert len(runs.read_scores(description["run_dir"], "pretrain")) == 3 * 14
