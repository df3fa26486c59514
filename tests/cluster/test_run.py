"""Whole runs on a real local Ray cluster against the dense reference."""

import json
import math
import time
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from cluster import runs
from results.finished import page_data

from msif_ray.cluster import pool
from msif_ray.cluster.metrics import GAUGES, publish
from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.progress import Snapshot
from msif_ray.run import run
from msif_ray.store import read_json

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def told() -> list[Snapshot]:
    """What the metrics were told of the run below."""
    return []


@pytest.fixture(scope="module")
def one_process(folder: Path, told: list[Snapshot]) -> str:
    def tell(now: Snapshot) -> None:
        told.append(now)
        publish(now)

    description = runs.two_stages(folder, "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msif_ray.run.publish", tell)
        run(parse_run(description))
    return str(description["run_dir"])


@pytest.mark.parametrize(("stage", "scored"), [("pretrain", 0), ("tune", 1)])
def test_scores_equal_the_dense_reference(folder: Path, one_process: str, stage: str, scored: int) -> None:
    found = runs.read_scores(one_process, stage)
    assert runs.largest_error(found, runs.expected(folder, scored)) < runs.FLOAT32


def test_bad_documents_are_skipped_with_a_reason(one_process: str) -> None:
    skipped = {row["doc_id"]: row["reason"] for row in pq.read_table(f"{one_process}/skipped.parquet").to_pylist()}
    assert skipped == {"short": "fewer than two tokens", "null": "text is null"}


def test_top_documents_have_token_scores_that_sum_to_the_score(one_process: str) -> None:
    rows = pq.read_table(f"{one_process}/top.parquet").to_pylist()
    scores = runs.read_scores(one_process, "pretrain")
    assert len(rows) == 2 * 3 * 2 * 4  # stages, queries, sides, k
    for row in rows:
        assert len(row["tokens"]) == len(row["token_scores"]) == row["n_tokens"]
        assert sum(row["token_scores"]) == pytest.approx(row["score"], rel=1e-4, abs=1e-6)
        assert sum(row["module_scores"]) == pytest.approx(row["score"], rel=1e-4, abs=1e-6)
    first = [row for row in rows if row["stage"] == "pretrain" and row["query_id"] == "query-0" and row["rank"] == 1]
    by_side = {row["side"]: row["score"] for row in first}
    of_query = [score for (query, _), (score, _, _) in scores.items() if query == "query-0"]
    assert by_side == {"highest": max(of_query), "lowest": min(of_query)}


def test_every_table_with_scores_says_their_unit_and_sign(one_process: str) -> None:
    of_scores = {"score", "mean", "net"}
    found = set()
    for path in Path(one_process).rglob("*.parquet"):
        schema = pq.read_schema(path)
        if of_scores & set(schema.names):
            assert {b"unit", b"sign"} <= schema.metadata.keys(), path
            found.add(path.stem.partition("-")[0])
    assert found == {"part", "top", "statistics", "stages"}


def test_the_report_is_there_and_holds_the_top_documents(one_process: str) -> None:
    page = (Path(one_process) / "report.html").read_text(encoding="utf-8")
    data = page_data(page)
    assert [each["label"] for each in data["scored"]] == ["pretrain", "tune"]
    assert [query["id"] for query in data["queries"]] == ["query-0", "query-1", "query-2"]
    assert all(query["tokens"] > 1 and query["log_likelihood"] < 0 for query in data["queries"])
    scores = runs.read_scores(one_process, "pretrain")
    for query, found in zip(data["queries"], data["scored"][0]["queries"], strict=True):
        own = [score for (name, _), (score, _, _) in scores.items() if name == query["id"]]
        assert found["documents"] == len(own) == 14 and sum(found["histogram"]) == 14
        first = found["supports"][0]
        assert first["score"] == pytest.approx(max(own), rel=1e-5)
        assert first["share"] == pytest.approx(max(own) / sum(map(abs, own)), rel=1e-4)
    assert "14 of 16" in page and "Few documents for the factors of pretrain" in page


