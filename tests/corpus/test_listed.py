"""Candidates given as a list: taken at its word, and what is wrong with it is one line before anything is started."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import runs

from msif_ray import layout, preflight
from msif_ray.config import Documents, parse_run
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.files import corpus_files
from msif_ray.corpus.listed import by_list
from msif_ray.corpus.reader import Document
from msif_ray.errors import UserError
from msif_ray.plan.make import make_plan
from msif_ray.preflight import check
from msif_ray.tables import write_table

KEY = "score.0.candidates"
QUERIES = [Document("q0", "Where is the ", "sea", True), Document("q1", None, "king river", False)]


@pytest.fixture
def blocks(tmp_path: Path) -> CorpusBlocks:
    rows = [{"id": f"d{number}", "text": "the sea"} for number in range(10)]
    documents = Documents(path=runs.write_lines(tmp_path / "corpus.jsonl", rows), text="text", id="id")
    return CorpusBlocks(tuple(corpus_files(documents, "k")), (len(rows),), documents, 4, "k")


def write(folder: Path, table: pa.Table) -> str:
    pq.write_table(table, folder / "list.parquet")
    return str(folder / "list.parquet")


def test_a_list_is_taken_at_its_word(blocks: CorpusBlocks, tmp_path: Path) -> None:
    path = write(tmp_path, pa.table({"query_id": ["q1", "q0", "q1", "q1"], "doc_id": ["d9", "d0", "d1", "d9"]}))
    rows = [tuple(row.values()) for row in by_list(blocks, QUERIES, path, KEY).to_pylist()]
    last, first = "00000-0000002", "00000-0000000"
    assert rows == [("q1", "d9", last, 1, None), ("q0", "d0", first, 1, None), ("q1", "d1", first, 2, None)]
    path = write(tmp_path, pa.table({"doc_id": ["d3", "d3"]}))
    assert by_list(blocks, QUERIES, path, KEY)["query_id"].to_pylist() == ["q0", "q1"]


def not_utf8(*values: bytes) -> pa.Array:
    """Text as a writer leaves it that does not check its bytes."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pa.table({"id": ["d0"]}), r": .*list\.parquet has no column 'doc_id'; it has id$"),
        (pa.table({"doc_id": ["d10"]}), r"\.path: .*: the corpus has no document 'd10'$"),
        (pa.table({"doc_id": ["d1"], "query_id": ["q7"]}), r"\.path: .*: there is no query 'q7'$"),
        (pa.table({"doc_id": pa.array([], pa.string())}), r"\.path: .*: names no document$"),
        (pa.table({"doc_id": ["d1", None]}), r"\.path: .*list\.parquet row 1 has no 'doc_id'$"),
        (pa.table({"doc_id": not_utf8(b"d1", b"d\xff")}), r"\.path: .* row 1: 'doc_id' is not valid Unicode$"),
        (
            pa.table({"doc_id": ["d1"], "query_id": not_utf8(b"q\xff")}),
            r"\.path: .* row 0: 'query_id' is not valid Unicode$",
        ),
        (
            pa.Table.from_arrays([pa.array(["d1"])] * 2, ["doc_id", "doc_id"]),
            r": .*list\.parquet has 2 columns 'doc_id'; rename all but one$",
        ),
    ],
)
def test_what_is_wrong_with_a_list_is_one_line(
    blocks: CorpusBlocks, tmp_path: Path, table: pa.Table, said: str
) -> None:
    with pytest.raises(UserError, match=f"^{KEY}{said}"):
        by_list(blocks, QUERIES, write(tmp_path, table), KEY)


def test_a_list_that_is_no_parquet_is_one_line(blocks: CorpusBlocks, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("doc_id\nd1\n")
    for path in (tmp_path / "list.csv", tmp_path / "none.parquet", tmp_path):
        with pytest.raises(UserError, match=f"^{KEY}.path: {path}:? cannot be read: [^\n]+$"):
            by_list(blocks, QUERIES, str(path), KEY)


def listing(folder: Path, **columns: list[str]) -> dict[str, Any]:
    """A run of which two entries, in one pass, score the candidates of a list."""
    entry = {"stage": "pretrain", "candidates": {"path": write(folder, pa.table(columns))}}
    alone = entry | {"name": "alone", "responses": {"tune": {"kind": "identity"}}}
    return runs.two_stages(folder, "run") | {"score": [{"stage": "tune"}, entry, alone]}


def test_a_list_is_checked_before_anything_is_started_and_planned_by_its_pairs(tmp_path: Path) -> None:
    run = parse_run(listing(tmp_path, doc_id=["base-2", "base-0", "base-2"]))
    (table,) = (listed := check(run).listed).values()
    pairs = [(row["query_id"], row["doc_id"]) for row in table.to_pylist()]
    assert list(listed) == ["score.1"]
    assert pairs == [(query["id"], document) for query in runs.QUERIES for document in ("base-2", "base-0")]
    scores = next(step for step in make_plan(run, measured=False).steps if step.name == "pretrain, alone: scores")
    assert scores.documents == len(pairs)


@pytest.mark.parametrize(
    ("columns", "said"),
    [({"name": ["base-2"]}, ": .*has no column 'doc_id'"), ({"doc_id": ["x"]}, r"\.path: .*has no document 'x'")],
)
def test_a_faulty_list_is_refused_before_anything_is_started(
    tmp_path: Path, columns: dict[str, list[str]], said: str
) -> None:
    with pytest.raises(UserError, match=f"^score.1.candidates{said}"):
        check(parse_run(listing(tmp_path, **columns)))


def test_what_a_run_has_chosen_is_not_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = parse_run(listing(tmp_path, doc_id=["base-2"]))
    chosen = check(run).listed
    write_table(layout.candidates(run.run_dir, "pretrain"), chosen["score.1"])
    monkeypatch.setattr(preflight, "by_list", None)
    assert check(run).listed == chosen
