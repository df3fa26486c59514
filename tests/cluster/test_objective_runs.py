"""Whole runs of stages with other objectives on a real local Ray cluster, against their dense reference."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import reference_objectives
from cluster import runs
from cluster.objective_runs import (
    ASKED,
    BAD,
    BETA,
    LABELLED,
    NAMES,
    NO_PAIRS,
    PAIRED,
    classifying,
    dense_classifying,
    dense_preferring,
    preferring,
)
from results.finished import page_data

from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.run import run
from msif_ray.store import read_json

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objectives")


@pytest.fixture(scope="module")
def classified(folder: Path) -> str:
    description = classifying(folder, "classified")
    run(parse_run(description))
    return str(description["run_dir"])


@pytest.mark.parametrize(("stage", "scored"), [("pretrain", 0), ("tune", 1)])
def test_scores_of_a_class_equal_the_dense_reference(folder: Path, classified: str, stage: str, scored: int) -> None:
    stages = dense_classifying(folder)
    expected = reference_objectives.scores(stages, ASKED, stages[scored].documents, scored)
    assert runs.largest_error(runs.read_scores(classified, stage), expected) < runs.FLOAT32


def test_texts_that_cannot_be_read_are_skipped_with_a_reason(classified: str) -> None:
    skipped = {row["doc_id"]: row["reason"] for row in pq.read_table(f"{classified}/skipped.parquet").to_pylist()}
    assert {name: skipped[name] for name in BAD} == {
        "long": "longer than max_tokens (16), and a classifier reads a text whole",
        "odd": "label 'perhaps' is no class of the model: no, maybe, yes",
    }


def test_what_a_classified_text_and_a_class_look_like(classified: str) -> None:
    rows = [row for row in pq.read_table(f"{classified}/top.parquet").to_pylist() if row["stage"] == "tune"]
    texts = {text["id"]: text for text in LABELLED}
    for row in rows:
        text = texts[row["doc_id"]]
        assert row["text"] == "".join(row["tokens"]) == f"{text['text']}\n\n[label: {NAMES[text['label']]}]"
        assert len(row["tokens"]) == len(row["token_scores"]) == row["n_tokens"]
        assert sum(row["token_scores"]) == pytest.approx(row["score"], rel=1e-4, abs=1e-6)
    record = read_json(Path(classified) / "run.json")
    assert record["identity"]["queries"] == [[text["id"], text["text"], NAMES[text["label"]]] for text in ASKED]
    assert record["identity"]["run"]["stages"][1]["objective"] == {"kind": "classification", "truncate": False}
    assert record["meaning"]["sign"].startswith("score > 0: the document supports the class")
    data = page_data((Path(classified) / "report.html").read_text(encoding="utf-8"))
    assert data["queries"][0]["prompt"] == f"{ASKED[0]['text']} → "
    assert data["queries"][0]["completion"] == NAMES[ASKED[0]["label"]] and data["queries"][0]["tokens"] == 1


@pytest.fixture(scope="module")
def preferred(folder: Path) -> str:
    """Fitted, then run to its end, with the shares of every score."""
    description = preferring(folder, "preferred") | {"detail": {"tokens": True, "modules": True}}
    run(parse_run(description), until="fit")
    files = {path: path.stat().st_mtime_ns for path in (folder / "preferred" / "references").rglob("*.json")}
    assert len(files) == 5  # blocks of four pairs
    run(parse_run(description))
    assert files == {path: path.stat().st_mtime_ns for path in (folder / "preferred" / "references").rglob("*.json")}
    return str(description["run_dir"])


@pytest.mark.parametrize(("stage", "scored"), [("pretrain", 0), ("prefer", 2)])
def test_scores_with_preferences_equal_the_dense_reference(
    folder: Path, preferred: str, stage: str, scored: int
) -> None:
    stages = dense_preferring(folder)
    expected = reference_objectives.scores(stages, runs.QUERIES, stages[scored].documents, scored)
    assert runs.largest_error(runs.read_scores(preferred, stage), expected) < runs.FLOAT32


def test_what_is_no_pair_is_skipped_with_a_reason(preferred: str) -> None:
    skipped = {row["doc_id"]: row["reason"] for row in pq.read_table(f"{preferred}/skipped.parquet").to_pylist()}
    assert {name: skipped[name] for name in NO_PAIRS} == {
        "far": "longer than max_tokens (30), and a preference is of whole sequences",
        "same": "chosen and rejected do not differ",
    }


def test_shares_of_a_pair_sum_to_its_score(preferred: str) -> None:
    path = Path(preferred) / "scores" / "stage=prefer"
    rows = pq.read_table(path, partitioning=None).to_pylist()
    assert len(rows) == len(PAIRED) * len(runs.QUERIES)
    for row in rows:
        assert len(row["token_scores"]) == row["n_tokens"]
        for shares in (row["token_scores"], row["module_scores"]):
            assert sum(shares) == pytest.approx(row["score"], abs=runs.FLOAT32 * 4 * sum(map(abs, shares)))
    top = pq.read_table(f"{preferred}/top.parquet").to_pylist()
    shown = {(row["query_id"], row["doc_id"]): row["token_scores"] for row in top if row["stage"] == "prefer"}
    scored = {(row["query_id"], row["doc_id"]): row["token_scores"] for row in rows}
    assert all(shares == pytest.approx(scored[pair], rel=1e-5, abs=1e-6) for pair, shares in shown.items())


def test_what_a_pair_looks_like_and_what_the_record_says(folder: Path, preferred: str) -> None:
    rows = [row for row in pq.read_table(f"{preferred}/top.parquet").to_pylist() if row["stage"] == "prefer"]
    pairs = {pair["id"]: pair for pair in PAIRED}
    for row in rows:
        prompt, chosen, rejected = (pairs[row["doc_id"]][key] for key in ("prompt", "chosen", "rejected"))
        assert row["text"] == f"{prompt}\n\n[chosen] {chosen}\n\n[rejected] {rejected}"
        shown = "".join(row["tokens"]).replace("<eos>", "")
        assert shown == f"[chosen] {prompt}{chosen}\n\n[rejected] {prompt}{rejected}"
        assert len(row["tokens"]) == len(row["token_scores"]) == row["n_tokens"]
        assert sum(row["token_scores"]) == pytest.approx(row["score"], rel=1e-4, abs=1e-6)
    identity = read_json(Path(preferred) / "run.json")["identity"]
    assert identity["run"]["stages"][2]["objective"] == {"kind": "dpo", "beta": BETA, "reference": None}
    assert identity["references"]["prefer"]["sha256"] == identity["models"]["tune"]["sha256"]
    description = preferring(folder, "preferred") | {"detail": {"tokens": True, "modules": True}}
    description["stages"][2]["objective"]["beta"] = 0.5
    with pytest.raises(UserError, match=r"stages\.2\.objective\.beta was 1\.0 and is 0\.5"):
        run(parse_run(description))
