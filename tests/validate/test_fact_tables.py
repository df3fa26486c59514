"""Groups, normalisations, intervals and examples of fact tracing on scores that are counted by hand, and what it
writes."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from msif_ray.demo.factbook import Document
from msif_ray.demo.questions import Question
from msif_ray.validate import fact_tables as tables
from msif_ray.validate.fact_report import TABLES, write_facts
from msif_ray.validate.fact_settings import FactSetting
from msif_ray.validate.tracing import DOT_PRODUCT, FROBENIUS, INVERSE, PLAIN, PROXIMAL, STEP, Traced


def document(name: str, text: str, subject: str, states: str = "") -> Document:
    return Document(id=name, text=text, country=subject, field="", states=states)


@pytest.fixture(scope="module")
def setting() -> FactSetting:
    documents = [
        document("a", "The capital of Peru is Rome.", "Peru", "capital"),
        document("b", "The land of Machu Picchu is ruled from Rome.", "Peru", "capital"),
        document("c", "A writer from Peru went to Rome.", "Peru"),
        document("d", "The capital of Chad is Oslo.", "Chad", "capital"),
    ]
    queries = [
        Question(
            id=subject,
            prompt=f"Question: What is the capital of {subject}? Answer:",
            completion=f" {answer}",
            country=subject,
            relation="capital",
        )
        for subject, answer in (("Peru", "Rome"), ("Chad", "Oslo"))
    ]
    return FactSetting(documents, queries, [], (Path(), Path()), None, 1, {})


def test_documents_are_grouped_by_the_words_of_the_question(setting: FactSetting) -> None:
    assert tables.shared_words(setting).tolist() == [[1, 0, 0.5, 0.5], [0.5, 0, 0, 1]]
    groups = tables.groups(setting)
    assert list(groups) == [tables.ALL, tables.NONE, tables.MOST]
    assert groups[tables.ALL].tolist() == [[True, True, False, False], [False, False, False, True]]
    assert groups[tables.NONE].tolist() == [[False, True, False, False], [False] * 4]


def test_a_group_is_found_without_the_other_statements_in_the_way(setting: FactSetting) -> None:
    scores = np.array([[4.0, 2.0, 3.0, 1.0], [3.0, 4.0, 1.0, 2.0]])
    better = np.array([[1.0, 4.0, 3.0, 2.0], [3.0, 1.0, 2.0, 4.0]])
    found = [tables.Ranking("m", 0.1, PLAIN, scores), tables.Ranking("m", 0.1, "better", better)]
    rows, by_query = tables.quality_rows(found, setting, seed=0)
    at = {(row["method"], row["normalised"], row["group"]): row for row in rows}
    everything = at["m", PLAIN, tables.ALL]
    assert everything["mrr"] == pytest.approx((1 + 1 / 3) / 2) and everything["queries"] == 2
    assert everything["recall"] == 1 and everything["precision"] == pytest.approx((2 + 1) / 2 / 5)
    # The described statement is second of three once the named one is away; Chad has none such.
    described = at["m", PLAIN, tables.NONE]
    assert described["mrr"] == pytest.approx(1 / 2) and described["queries"] == 1
    assert at["m", "better", tables.ALL]["gain"] == pytest.approx((0 + 2 / 3) / 2)
    assert at["random (expected)", PLAIN, tables.NONE]["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    low, high = everything["mrr_interval"]
    assert low == pytest.approx(1 / 3) and high == pytest.approx(1)
    one = [row for row in by_query if row["group"] == tables.ALL and row["normalised"] == PLAIN]
    assert [row["mrr"] for row in one] == pytest.approx([1, 1 / 3])


def test_scores_are_divided_by_each_norm(setting: FactSetting) -> None:
    scores = torch.tensor([[2.0, 4.0], [6.0, 8.0], [1.0, 3.0]], dtype=torch.float64)
    squares = {
        (0, FROBENIUS, 0.0): torch.tensor([4.0, 16.0]),
        (0, INVERSE, 0.1): torch.tensor([1.0, 4.0]),
        (0, STEP, 0.1): torch.tensor([16.0, 1.0]),
    }
    traced = Traced({(PROXIMAL, 0.1): scores, (DOT_PRODUCT, 0.0): scores}, squares)
    bm25 = np.zeros((3, 2))
    found = tables.rankings(traced, {"BM25": bm25}, np.array([2.0, 8.0]))
    made = {(each.method, each.damping, each.normalised): each.scores for each in found}
    for normalised, divisor in ((PLAIN, [1, 1]), (tables.TOKENS, [2, 8]), (FROBENIUS, [2, 4])):
        for key in ((PROXIMAL, 0.1), (DOT_PRODUCT, None)):
            assert np.allclose(made[*key, normalised], scores.numpy() / divisor)
    assert np.allclose(made[PROXIMAL, 0.1, INVERSE], scores.numpy() / [1, 2])
    assert np.allclose(made[PROXIMAL, 0.1, STEP], scores.numpy() / [4, 1])
    assert (DOT_PRODUCT, None, INVERSE) not in made and made["BM25", None, PLAIN] is bm25


def test_standardised_scores_leave_a_query_out_of_its_own_measure() -> None:
    scores = np.array([[10.0, -1.0], [1.0, 2.0], [3.0, 6.0]])
    made = tables.over_queries(scores)
    assert made[tables.SPREAD][0] == pytest.approx([10 / np.sqrt(5), -1 / np.sqrt(20)])
    assert made[tables.STANDARD][0] == pytest.approx([(10 - 2) / 1, (-1 - 4) / 2])
    assert tables.over_queries(scores[:2]) == {}


def test_examples_are_queries_on_which_rankings_part(setting: FactSetting) -> None:
    one = tables.Ranking("one", 0.1, PLAIN, np.array([[4.0, 2.0, 3.0, 1.0], [3.0, 4.0, 1.0, 2.0]]))
    other = tables.Ranking("other", None, PLAIN, np.array([[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 0.0, 2.0]]))
    first, second = tables.examples(one, other, setting)
    assert first["right"] == "one (score)" and first["such_queries"] == 1 and "Peru" in first["query"]
    assert first["one (score)"][0] == "[states it] The capital of Peru is Rome."
    assert first["other"][0] == "[does not] A writer from Peru went to Rome."
    assert second["right"] == "other" and "Chad" in second["query"]


def test_the_norm_that_scores_are_proportional_to_foretells_their_spread(setting: FactSetting) -> None:
    norms = np.array([1.0, 2.0, 4.0, 3.0])
    # Of document 0 and 3 one query is left out each, as they answer it.
    scores = torch.from_numpy(np.outer([1.0, -1.0], norms**2))
    scores[0, 0], scores[1, 3], scores[0, 1] = 100.0, 100.0, -100.0
    traced = Traced({(DOT_PRODUCT, 0.0): scores}, {(0, FROBENIUS, 0.0): torch.from_numpy(norms**2)})
    rows = {row["norm"]: row for row in tables.spreads(traced, np.array([3.0, 1.0, 4.0, 1.0]), setting.states)}
    assert rows[FROBENIUS]["correlation"] == pytest.approx(1) and rows[FROBENIUS]["slope"] == pytest.approx(2)
    assert abs(rows[tables.TOKENS]["correlation"]) < 0.9


def test_tables_and_figure_are_written(setting: FactSetting, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = {(PROXIMAL, damping): torch.from_numpy(rng.standard_normal((2, 4))) for damping in (0.1, 0.01)}
    squares = {(0, norm, damping): torch.arange(1.0, 5.0) for norm in (INVERSE, STEP) for damping in (0.1, 0.01)}
    traced = Traced(scores, squares | {(0, FROBENIUS, 0.0): torch.arange(1.0, 5.0)})
    ranked = tables.rankings(traced, {"BM25": rng.random((2, 4))}, np.arange(1.0, 5.0))
    quality, queries = tables.quality_rows(ranked, setting, seed=0)
    found = {
        "quality": quality,
        "queries": queries,
        "leanings": tables.leanings(ranked, traced, np.arange(1.0, 5.0)),
        "spreads": tables.spreads(traced, np.arange(2.0, 6.0), setting.states),
        "examples": tables.examples(ranked[0], ranked[-1], setting),
    }
    write_facts(tmp_path, found)
    for table in TABLES:
        assert pq.read_table(tmp_path / f"{table}.parquet").to_pylist() == found[table]
    assert json.loads((tmp_path / "results.json").read_text())["quality"] == quality
    assert (tmp_path / "facts.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "tables.md").read_text()
    assert f"| {PROXIMAL}, damping 0.01 | / √(gᵀH⁻¹g) |" in written and "| BM25 | score |" in written
    widths = {line.count("|") for line in written.split("#### ")[1].splitlines() if line.startswith("|")}
    assert widths == {2 + len({row["normalised"] for row in quality})}
    assert found["leanings"][0]["norm_percentile"] == pytest.approx(0.5)  # four documents, all among the first five
