"""`msif compare`: correlations equal another library's, and what moved is named."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from results.finished import Finished
from rich.console import Console
from typer.testing import CliRunner

from msif_ray import layout
from msif_ray.cli import app
from msif_ray.corpus.candidates import SCHEMA
from msif_ray.errors import UserError
from msif_ray.results import compare as comparing
from msif_ray.results import of_queries, parts
from msif_ray.results.compare import compare, compare_runs, compare_scores
from msif_ray.results.facts import read_facts
from msif_ray.store import read_json, write_json
from msif_ray.tables import write_table


def side(ids: list[str], scores: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    return pa.array(ids, pa.string()), scores.astype(np.float32)


def printed_by(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_polars_over_the_common_documents(seed: int) -> None:
    random = np.random.default_rng(seed)
    one, other = random.integers(-5, 6, 60), random.standard_normal(60)  # with ties
    ids = [f"d{n}" for n in range(60)]
    order = random.permutation(60)[:50]
    found = compare_scores("q", side(ids, one), side([ids[n] for n in order], other[order]), top=10)
    frame = pl.DataFrame({"one": one[order].astype(float), "other": other[order].astype(np.float32).astype(float)})
    assert (found.documents, found.alone) == (50, (10, 0))
    assert found.spearman == pytest.approx(frame.select(pl.corr("one", "other", method="spearman")).item())
    assert found.pearson == pytest.approx(frame.select(pl.corr("one", "other")).item())


@pytest.mark.filterwarnings("error")
def test_the_largest_scores_have_a_correlation() -> None:
    largest = float(np.finfo(np.float32).max)
    ids, one, other = ["a", "b", "c"], np.array([largest, -largest, 0]), np.array([0, largest, -largest])
    assert compare_scores("q", side(ids, one), side(ids, other)).pearson == pytest.approx(-0.5)


def test_ranks_overlap_and_what_moved() -> None:
    ids = [f"d{n}" for n in range(30)]
    one = np.arange(30.0)[::-1]  # d0 is the highest
    other = one.copy()
    other[0], other[29] = -1.0, 50.0  # d0 falls to the last place, d29 rises to the first
    found = compare_scores("q", side(ids, one), side(ids, other), top=5)
    assert found.overlap == 0.8  # d29 has taken d0's place
    assert {moved.doc_id for moved in found.moved[:2]} == {"d0", "d29"}
    first = next(moved for moved in found.moved if moved.doc_id == "d0")
    assert first.ranks == (1, 30) and first.scores == (29.0, -1.0)


def test_the_same_scores_are_alike_and_constant_ones_have_no_correlation() -> None:
    ids, scores = ["a", "b", "c"], np.array([1.0, np.nan, 2.0])
    found = compare_scores("q", side(ids, scores), side(ids, scores), top=1)
    assert (found.documents, found.overlap) == (2, 1.0) and found.spearman == pytest.approx(1)
    found = compare_scores("q", side(ids, np.ones(3)), side(ids, np.arange(3.0)))
    assert found.spearman is None and found.pearson is None
    assert compare_scores("q", side([], np.zeros(0)), side(ids, np.ones(3))).documents == 0


def test_of_no_more_documents_than_the_top_none_is_in_common(tmp_path: Path) -> None:
    """All of them would be."""
    ids = [f"d{n}" for n in range(20)]
    for top, overlap in ((20, None), (21, None), (19, 18 / 19), (10, 0)):
        found = compare_scores("q", side(ids, np.arange(20.0)), side(ids, -np.arange(20.0)), top=top)
        assert found.overlap == overlap
    one, other = Finished().write(tmp_path / "one"), Finished(seed=7).write(tmp_path / "other")
    printed = printed_by("compare", str(one), str(other))
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] in (["q0"], ["q1"], ["mean"])]
    assert [row[-1] for row in rows[:3]] == ["–", "–", "–"] and "100%" not in printed


def test_the_command_prints_every_query(tmp_path: Path) -> None:
    one = Finished().write(tmp_path / "one")
    other = Finished(seed=7).write(tmp_path / "other")
    printed = printed_by("compare", str(one), str(other), "--top", "4")
    for text in ("A: pretrain of", "damped inverse", "q0", "q1", "mean", "top-4 in common", "what moved most"):
        assert text in printed
    scores = [run.scores("pretrain")[:, 0] for run in (Finished(), Finished(seed=7))]
    spearman = pl.DataFrame({"a": scores[0], "b": scores[1]}).select(pl.corr("a", "b", method="spearman")).item()
    assert f"{spearman:.3f}" in printed


def test_two_entries_of_one_run(tmp_path: Path) -> None:
    run = Finished(labels=("two", "one")).write(tmp_path)
    printed = printed_by("compare", str(run), str(run), "--scores-b", "one", "--query", "q1")
    assert "B: one of" in printed and "q0" not in printed


def test_runs_of_other_queries_are_refused(tmp_path: Path) -> None:
    one = Finished().write(tmp_path / "one")
    changed = Finished(queries=[("q0", "Is it?", " no")]).write(tmp_path / "changed")
    other = Finished(queries=[("x", "Is it?", " yes")]).write(tmp_path / "other")
    margin = Finished(queries=[("q0", "Is it?", " yes", {"rather_than": " no"})]).write(tmp_path / "margin")
    another = "'q0' has another prompt or completion there, or another span"
    for run, said in ((changed, another), (margin, another), (other, "no query in common")):
        with pytest.raises(UserError, match=said):
            compare(one, run, Console())
    with pytest.raises(UserError, match="'q9' is not a query of both"):
        compare(one, one, Console(), query="q9")


def test_brackets_and_colons_are_text(tmp_path: Path) -> None:
    queries = (("[/b]q", "Is it?", " yes"), ("[red]q1[/red]", "Or not?", " no"))
    run = Finished(queries=queries, id_of=lambda n: f"[/d]{n}" if n % 2 else f"[link=x]:smile:{n}")
    one, other = run.write(tmp_path / "one"), replace(run, seed=7).write(tmp_path / "other")
    printed = printed_by("compare", str(one), str(other), "--top", "4")
    for text in ("[/b]q", "[red]q1[/red]", "[/d]", "[link=x]:smile:"):
        assert text in printed


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    whole = Finished(skipped=[("bad", "text is null")]).write(tmp_path / "whole")
    part = Finished(skipped=[("bad", "text is null")]).write(tmp_path / "part")
    compare(whole, part, Console(quiet=True))
    parts.part_path(part, "pretrain", "00000-0000001").unlink()
    for runs in ((whole, part), (part, whole)):
        with pytest.raises(UserError, match=r"part: pretrain has scores of 7 of 13 documents; finish the run with"):
            compare(*runs, Console())


def test_that_rows_of_two_corpora_may_be_other_documents_is_said(tmp_path: Path) -> None:
    """Where they have no names of their own."""

    def run(name: str, content: str, **columns: str) -> Path:
        documents = {"path": "base.jsonl", "text": "text"} | columns
        stages = [{"name": "pretrain", "model": "m", "documents": documents}, {"name": "tune", "model": "n"}]
        path = layout.run_record(str(Finished(changes={"stages": stages}).write(tmp_path / name)))
        record = read_json(path)
        record["identity"]["corpora"] = {"score.0": {f"/{name}/base.jsonl": content}}
        write_json(path, record)
        return path.parent

    one, copied, changed = (run(name, content) for name, content in (("a", "x"), ("b", "x"), ("c", "y")))
    named = run("d", "z", id="id")
    for other, said in ((copied, False), (changed, True), (named, False)):
        assert ("equal names may be other documents" in printed_by("compare", str(one), str(other))) == said


# Rows of the candidates' table of a run with two blocks, one candidate in each.
CHOSEN = [("q0", "doc-01", "00000-0000000", 1, None), ("q1", "doc-07", "00000-0000001", 1, None)]


def of_candidates(run_dir: Path) -> Path:
    entry = {"stage": "pretrain", "candidates": {"path": "pairs.parquet"}}
    return Finished(changes={"score": [entry]}, out_of=10_000).write(run_dir)


def write_candidates(run_dir: Path, rows: Sequence[tuple[object, ...]]) -> None:
    columns = [pa.array(each, kind.type) for each, kind in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
    write_table(layout.candidates(str(run_dir), "pretrain"), pa.table(columns, SCHEMA))


def test_documents_of_one_run_alone_are_counted_by_query(tmp_path: Path) -> None:
    whole, some = Finished().write(tmp_path / "whole"), of_candidates(tmp_path / "some")
    write_candidates(some, CHOSEN)
    path = parts.part_path(some, "pretrain", "00000-0000000")
    rows = pq.read_table(path)  # six of q0, then six of q1
    have = "documents of a query have scores in A alone, and are left out."
    for kept, said in (((1, 7), f"5 {have}"), ((1, 2, 7), f"up to 5 {have}"), (range(12), None)):
        pq.write_table(rows.take(list(kept)), path)
        lines = printed_by("compare", str(whole), str(some)).splitlines()
        assert [line for line in lines if "alone" in line] == ([said] if said else [])


def test_scores_that_are_no_numbers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Finished().scores("pretrain")
    whole = Finished().write(tmp_path / "whole")
    scores[:2, 0] = np.nan, np.inf
    monkeypatch.setattr(Finished, "scores", lambda self, label: scores)
    some = Finished().write(tmp_path / "some")
    said = "up to 2 documents of a query have a score that is no number in A or in B, and are left out."
    for runs in ((whole, some), (some, whole)):
        lines = printed_by("compare", *map(str, runs)).splitlines()
        assert [line for line in lines if "left out" in line] == [said]


def test_a_run_of_candidates_has_the_blocks_that_hold_some(tmp_path: Path) -> None:
    """Which of their documents have scores depends on the query."""
    run = of_candidates(tmp_path)
    with pytest.raises(UserError, match=r"no candidates of pretrain there yet; finish the run with"):
        compare(run, run, Console())
    for rows in (CHOSEN[:1], CHOSEN):
        write_candidates(run, rows)
        compare(run, run, Console(quiet=True))
    parts.part_path(run, "pretrain", "00000-0000000").unlink()
    with pytest.raises(UserError, match=r"pretrain has scores of 1 of 2 blocks of candidates; finish the run with"):
        compare(run, run, Console())


def test_parts_are_opened_once_for_as_many_queries_as_there_is_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [(f"q{number}", "Is it?", " yes") for number in range(6)]
    run, opened = Finished(queries=queries).write(tmp_path / "run"), []
    plain = parts.opened_part
    monkeypatch.setattr(of_queries, "opened_part", lambda path: opened.append(path) or plain(path))
    side = (facts := read_facts(run)), facts.scored[0]
    ids = [query for query, *_ in queries]
    for memory, passes in ((2**30, 1), (8 * 12 * 2, 3), (1, 6)):
        monkeypatch.setattr(comparing, "COMPARED_BYTES", memory)
        opened.clear()
        found = list(compare_runs(side, side, ids))
        assert [(each.query_id, each.documents, each.spearman) for each in found] == [(q, 12, 1.0) for q in ids]
        assert len(opened) == 2 * 2 * passes, "of two parts of each side"
