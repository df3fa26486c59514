"""A part is all of a block or nothing, and readable by anything that reads Parquet."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from msif_ray.errors import UserError
from msif_ray.results import parts, statistics, top
from msif_ray.results.of_queries import query_scores
from msif_ray.tables import SEAL


def write(run_dir: Path, block: str, documents: list[str], skipped: list[tuple[str, str]], stage: str = "one") -> Path:
    path = parts.part_path(run_dir, stage, block)
    scores = np.arange(2.0 * len(documents)).reshape(len(documents), 2)
    norms = np.arange(len(documents)) + 0.5
    tokens = list(range(3, 3 + len(documents)))
    parts.write_part(path, ["q1", "q0"], documents, scores, norms, tokens, skipped, {"damping": "0.1"})
    return path


def test_rows_are_sorted_by_query_id_then_document_as_given(tmp_path: Path) -> None:
    path = write(tmp_path, "00000-0000000", ["b", "a"], [])
    assert path == tmp_path / "scores" / "stage=one" / "part-00000-0000000.parquet"
    table = pq.ParquetFile(path).read()
    assert table.schema.equals(parts.SCORES_SCHEMA)
    assert table.to_pydict() == {
        "query_id": ["q0", "q0", "q1", "q1"],
        "doc_id": ["b", "a", "b", "a"],
        "score": [1.0, 3.0, 0.0, 2.0],
        "norm": [0.5, 1.5, 0.5, 1.5],
        "n_tokens": [3, 4, 3, 4],
    }


def test_metadata_says_what_the_numbers_are(tmp_path: Path) -> None:
    metadata = pq.read_schema(write(tmp_path, "b", ["d"], [])).metadata
    assert {b"unit", b"sign", b"norm", b"n_tokens", b"damping", b"skipped"} <= metadata.keys()


def test_duckdb_reads_all_parts_and_no_temporary_file(tmp_path: Path) -> None:
    path = write(tmp_path, "00000-0000000", ["a"], [])
    write(tmp_path, "00000-0000001", ["b", "c"], [])
    (path.parent / ".part-00000-0000002.parquet.0.tmp").write_bytes(b"half")
    query = f"select count(*), count(distinct (query_id, doc_id)), min(stage) from '{tmp_path}/scores/*/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(6, 6, "one")]
    assert parts.done_blocks(tmp_path, "one") == {"00000-0000000", "00000-0000001"}
    assert parts.done_blocks(tmp_path, "other") == set()


def test_skipped_documents_of_all_stages_are_gathered(tmp_path: Path) -> None:
    write(tmp_path, "00000-0000001", [], [("c", "text is null")])
    write(tmp_path, "00000-0000000", ["a"], [("b", "fewer than two tokens")])
    write(tmp_path, "00000-0000000", ["x"], [("ä", "text is empty")], stage="two")
    parts.write_skipped(tmp_path, ["one", "two"])
    assert pq.read_table(tmp_path / "skipped.parquet").to_pylist() == [
        {"doc_id": "b", "reason": "fewer than two tokens", "stage": "one"},
        {"doc_id": "c", "reason": "text is null", "stage": "one"},
        {"doc_id": "ä", "reason": "text is empty", "stage": "two"},
    ]
    assert SEAL in (tmp_path / "skipped.parquet").read_bytes()  # as in all of a run's Parquet


def test_no_skipped_document_is_an_empty_table_of_the_same_columns(tmp_path: Path) -> None:
    parts.write_skipped(tmp_path, ["one"])
    path = tmp_path / "skipped.parquet"
    assert pq.read_schema(path).equals(parts.SKIPPED_SCHEMA) and pq.read_metadata(path).num_row_groups == 0
    assert duckdb.sql(f"select count(*) from '{path}'").fetchall() == [(0,)]
    assert len(pd.read_parquet(path)) == 0 and pl.read_parquet(path).height == 0


@pytest.mark.parametrize("content", [b"not parquet", None])
def test_a_file_that_is_no_part_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = write(tmp_path, "b", ["a"], [])
    if content is None:
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"part-b.parquet: not a part of this run's scores"):
        parts.write_skipped(tmp_path, ["one"])


@pytest.mark.parametrize(("key", "place"), [("name", ("two", "b")), ("block", ("one", "c"))])
def test_a_part_in_the_place_of_another_is_named(tmp_path: Path, key: str, place: tuple[str, str]) -> None:
    """Of the same run: of a block its file is named after, and of an entry its folder."""
    path, wrong = parts.part_path(tmp_path, "one", "b"), parts.part_path(tmp_path, *place)
    about = {"name": "one", "block": "b"}
    parts.write_part(path, ["q"], ["x"], np.array([[1.0]]), None, [7], [], about)
    parts.read_part(path)
    wrong.parent.mkdir(exist_ok=True)
    path.rename(wrong)
    with pytest.raises(UserError, match=f"^{wrong}: in the wrong place: its {key} is {about[key]}, not .*; delete it"):
        parts.skipped_of(wrong)


def test_arrays_of_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scores"):
        parts.write_part(tmp_path / "p", ["q"], ["a", "b"], np.zeros((1, 2)), np.zeros(2), [1, 1], [], {})
    assert not list(tmp_path.iterdir())


def test_norms_that_were_not_computed_are_null(tmp_path: Path) -> None:
    path = parts.part_path(tmp_path, "s", "b")
    parts.write_part(path, ["q"], ["x", "y"], np.array([[1.0], [2.0]]), None, [7, 8], [], {})
    assert parts.read_part(path)["norm"].to_pylist() == [None, None]
    (rows,) = parts.read_rows(path)
    assert rows["norm"].null_count == 2 and rows["n_tokens"].to_pylist() == [7, 8]


def test_a_flipped_bit_of_the_rows_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, "b", ["a", "b"], [])
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    noticed = 0
    for place in range(4, footer):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            table = parts.read_part(path)
        except UserError as error:
            assert "delete it, and its block is scored again" in str(error)
            noticed += 1
        else:  # an unused field of a page's header
            assert table.to_pydict() == {
                "query_id": ["q0", "q0", "q1", "q1"],
                "doc_id": ["a", "b", "a", "b"],
                "score": [1.0, 3.0, 0.0, 2.0],
                "norm": [0.5, 1.5, 0.5, 1.5],
                "n_tokens": [3, 4, 3, 4],
            }
    assert noticed > (footer - 4) / 2


def test_details_are_list_columns_by_query_then_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GROUP_ROWS", 2)  # a query at a time
    by_map = np.arange(12.0).reshape(2, 2, 3)
    by_token = [np.arange(4.0).reshape(2, 2), np.arange(6.0).reshape(2, 3)]
    details = parts.Details(("x", "y", "z"), by_map, by_token)
    path = tmp_path / "p.parquet"
    parts.write_part(path, ["q1", "q0"], ["b", "a"], np.zeros((2, 2)), np.zeros(2), [2, 3], [], {}, details)
    table = pq.ParquetFile(path).read()
    assert table["module_scores"].to_pylist() == [[3, 4, 5], [9, 10, 11], [0, 1, 2], [6, 7, 8]]
    assert table["token_scores"].to_pylist() == [[2, 3], [3, 4, 5], [0, 1], [0, 1, 2]]
    assert table.schema.metadata[b"modules"] == b'["x", "y", "z"]'
    assert parts.read_part(path).column_names == parts.SCORES_SCHEMA.names
    for wanted in (parts.Details(("x",)), parts.Details(("x",), by_map[:, :, :1])):
        parts.write_part(path, ["q1", "q0"], ["b", "a"], np.zeros((2, 2)), np.zeros(2), [2, 3], [], {}, wanted)
        assert len(pq.read_schema(path)) == 5 + len(wanted.fields)


def test_details_of_a_block_without_documents(tmp_path: Path) -> None:
    details = parts.Details(("x",), np.zeros((0, 2, 1)), [])
    parts.write_part(tmp_path / "p", ["q1", "q0"], [], np.zeros((0, 2)), np.zeros(0), [], [], {}, details)
    assert pq.ParquetFile(tmp_path / "p").metadata.num_rows == 0


READERS: dict[str, Callable[[Path], int]] = {
    "pyarrow": lambda folder: pq.read_table(folder).num_rows,
    "duckdb": lambda folder: len(duckdb.sql(f"select query_id, score from '{folder}/*.parquet'").fetchall()),
    "pandas": lambda folder: len(pd.read_parquet(folder, filters=[("query_id", "!=", "")])),
    "polars": lambda folder: pl.scan_parquet(folder / "*.parquet").select("query_id", "score").collect().height,
    "datasets": lambda folder: len(load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")),
}


@pytest.mark.parametrize("reader", READERS)
def test_parts_without_rows_and_queries_without_any_are_read(
    tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` takes no row group of no rows, and nothing takes a folder of no columns."""
    monkeypatch.setattr(parts, "GROUP_ROWS", 2)  # a query at a time
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paths = [parts.part_path(tmp_path, "one", f"00000-000000{number}") for number in range(3)]
    parts.write_part(paths[0], ["a", "b"], [], np.zeros((0, 2)), np.zeros(0), [], [("x", "too short")], {})
    for path, chosen in zip(paths[1:], ([[True, False], [True, False]], [[False, False], [False, True]]), strict=True):
        names = [f"{path.stem}-{number}" for number in range(2)]
        parts.write_part(path, ["b", "a"], names, np.ones((2, 2)), np.ones(2), [3, 3], [], {}, None, np.array(chosen))
    assert [pq.read_metadata(path).num_row_groups for path in paths] == [0, 1, 1]
    assert READERS[reader](paths[0].parent) == 3
    found = dict(query_scores(tmp_path, "one", ["b", "a"]))
    assert {query: len(ids) for query, (ids, _) in found.items()} == {"b": 2, "a": 1}
    assert {ids.type for ids, _ in found.values()} == {pa.large_string()}  # more than 2 GiB of ids of a whole corpus
    if reader != "datasets":  # which has no name for no rows
        paths[1].unlink()
        paths[2].unlink()
        assert READERS[reader](paths[0].parent) == 0


