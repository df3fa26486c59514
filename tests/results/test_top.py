"""The streamed ends of the scores equal those of sorting everything."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from msif_ray.results import parts, top


def write(run_dir: Path, block: str, documents: list[str], scores: np.ndarray, queries: tuple[str, ...]) -> None:
    norms, tokens = np.arange(len(documents)) + 1.0, [7] * len(documents)
    parts.write_part(parts.part_path(run_dir, "s", block), queries, documents, scores, norms, tokens, [], {})


@pytest.mark.parametrize("k", [1, 3, 10, 1000])
def test_ends_equal_those_of_all_rows_sorted(tmp_path: Path, k: int) -> None:
    rng = np.random.default_rng(k)
    everything: dict[str, list[tuple[float, str, str]]] = {"q1": [], "q0": []}
    for number, size in enumerate((5, 0, 20, 1, 13)):
        documents = [f"doc{i}" for i in rng.permutation(100)[:size] + 100 * number]
        scores = rng.integers(-4, 5, (size, 2)).astype(float)  # many equal scores
        write(tmp_path, f"b{number}", documents, scores, ("q1", "q0"))
        for column, query in enumerate(everything):
            rows = zip(scores[:, column].tolist(), documents, strict=True)
            everything[query] += [(score, document, f"b{number}") for score, document in rows]
    expected = []
    for query, rows in sorted(everything.items()):
        for side, sign in (("highest", -1), ("lowest", 1)):
            best = sorted(rows, key=lambda row, sign=sign: (sign * row[0], row[1]))[:k]
            expected += [(query, side, rank, *row) for rank, row in enumerate(best, start=1)]
    pairs = top.top_pairs(tmp_path, "s", k)
    assert [(p.query_id, p.side, p.rank, p.score, p.doc_id, p.block_id) for p in pairs] == expected


def test_a_pair_carries_its_document_s_norm_and_tokens(tmp_path: Path) -> None:
    write(tmp_path, "b", ["x", "y"], np.array([[1.0], [2.0]]), ("q",))
    assert top.top_pairs(tmp_path, "s", 1) == [
        top.TopPair("q", "y", "highest", 1, 2.0, 2.0, 7, "b"),
        top.TopPair("q", "x", "lowest", 1, 1.0, 1.0, 7, "b"),
    ]


def test_norms_in_the_inverse_curvature_are_carried_where_the_scores_have_them(tmp_path: Path) -> None:
    details = parts.Details((), curvature_norms=np.array([3.0, 5.0]))
    path, scores = parts.part_path(tmp_path, "s", "b"), np.array([[1.0], [2.0]])
    parts.write_part(path, ("q",), ["x", "y"], scores, np.ones(2), [7, 7], [], {}, details)
    assert [(pair.doc_id, pair.curvature_norm) for pair in top.top_pairs(tmp_path, "s", 1)] == [("y", 5.0), ("x", 3.0)]
    top.write_top(tmp_path, [row(curvature_norm=5.0)], 2, curvature_norm=True)
    assert top.has_top(tmp_path, 2) and next(top.read_top(tmp_path))["curvature_norm"] == 5.0
    assert b"curvature_norm" in pq.read_schema(tmp_path / "top.parquet").metadata
    with pytest.raises(ValueError, match="curvature_norm"):
        top.write_top(tmp_path, [row(curvature_norm=5.0)], 2)


def test_a_score_that_is_not_a_finite_number_has_no_rank(tmp_path: Path) -> None:
    scores = np.array([[np.nan], [2.0], [np.inf], [-np.inf]])
    write(tmp_path, "b", ["w", "x", "y", "z"], scores, ("q",))
    for k in (1, 2, 9):
        assert {pair.doc_id for pair in top.top_pairs(tmp_path, "s", k)} == {"x"}


def test_no_part_has_no_top(tmp_path: Path) -> None:
    assert top.top_pairs(tmp_path, "s", 2) == []


def row(**changes: Any) -> dict[str, Any]:
    return {
        "stage": "s", "query_id": "q", "side": "highest", "rank": 1, "doc_id": "d", "score": 0.5, "norm": 2.0,
        "n_tokens": 2, "text": "ab", "tokens": ["a", "b"], "token_scores": [0.25, 0.25],
        "modules": ["m"], "module_scores": [0.5],
    } | changes  # fmt: skip


@pytest.mark.parametrize("count", [0, 2])
def test_the_table_has_the_schema_and_the_rows_in_order(tmp_path: Path, count: int) -> None:
    rows = [row(rank=rank) for rank in range(1, count + 1)]
    assert not top.has_top(tmp_path, 2)
    top.write_top(tmp_path, rows, 2)
    assert top.has_top(tmp_path, 2) and not top.has_top(tmp_path, 3)
    table = pq.read_table(tmp_path / "top.parquet")
    assert table.schema.equals(top.TOP_SCHEMA) and b"unit" in table.schema.metadata
    assert table.to_pylist() == rows


def test_a_row_with_other_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"top\.parquet"):
        top.write_top(tmp_path, [row(extra=1)], 2)