def test_progress_is_at_rays_metrics_port(one_process: str, told: list[Snapshot]) -> None:
    """Which its dashboard and Prometheus read."""
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    last = [now for now in told if now.name == "pretrain: scores"][-1]
    of_step: list[str] = []
    for _ in range(120):
        publish(last)  # anew, since Ray forgets what it was not told for two of its intervals (conftest.py)
        with urllib.request.urlopen(url, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        of_step = [line for line in lines if line.startswith("ray_msif") and 'step="pretrain: scores"' in line]
        if len(of_step) == len(GAUGES):
            break
        time.sleep(0.5)
    values = {line.partition("{")[0].removeprefix("ray_"): float(line.rpartition(" ")[2]) for line in of_step}
    assert values["msif_documents"] == 14 and values["msif_documents_skipped"] == 2
    assert values["msif_tokens_per_second"] > 0 and values["msif_replicas"] == 1


def test_run_json_says_what_changes_a_score(one_process: str) -> None:
    record = read_json(Path(one_process) / "run.json")
    assert record["identity"]["run"]["stages"][0]["damping"] == {"absolute": None, "relative": 0.001}
    assert len(record["identity"]["models"]["pretrain"]["sha256"]) == 64
    strengths = record["strengths"]["pretrain"]
    assert set(strengths) == {"pretrain.damping", "tune.alpha"}
    assert all(value > 0 for value in strengths["pretrain.damping"].values())


@pytest.fixture(scope="module")
def two_replicas(folder: Path) -> str:
    """The same run on two replicas, with the shares of every score and norms in the inverse curvature. The responses
    are the entries', and the stage's own is one without damping."""
    description = runs.two_stages(folder, "replicas", replicas=2)
    own = {"tune": description["stages"][1].pop("response")}
    description["stages"][1]["response"] = {"kind": "identity"}
    description["score"] = [entry | {"responses": own} for entry in description["score"]]
    run(parse_run(description | {"detail": {"tokens": True, "modules": True, "curvature_norm": True}}))
    return str(description["run_dir"])


@pytest.mark.parametrize("stage", ["pretrain", "tune"])
def test_two_replicas_give_the_same_scores(two_replicas: str, one_process: str, stage: str) -> None:
    found = runs.read_scores(two_replicas, stage)
    assert runs.largest_error(found, runs.read_scores(one_process, stage)) < 1e-5


@pytest.mark.parametrize(("stage", "scored"), [("pretrain", 0), ("tune", 1)])
def test_shares_equal_the_dense_reference_and_sum_to_the_score(
    folder: Path, two_replicas: str, stage: str, scored: int
) -> None:
    wanted = runs.expected_shares(folder, scored)
    path = Path(two_replicas) / "scores" / f"stage={stage}"
    rows = pq.read_table(path, partitioning=None).to_pylist()
    names = json.loads(pq.read_schema(next(path.glob("*.parquet"))).metadata[b"modules"])
    assert {(row["query_id"], row["doc_id"]) for row in rows} == wanted.keys()
    close = runs.FLOAT32 * max(abs(share) for by_map, _ in wanted.values() for share in by_map.values())
    for row in rows:
        by_map, by_token = wanted[row["query_id"], row["doc_id"]]
        assert dict(zip(names, row["module_scores"], strict=True)) == pytest.approx(by_map, abs=close)
        assert row["token_scores"] == pytest.approx(by_token, abs=close)
        for shares in (row["module_scores"], row["token_scores"]):
            assert math.fsum(shares) == pytest.approx(row["score"], abs=runs.FLOAT32 * sum(map(abs, shares)))
    detail = read_json(Path(two_replicas) / "run.json")["identity"]["run"]["detail"]
    assert detail == {"tokens": True, "modules": True, "curvature_norm": True, "normalised": False}


@pytest.mark.parametrize(("stage", "scored"), [("pretrain", 0), ("tune", 1)])
def test_curvature_norms_equal_the_dense_reference(folder: Path, two_replicas: str, stage: str, scored: int) -> None:
    found, wanted = runs.read_curvature_norms(two_replicas, stage), runs.expected_curvature_norms(folder, scored)
    assert found == pytest.approx(wanted, rel=runs.FLOAT32)
    assert "(H + c)^-1" in read_json(Path(two_replicas) / "run.json")["meaning"]["curvature_norm"]


def test_shares_of_top_documents_are_those_of_the_scores(one_process: str, two_replicas: str) -> None:
    scores = pq.read_table(Path(two_replicas) / "scores").to_pylist()
    all_rows = {(row["stage"], row["query_id"], row["doc_id"]): row for row in scores}
    for row in pq.read_table(f"{one_process}/top.parquet").to_pylist():
        full = all_rows[row["stage"], row["query_id"], row["doc_id"]]
        for shares in ("token_scores", "module_scores"):
            assert row[shares] == pytest.approx(full[shares], rel=1e-5, abs=1e-5)
        assert "".join(row["tokens"]).removesuffix("<eos>") == row["text"]


def test_two_ranks_that_shard_the_weights_give_the_same_scores(folder: Path, one_process: str) -> None:
    # All matrices are sharded (runs.start_cluster), and the later stage's response is proximal.
    description = runs.two_stages(folder, "ranks", ranks_per_replica=2)
    description["score"] = [{"stage": "pretrain"}]
    description["detail"] = {"curvature_norm": True}
    run(parse_run(description), until="score")
    found = runs.read_scores(description["run_dir"], "pretrain")
    assert runs.largest_error(found, runs.read_scores(one_process, "pretrain")) < 1e-5
    norms = runs.read_curvature_norms(description["run_dir"], "pretrain")
    assert norms == pytest.approx(runs.expected_curvature_norms(folder, 0), rel=1e-5)


def test_a_finished_run_is_not_run_again_and_asks_for_no_machine(
    one_process: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written() -> dict[str, int]:
        kinds = ("*.safetensors", "part-*.parquet", "top.parquet")
        files = [path for kind in kinds for path in Path(one_process).rglob(kind)]
        return {str(path): path.stat().st_mtime_ns for path in files}

    asked: list[object] = []
    monkeypatch.setattr(pool.ReplicaPool, "_spawn", lambda self: asked.append(self))
    before = written()
    left_over = Path(one_process) / "factors" / "tune" / "partials" / "0000"
    left_over.mkdir(parents=True)  # as by a driver that died between the manifest and its last deletion
    run(parse_run(runs.two_stages(folder, "one")))
    assert written() == before and f"{one_process}/top.parquet" in before
    assert not asked and not left_over.parent.exists()


def test_another_k_is_another_top(one_process: str, folder: Path) -> None:
    run(parse_run(runs.two_stages(folder, "one") | {"top": 2}))
    assert max(row["rank"] for row in pq.read_table(f"{one_process}/top.parquet").to_pylist()) == 2


def test_a_lost_part_is_scored_again_and_only_that(one_process: str, folder: Path) -> None:
    before = runs.read_scores(one_process, "pretrain")
    parts = sorted((Path(one_process) / "scores" / "stage=pretrain").glob("part-*"))
    times = {part: part.stat().st_mtime_ns for part in parts[1:]}
    parts[0].unlink()
    run(parse_run(runs.two_stages(folder, "one")), until="score")
    assert runs.read_scores(one_process, "pretrain") == before
    assert {part: part.stat().st_mtime_ns for part in parts[1:]} == times


def test_another_run_in_the_same_directory_is_refused(folder: Path, one_process: str) -> None:
    description = runs.two_stages(folder, "one")
    description["stages"][0]["damping"] = {"relative": 0.5}
    with pytest.raises(UserError, match=r"stages\.0\.damping\.relative was 0\.001 and is 0\.5"):
        run(parse_run(description))


def test_factors_are_reused_and_responses_compared_in_one_pass(folder: Path, one_process: str) -> None:
    description = runs.two_stages(folder, "reused")
    own = {"kind": "proximal", "alpha": {"relative": 0.01}}
    description["score"] = [
        {"stage": "pretrain"},
        {"stage": "pretrain", "name": "own", "responses": {"tune": own}},
        {"stage": "pretrain", "name": "single", "responses": {"tune": {"kind": "identity"}}},
    ]
    for stage in description["stages"]:
        stage["factors"] = one_process
    description["stages"][1]["response"] = {"kind": "proximal", "alpha": {"relative": 1e12}}
    run(parse_run(description), until="score")
    infinite, own, single = (runs.read_scores(description["run_dir"], name) for name in ("pretrain", "own", "single"))
    assert runs.largest_error(infinite, single) < runs.FLOAT32
    assert own == runs.read_scores(one_process, "pretrain")
    assert runs.largest_error(infinite, own) > 0.01
    assert not (folder / "reused" / "factors").exists()


def test_candidates_alone_are_scored_with_normalised_columns(folder: Path, one_process: str) -> None:
    description = runs.two_stages(folder, "candidates")
    for stage in description["stages"]:
        stage["factors"] = one_process
    chosen = {"method": "bm25", "top": 3}
    description["score"] = [
        {"stage": "pretrain", "candidates": chosen},
        {"stage": "pretrain", "name": "single", "candidates": chosen, "responses": {"tune": {"kind": "identity"}}},
    ]
    description["detail"] = {"normalised": True, "curvature_norm": True}
    run(parse_run(description))
    run_dir = Path(description["run_dir"])
    table = pq.read_table(run_dir / "candidates" / "stage=pretrain.parquet", partitioning=None).to_pylist()
    pairs = {(row["query_id"], row["doc_id"]) for row in table}
    assert {sum(query == each for each, _ in pairs) for query, _ in pairs} == {3}
    found, everything = (runs.read_scores(where, "pretrain") for where in (str(run_dir), one_process))
    assert found.keys() == runs.read_scores(str(run_dir), "single").keys() == pairs
    assert runs.largest_error(found, {pair: everything[pair] for pair in pairs}) < 1e-6
    for row in pq.read_table(run_dir / "scores" / "stage=pretrain", partitioning=None).to_pylist():
        assert row["score_per_token"] == pytest.approx(row["score"] / row["n_tokens"], rel=1e-6)
        assert row["score_per_norm"] == pytest.approx(row["score"] / row["norm"], rel=1e-6)
        assert row["score_per_curvature_norm"] == pytest.approx(row["score"] / row["curvature_norm"], rel=1e-6)
    norms = runs.expected_curvature_norms(folder, 0)
    for label in ("pretrain", "single"):  # of one pass: a document's norm is the same for both
        of_chosen = runs.read_curvature_norms(str(run_dir), label)
        assert of_chosen == pytest.approx({document: norms[document] for _, document in pairs}, rel=runs.FLOAT32)
    top = pq.read_table(run_dir / "top.parquet").to_pylist()
    assert {(row["query_id"], row["doc_id"]) for row in top} == pairs
    assert "were skipped" not in (run_dir / "report.html").read_text(encoding="utf-8")
    parts = {path: path.stat().st_mtime_ns for path in (run_dir / "scores").rglob("*.parquet")}
    run(parse_run(description))
    assert parts == {path: path.stat().st_mtime_ns for path in (run_dir / "scores").rglob("*.parquet")}