def test_one_query_reads_a_small_part_of_a_file(tmp_path: Path) -> None:
    """By statistics of row groups, as every reader of Parquet uses them."""
    queries = [f"q{n}" for n in np.random.default_rng(0).permutation(200)]
    scores = np.random.default_rng(1).standard_normal((256, 200)).astype(np.float32)
    path, ids = parts.part_path(tmp_path, "s", "b"), [f"doc-{n}" for n in range(256)]
    parts.write_part(path, queries, ids, scores, np.ones(256), [7] * 256, [], {})
    metadata = pq.read_metadata(path)
    assert 40 <= metadata.num_row_groups <= parts.GROUPS
    assert metadata.serialized_size < 0.15 * path.stat().st_size
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    assert all(group.column(column).statistics.has_min_max for group in groups for column in range(5))
    ends = [(group.column(0).statistics.min, group.column(0).statistics.max) for group in groups]
    assert ends == sorted(ends) and all(one[1] < other[0] for one, other in pairwise(ends))
    wanted = queries[17]
    holding = [group.total_byte_size for group, (low, high) in zip(groups, ends, strict=True) if low <= wanted <= high]
    assert len(holding) == 1 and holding[0] < 0.05 * sum(group.total_byte_size for group in groups)
    found = dict(query_scores(tmp_path, "s", [wanted, "q", queries[3]]))
    assert list(found) == [wanted, "q", queries[3]] and len(found["q"][0]) == 0
    for query, place in ((wanted, 17), (queries[3], 3)):
        assert found[query][0].to_pylist() == ids and (found[query][1] == scores[:, place]).all()


