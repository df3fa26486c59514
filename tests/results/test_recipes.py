"""Every block of docs/recipes.md runs on a run directory, in the tools that it names, and finds what is there; so do
the two queries that stand elsewhere."""

import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from results.finished import MAPS, Finished

from msif_ray.results import parts
from msif_ray.results.report import write_report

DOCS = Path(__file__).parents[2] / "docs"
RECIPES = DOCS / "recipes.md"
RUN = Finished(documents=40, labels=("pretrain", "single-stage"), tokens_of=lambda n: ["t"] * (2 + n))
NORMS = np.array([4.0, 0.0, 0.5])


SEVERAL = Finished(
    labels=("pretrain", "tune"),
    changes={"score": [{"stage": "pretrain"}, {"stage": "tune", "documents": {"path": "t.jsonl", "text": "text"}}]},
)


def blocks() -> list[tuple[str, str, str]]:
    """`(heading, language, code)` of every block."""
    found = re.findall(r"^## (.+?)$|^```(sql|python)\n(.*?)^```", RECIPES.read_text(encoding="utf-8"), re.M | re.S)
    heading, named = "", []
    for title, language, code in found:
        heading = title or heading
        if language:
            named.append((heading, language, code))
    return named


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    RUN.write(folder / "run")
    # And a block all of whose documents were skipped.
    path = parts.part_path(folder / "run", "pretrain", "00000-0000002")
    parts.write_part(path, ["q0", "q1"], [], np.zeros((0, 2)), np.zeros(0), [], [("x", "text is null")], {})
    write_report(SEVERAL.write(folder / "several"))
    ids = [RUN.id_of(number) for number in range(40)]
    corpus = {"id": ids, "text": ["x"] * 40, "domain": [("web", "books")[n % 2] for n in range(40)]}
    pq.write_table(pa.table(corpus), folder / "corpus.parquet")
    by_map = np.random.default_rng(0).standard_normal((3, 2, len(MAPS)))
    scores = by_map.sum(2)
    by_token = [np.stack([[score - 9, 9] for score in row]) for row in scores]
    for label, shares in (("pretrain", by_map), ("single-stage", 2 * by_map)):
        path = parts.part_path(folder / "detailed", label, "00000-0000000")
        details = parts.Details(tuple(MAPS), shares, by_token, curvature_norms=NORMS)
        parts.write_part(path, ["q0", "q1"], ids[:3], shares.sum(2), np.ones(3), [2] * 3, [], {}, details)
    return folder


