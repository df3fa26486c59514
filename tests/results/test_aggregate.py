"""Influence by a column of the corpus equals that of all scores at once."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from results.finished import Finished
from typer.testing import CliRunner

from msif_ray import layout
from msif_ray.cli import app
from msif_ray.errors import UserError
from msif_ray.results import parts
from msif_ray.results.aggregate import aggregate
from msif_ray.store import read_json, write_json

DOMAINS = ["web", "books", None]


def of_corpus(corpus: Path, per_block: int) -> dict[str, Any]:
    documents = {"path": str(corpus), "text": "text", "id": "id"}
    stages = [{"name": "pretrain", "model": "m", "documents": documents}, {"name": "tune", "model": "n"}]
    return {"stages": stages, "cluster": {"documents_per_block": per_block}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """12 documents in blocks of six, one more skipped."""
    lines = [{"id": f"doc-{n:02d}", "text": "x", "domain": DOMAINS[n % 3], "year": 2000 + n} for n in range(12)]
    lines.insert(2, {"id": "skipped", "text": None, "domain": "web", "year": 1})
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Finished(changes=of_corpus(corpus, 7), skipped=[("skipped", "text is null")])
    return run.write(tmp_path / "run")


def test_sums_are_those_of_all_scores(run_dir: Path) -> None:
    found = aggregate(run_dir, "domain").to_pylist()
    scores = Finished().scores("pretrain").astype(float)
    for row in found:
        number = int(row["query_id"][1])
        own = scores[[n for n in range(12) if DOMAINS[n % 3] == row["value"]], number]
        assert row["documents"] == 4 and row["share_of_documents"] == pytest.approx(1 / 3)
        assert row["mean"] == pytest.approx(own.mean(), rel=1e-6) and row["total"] == pytest.approx(own.sum(), rel=1e-6)
        total = np.abs(scores[:, number]).sum()
        assert row["share"] == pytest.approx(np.abs(own).sum() / total, rel=1e-6)
        assert row["net_share"] == pytest.approx(own.sum() / total, rel=1e-6)
    assert len(found) == 6
    assert [row["share"] for row in found[:3]] == sorted((row["share"] for row in found[:3]), reverse=True)


def test_without_a_score_it_says_so(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "text": null, "domain": "web"}\n')
    documents = {"path": str(corpus), "text": "text", "id": "id"}
    stages = [{"name": "pretrain", "model": "m", "documents": documents}, {"name": "tune", "model": "n"}]
    run = Finished(documents=0, skipped=[("a", "text is null")], changes={"stages": stages})
    arguments = ["aggregate", str(run.write(tmp_path / "run")), "--by", "domain"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout == "no document has a score that is a number; report.html says why\n"


def test_the_command_prints_and_writes(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "by" / "year.parquet"
    arguments = ["aggregate", str(run_dir), "--by", "year", "--query", "q1", "--out", str(out)]
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "2011" in result.stdout and "per document" in result.stdout
    assert pq.read_table(out).num_rows == 24  # of all queries


def test_a_query_that_is_not_there_writes_nothing(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "by.parquet"
    arguments = ["aggregate", str(run_dir), "--by", "year", "--query", "nosuch", "--out", str(out)]
    with pytest.raises(UserError, match="--query: there are no scores of 'nosuch'"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not out.exists()


def test_a_value_that_is_not_unicode_is_shown_escaped(run_dir: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace('"books"', r'"book\udcff"'))
    assert {row["value"] for row in aggregate(run_dir, "domain").to_pylist()} == {"web", r"book\udcff", None}


def test_another_column_and_another_corpus_are_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no column 'licence'"):
        aggregate(run_dir, "licence")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("doc-03", "other"))
    with pytest.raises(UserError, match="'doc-03' is not in the block's documents: the corpus has changed since"):
        aggregate(run_dir, "domain")
    with corpus.open("a") as more:
        more.writelines(json.dumps({"id": f"more-{n}", "text": "x", "domain": "web"}) + "\n" for n in range(7))
    corpus.write_text(corpus.read_text().replace("other", "doc-03"))
    with pytest.raises(UserError, match="the corpus has documents that the run has not: it has changed since"):
        aggregate(run_dir, "domain")


def test_the_corpus_is_read_where_the_run_read_it(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's description is relative to the working directory of the run, not to that of who reads it."""
    found, path = aggregate(run_dir, "domain"), layout.run_record(str(run_dir))
    record = read_json(path)
    record["identity"]["run"]["stages"][0]["documents"]["path"] = "*.jsonl"
    record["identity"]["corpora"] = {"score.0": {str(tmp_path / "corpus.jsonl"): "of then"}}
    write_json(path, record)
    monkeypatch.chdir(run_dir)
    assert aggregate(run_dir, "domain") == found
    (tmp_path / "corpus.jsonl").rename(tmp_path / "moved.jsonl")
    with pytest.raises(UserError) as refused:
        aggregate(run_dir, "domain")
    assert str(refused.value) == f"score.0.documents.path: no file matches *.jsonl in {run_dir}"
    monkeypatch.chdir(tmp_path)
    assert aggregate(run_dir, "domain") == found