def test_only_plain_types(tmp_path: Path) -> None:
    details = parts.Details(("x",), np.zeros((1, 1, 1)), [np.zeros((1, 2))])
    parts.write_part(tmp_path / "p", ["q"], ["a"], np.zeros((1, 1)), np.zeros(1), [2], [], {}, details)
    types = {str(field.type) for field in pq.read_schema(tmp_path / "p")}
    assert types == {"string", "float", "int32", "list<element: float>"}


def test_normalised_columns_and_chosen_pairs(tmp_path: Path) -> None:
    scores, chosen = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[True, False], [True, True]])
    details = parts.Details((), normalised=True)
    path = tmp_path / "p"
    parts.write_part(path, ["b", "a"], ["x", "y"], scores, np.array([0.0, 8.0]), [2, 4], [], {}, details, chosen)
    columns = ["query_id", "doc_id", "score_per_token", "score_per_norm"]
    assert pq.ParquetFile(path).read(columns).to_pylist() == [
        {"query_id": "a", "doc_id": "y", "score_per_token": 1.0, "score_per_norm": 0.5},
        {"query_id": "b", "doc_id": "x", "score_per_token": 0.5, "score_per_norm": None},
        {"query_id": "b", "doc_id": "y", "score_per_token": 0.75, "score_per_norm": 0.375},
    ]
    metadata = pq.read_schema(path).metadata
    assert metadata[b"score_per_norm"] == b"score / norm; null where the norm is zero"