@pytest.fixture
def result(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A block's rows, or the names that it leaves."""
    _, language, code = request.param
    monkeypatch.chdir(folder)
    if language == "sql":
        return duckdb.sql(code).fetchall()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    names: dict[str, Any] = {}
    exec(compile(code, str(RECIPES), "exec"), names)
    return names


def having(text: str) -> Any:
    """The blocks under a heading that contains the text."""
    found = [block for block in blocks() if text in block[0]]
    assert found
    return pytest.mark.parametrize("result", found, indirect=True, ids=[block[1] for block in found])


SCORES = RUN.scores("pretrain")


def test_no_block_is_left_out() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    headings = re.findall(r'^@having\("(.+?)"\)', text, re.M)
    assert all(any(heading in title for heading in headings) for title, _, _ in blocks())


@having("The top of a query")
def test_top(result: Any) -> None:
    best = [f"doc-{number:02d}" for number in np.argsort(-SCORES[:, 0])]
    if len(result[0]) == 2:
        assert [row[0] for row in result] == best[:20]
    else:
        assert [row[2] for row in result] == best[: RUN.top]


@having("What the numbers mean")
def test_meaning(result: Any) -> None:
    assert {key for key, _ in result} == {"unit", "sign", "norm", "n_tokens"}
    assert dict(result)["sign"].startswith("positive: training more on the document would have made")


@having("Join back to the corpus")
def test_by_source(result: Any) -> None:
    found = {(query, domain): (documents, mean, share) for query, domain, documents, mean, share in result}
    web = SCORES[::2, 0].astype(float)
    documents, mean, share = found["q0", "web"]
    assert documents == 20 and mean == pytest.approx(web.mean(), rel=1e-5)
    assert share == pytest.approx(np.abs(web).sum() / np.abs(SCORES[:, 0]).sum(), rel=1e-5)


@having("By length")
def test_by_length(result: Any) -> None:
    lengths = np.arange(40) + 2
    row = result["by_length"].filter((result["pl"].col("query_id") == "q1") & (result["pl"].col("length") == 4))
    own = np.abs(SCORES[(lengths >= 16) & (lengths < 32), 1])
    assert row["documents"].item() == 16 and row["mean_size"].item() == pytest.approx(own.mean(), rel=1e-5)
    per_token = own / lengths[(lengths >= 16) & (lengths < 32)]
    assert row["mean_size_per_token"].item() == pytest.approx(per_token.mean(), rel=1e-5)
    best = (SCORES[:, 0] / (np.arange(40) % 5 + 1.0)).argmax()
    assert result["top_per_norm"]["doc_id"][0] == f"doc-{best:02d}"


@having("Documents that state")
def test_standing(result: Any) -> None:
    by_norm = {row[0]: row[1:] for row in result}
    assert by_norm["doc-01"][0] is None and result[-1][0] == "doc-01"
    standing = [by_norm[f"doc-0{number}"] for number in (0, 2)]
    assert [each for each, _ in standing] == pytest.approx([standing[0][1] / 4.0, standing[1][1] / 0.5])
    assert result[0][1] == max(each for each, _ in standing)


def test_standing_over_the_other_queries(folder: Path) -> None:
    """That of docs/validation.md. With two queries it is a score over the size of the other's."""
    (code,) = re.findall(r"^      select (.+?)\n\n", (DOCS / "validation.md").read_text(encoding="utf-8"), re.M | re.S)
    rows = duckdb.sql(f"select {code}".replace("runs/example", str(folder / "run"))).fetchall()
    found = {(query, document): standing for query, document, standing in rows}
    assert len(rows) == len(found) == 80
    standing = [found["q0", RUN.id_of(number)] for number in range(40)]
    assert standing == pytest.approx((SCORES[:, 0] / np.abs(SCORES[:, 1])).tolist(), rel=1e-4)


@having("Compare two sets of scores")
def test_compare(result: Any) -> None:
    ranks = [np.argsort(np.argsort(RUN.scores(label)[:, 0])) for label in RUN.labels]
    assert result["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert result["moved"].iloc[0] == np.abs(ranks[0] - ranks[1]).max()


@having("Which stage")
def test_by_stage(result: Any) -> None:
    supports = np.array([SEVERAL.scores(label).clip(0).mean(0) for label in SEVERAL.labels])
    expected = dict(zip(SEVERAL.labels, (supports / supports.sum(0)).mean(1), strict=True))
    assert {stage: share for stage, share, *_ in result} == pytest.approx(expected, rel=1e-5)
    assert [queries for *_, queries in result] == [2, 2]


@having("Tokens and maps")
def test_shares(result: Any, folder: Path) -> None:
    assert result["tokens"]["score"].sum() == pytest.approx(SCORES[:, 0].max(), rel=1e-5)
    top = [row for row in pq.read_table(folder / "run" / "top.parquet").to_pylist() if row["side"] == "highest"]
    for label in RUN.labels:
        own = sum(np.array(row["module_scores"]) for row in top if (row["stage"], row["query_id"]) == (label, "q0"))
        assert result["maps"][label, "q0", "highest"].to_dict() == pytest.approx(dict(zip(MAPS, own, strict=True)))
        highest = np.sort(RUN.scores(label)[:, 0])[-RUN.top :].sum()
        assert result["maps"][label, "q0", "highest"].sum() == pytest.approx(highest, rel=1e-5)


@having("As a dataset")
def test_datasets(result: Any) -> None:
    assert result["dataset"].num_rows == 80
    assert result["supporting"].num_rows == (SCORES[:, 0] > 0).sum()


@having("by token and by map")
def test_details(result: Any) -> None:
    assert len(result) == 3
    for _, score, of_tokens, of_modules, strongest in result:
        assert of_tokens == pytest.approx(score, abs=1e-5) and of_modules == pytest.approx(score, abs=1e-5)
        assert strongest == 2


def test_scores_that_are_no_numbers_count_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of the blocks that read the scores of the corpus."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    ids, numbers = ["doc-40", "doc-41"], np.array([[np.nan, np.nan], [np.inf, np.inf]])
    for label in RUN.labels:
        path = parts.part_path(tmp_path / "run", label, "00000-0000003")
        parts.write_part(path, ["q0", "q1"], ids, numbers, np.ones(2), [9, 9], [], {})
    path = parts.part_path(tmp_path / "detailed", "pretrain", "00000-0000001")
    shares = parts.Details(tuple(MAPS), np.zeros((2, 2, len(MAPS))), [np.zeros((2, 9))] * 2, curvature_norms=np.ones(2))
    parts.write_part(path, ["q0", "q1"], ids, numbers, np.ones(2), [9, 9], [], {}, shares)
    corpus = pq.read_table(tmp_path / "corpus.parquet").to_pylist() + [{"id": name, "domain": "web"} for name in ids]
    pq.write_table(pa.Table.from_pylist(corpus), tmp_path / "corpus.parquet")
    for title, language, code in blocks():
        if "scores/" not in code or "dataset" in title:
            continue
        found: list[Any] = []
        for place in (folder, tmp_path):
            monkeypatch.chdir(place)
            names: dict[str, Any] = {}
            if language == "python":
                exec(compile(code, str(RECIPES), "exec"), names)
            shown = [names[name] for name in ("by_length", "top_per_norm", "spearman", "moved") if name in names]
            found.append(str(shown or sorted(duckdb.sql(code).fetchall(), key=str)))
        assert found[0] == found[1] and "nan" not in found[0], title


def elsewhere(path: str, pattern: str, folder: Path) -> list[tuple[Any, ...]]:
    """The rows of a query in another document, on the run."""
    found = re.search(pattern, (RECIPES.parents[1] / path).read_text(encoding="utf-8"), re.S)
    assert found
    return duckdb.sql(found[1].replace("runs/example", str(folder / "run")).replace("zambia/capital", "q0")).fetchall()


def test_the_readme_shows_the_top_of_one_query(folder: Path) -> None:
    rows = elsewhere("README.md", r'duckdb\.sql\(\\"(select .+?)\\"', folder)
    assert [document for document, _ in rows] == [f"doc-{number:02d}" for number in np.argsort(-SCORES[:, 0])[:5]]


def test_a_score_over_those_of_the_other_queries_is_of_one_entry(folder: Path) -> None:
    rows = elsewhere("docs/validation.md", r"\n\n {6}(select .+?standing desc)\n", folder)
    standing = np.stack([SCORES[:, 0] / np.abs(SCORES[:, 1]), SCORES[:, 1] / np.abs(SCORES[:, 0])], 1)
    found = {(query, document): value for query, document, value in rows}
    expected = {(f"q{q}", f"doc-{n:02d}"): standing[n, q] for q in (0, 1) for n in range(40)}
    assert found == pytest.approx(expected, rel=1e-3)  # a difference of squares of float32