def test_an_unfinished_run_is_refused(run_dir: Path) -> None:
    parts.part_path(run_dir, "pretrain", "00000-0000000").unlink()
    with pytest.raises(UserError, match="pretrain has scores of 6 of 13 documents; finish the run with `msif run`"):
        aggregate(run_dir, "domain")


def test_brackets_are_text_and_null_and_the_empty_text_are_groups_of_their_own(tmp_path: Path) -> None:
    values = ["[deleted]", "[/link]", ":smile:", "(none)", "", None]
    corpus = tmp_path / "corpus.parquet"
    columns = {"id": [f"doc-{n:02d}" for n in range(12)], "text": ["x"] * 12, "an[a]": values * 2}
    pq.write_table(pa.table(columns), corpus)
    run_dir = Finished(documents=12, changes=of_corpus(corpus, 6)).write(tmp_path / "run")
    found = {row["value"]: row["documents"] for row in aggregate(run_dir, "an[a]").to_pylist()}
    assert found == dict.fromkeys(values, 2)
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["aggregate", str(run_dir), "--by", "an[a]"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0].split()[0] == "an[a]"
    assert sorted(line.split()[0] for line in lines[1:7]) == sorted([*values[:4], "''", "(none)"])


def test_queries_with_other_candidates_have_their_own_equal_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal scores each group has its equal share, however many of its documents each query has."""
    corpus = tmp_path / "corpus.jsonl"
    lines = [{"id": f"doc-{n:02d}", "text": "x", "domain": DOMAINS[n // 6]} for n in range(12)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = np.ones((12, 2), dtype=np.float32)
    scores[:5, 0] = scores[7:, 1] = np.nan  # one web and six books of the first query, six and one of the second
    monkeypatch.setattr(Finished, "scores", lambda self, label: scores)
    run_dir = Finished(changes=of_corpus(corpus, 6)).write(tmp_path / "run")
    assert [row["share"] for row in aggregate(run_dir, "domain").to_pylist()] == pytest.approx([6 / 7, 1 / 7] * 2)
    for query, at_most in (([], True), (["--query", "q0"], False)):
        arguments = ["aggregate", str(run_dir), "--by", "domain", *query]
        printed = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments, catch_exceptions=False).stdout
        found = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:3]}
        assert [row[-1] for row in found.values()] == ["1.00×", "1.00×"]
        assert ("documents: of a query at most" in printed) == at_most
        assert [found[value][0] for value in ("web", "books")] == (["6", "6"] if at_most else ["1", "6"])


def test_a_query_whose_scores_are_all_zero_has_no_share(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes no part in means of shares."""
    scores = Finished().scores("pretrain") * np.float32([1, 0])
    monkeypatch.setattr(Finished, "scores", lambda self, label: scores)
    shutil.rmtree(run_dir / "scores")
    Finished(changes=of_corpus(tmp_path / "corpus.jsonl", 7), skipped=[("skipped", "text is null")]).write(run_dir)
    rows = aggregate(run_dir, "domain").to_pylist()
    assert {(row["share"], row["net_share"]) for row in rows if row["query_id"] == "q1"} == {(None, None)}
    assert [row["share_of_documents"] for row in rows] == pytest.approx([1 / 3] * 6)

    def printed(*more: str) -> list[str]:
        arguments = ["aggregate", str(run_dir), "--by", "domain", *more]
        return CliRunner(env={"COLUMNS": "250"}).invoke(app, arguments, catch_exceptions=False).stdout.splitlines()

    assert printed()[:4] == printed("--query", "q0")[:4]
    assert printed()[-1].endswith("left out: queries whose scores are all zero, 1 of 2")
    assert printed("--query", "q1") == ["all scores are zero, of which nothing has a share"]