def test_curvature_norms_stand_beside_the_norms_and_divide_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "GROUP_ROWS", 2)  # a query at a time
    scores, path = np.array([[1.0, 2.0], [3.0, 4.0]]), tmp_path / "p"
    for normalised in (False, True):
        details = parts.Details((), None, [np.zeros((2, 1))] * 2, normalised, np.array([0.0, 16.0]))
        parts.write_part(path, ["b", "a"], ["x", "y"], scores, np.array([1.0, 8.0]), [2, 4], [], {}, details)
        table = pq.ParquetFile(path).read()
        names = ["query_id", "doc_id", "score", "norm", "n_tokens", "curvature_norm", "token_scores"]
        divided = ["score_per_token", "score_per_norm", "score_per_curvature_norm"]
        assert table.column_names == names + (divided if normalised else [])
        assert table["curvature_norm"].to_pylist() == [0.0, 16.0, 0.0, 16.0]
        assert {b"curvature_norm", *(name.encode() for name in divided * normalised)} < table.schema.metadata.keys()
    assert table["score_per_norm"].to_pylist() == [2.0, 0.5, 1.0, 0.375]
    assert table["score_per_curvature_norm"].to_pylist() == [None, 0.25, None, 0.1875]
    assert parts.read_part(path).column_names == parts.SCORES_SCHEMA.names


def test_a_query_may_be_cut_into_row_groups(tmp_path: Path) -> None:
    """As those of very large blocks are: nobody takes one for the whole of it."""
    scores = np.random.default_rng(0).standard_normal((10, 2)).astype(np.float32)
    ids = [f"d{number}" for number in range(10)]
    for stage in ("whole", "cut"):
        path = parts.part_path(tmp_path, stage, "b")
        parts.write_part(path, ["a", "b"], ids, scores, np.ones(10), [7] * 10, [], {})
    pq.write_table(parts.read_part(path), path, row_group_size=3)
    assert pq.read_metadata(path).num_row_groups == 7
    statistics.write_statistics(tmp_path, ["whole", "cut"])
    found = statistics.read_statistics(tmp_path)
    for query in "ab":
        one, other = (found[stage, query] for stage in ("whole", "cut"))
        assert all(one[name] == other[name] for name in ("documents", "lowest", "highest", "histogram"))
        assert one["total_absolute"] == pytest.approx(other["total_absolute"], rel=1e-14)
    assert top.top_pairs(tmp_path, "whole", 4) == top.top_pairs(tmp_path, "cut", 4)
    for (query, one), (_, other) in zip(
        *(query_scores(tmp_path, stage, "ab") for stage in ("whole", "cut")), strict=True
    ):
        assert one[0].equals(other[0]) and (one[1] == other[1]).all(), query


def test_very_many_skipped_documents_are_written_some_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SKIPPED_AT_ONCE", 3)
    rows = [(f"d{number}", "why") for number in range(8)]
    for number in range(2):
        write(tmp_path, f"b{number}", [], rows[4 * number : 4 * number + 4])
    parts.write_skipped(tmp_path, ["one"])
    found = pq.ParquetFile(tmp_path / "skipped.parquet")
    assert [(row["doc_id"], row["reason"]) for row in found.read().to_pylist()] == rows
    assert [found.metadata.row_group(group).num_rows for group in range(found.num_row_groups)] == [3, 3, 2]
