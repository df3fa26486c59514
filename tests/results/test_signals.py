"""Each sign of a doubtful result is there when it should be, and only then."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from results.finished import MAPS, Finished

from msif_ray.results.facts import Facts, Fitted, read_facts
from msif_ray.results.signals import Signals, find_signals, signal_lines
from msif_ray.results.statistics import read_statistics

KEY = ("pretrain", "q0")


@pytest.fixture
def found(tmp_path: Path) -> tuple[Facts, dict[Any, Any], dict[Any, Any]]:
    """A run without any."""
    Finished().write(tmp_path)
    even = {(label, query): (MAPS, np.ones(len(MAPS))) for label in ("pretrain",) for query in ("q0", "q1")}
    return read_facts(tmp_path), read_statistics(tmp_path), even


CLASSES = {
    "stages": [
        {"name": "pretrain", "model": "m", "documents": {"path": "base.jsonl", "text": "text"}},
        {"name": "tune", "model": "n", "objective": "classification"},
    ],
    "queries": {"path": "queries.jsonl", "id": "id", "text": "text", "label": "label"},
}


def of_run(run_dir: Path) -> Signals:
    """Without those of maps."""
    return find_signals(read_facts(run_dir), read_statistics(run_dir), {})


def titles(signals: Signals) -> tuple[list[str], list[str]]:
    return [each.title for each in signals.run], [each.title for each in signals.queries[KEY]]


def test_a_sound_run_has_none(found: Any) -> None:
    facts, statistics, shares = found
    statistics = {key: row | {"length_correlation": None} for key, row in statistics.items()}
    assert titles(find_signals(facts, statistics, shares)) == ([], [])


@pytest.mark.parametrize(("tokens", "expected"), [(89, 1), (90, 0)])
def test_few_documents_for_the_dimension(found: Any, tokens: int, expected: int) -> None:
    facts, statistics, shares = found  # maps of 8 and 9 dimensions
    stage = replace(facts.stages[0], fitted=Fitted(documents=30, tokens=tokens, skipped=0, share=1.0))
    signals = find_signals(replace(facts, stages=[stage, facts.stages[1]]), statistics, shares)
    assert [each.title for each in signals.run] == ["Few documents for the factors of pretrain"] * expected


def test_a_query_that_the_model_did_not_prefer(tmp_path: Path) -> None:
    for likelihood, expected in ((2 * np.log(0.051), False), (2 * np.log(0.049), True)):
        run = Finished(log_likelihood=float(likelihood))
        found_titles = titles(of_run(run.write(tmp_path / str(expected))))[1]
        assert found_titles == (["The model did not prefer this completion"] if expected else [])


def test_a_class_that_the_model_did_not_prefer(tmp_path: Path) -> None:
    run = Finished(log_likelihood=2 * float(np.log(0.04)), changes=CLASSES)
    (signal,) = of_run(run.write(tmp_path)).queries[KEY]
    assert signal.title == "The model did not prefer this class" and "probability of 0.04 " in signal.detail
    assert "completion" not in signal.detail and "token" not in signal.detail


def test_scores_that_are_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not said to be skipped; and of candidates it isn't known how many there should be."""
    scores = Finished().scores("pretrain")
    scores[:5, 0] = [np.nan, np.inf, -np.inf, np.nan, np.nan]
    scores[:, 1] = np.nan
    monkeypatch.setattr(Finished, "scores", lambda self, label: scores)
    found = of_run(Finished(skipped=[("x", "text is null")]).write(tmp_path / "all"))
    details = [signal.detail for query in ("q0", "q1") for signal in found.queries["pretrain", query]]
    assert [each[:8] for each in details] == ["5 of 12 ", "12 of 12"]
    assert titles(found)[0] == ["Many documents of pretrain were skipped"] and "1 of 13" in found.run[0].detail
    entry = {"stage": "pretrain", "candidates": {"method": "bm25"}}
    assert titles(of_run(Finished(changes={"score": [entry]}).write(tmp_path / "some"))) == ([], [])


def test_a_margin_on_the_wrong_side(tmp_path: Path) -> None:
    queries = (("q0", "Is it?", " yes", {"rather_than": " no"}), ("q1", "Or not?", " no"))
    for likelihood, expected in ((0.1, []), (-0.1, ["The model preferred the other completion"])):
        run = Finished(queries=queries, log_likelihood=likelihood)
        assert titles(of_run(run.write(tmp_path / str(likelihood))))[1] == expected
    # Half as likely per token as would be doubted of a completion alone.
    run = Finished(queries=queries, log_likelihood=float(2 * np.log(0.02)))
    (signal,) = of_run(run.write(tmp_path / "far")).queries[KEY]
    assert signal.title == "The model preferred the other completion" and "7.82 nats below" in signal.detail


def test_energy_lost_to_low_rank(tmp_path: Path) -> None:
    (signal,) = of_run(Finished(energy=0.7).write(tmp_path)).queries[KEY]
    assert signal.title == "Much of the query was lost to low rank" and "70%" in signal.detail


def test_one_map_dominates(found: Any) -> None:
    facts, statistics, shares = found
    largest = np.ones(len(MAPS))
    largest[4] = 20
    (signal,) = find_signals(facts, statistics, shares | {KEY: (MAPS, largest)}).queries[KEY]
    assert signal.title == "One map carries most of the scores" and "1.mlp.up has 71%" in signal.detail


@pytest.mark.parametrize(("documents", "expected"), [(29, 0), (30, 1)])
def test_long_documents_dominate(found: Any, documents: int, expected: int) -> None:
    """Where there are enough for that to be no chance."""
    facts, statistics, _ = found
    rows = statistics | {KEY: statistics[KEY] | {"length_correlation": 0.8, "documents": documents}}
    assert titles(find_signals(facts, rows, {}))[1] == ["Long documents dominate"] * expected


@pytest.mark.parametrize(
    ("label", "highest", "expected"), [("pretrain", 24.1, 1), ("pretrain", 23.9, 0), ("tune", 99, 0)]
)
def test_scores_that_no_first_order_reaches(tmp_path: Path, label: str, highest: float, expected: int) -> None:
    """Of 12 documents, for a completion of two tokens; products of gradients are no such estimate."""
    entry = {
        "stage": label,
        "documents": {"path": "t.jsonl", "text": "text"},
        "responses": {"tune": {"kind": "identity"}},
    }
    facts = read_facts(Finished(labels=[label], changes={"score": [entry]}).write(tmp_path))
    for side in ("highest", "lowest"):
        rows = read_statistics(tmp_path)
        rows[label, "q0"] |= {"highest": 0.1, "lowest": -0.1, side: highest if side == "highest" else -highest}
        found = find_signals(facts, rows, {}).queries
        assert [each.title[:20] for each in found[label, "q0"]] == ["Scores are too large"] * expected
        assert found[label, "q1"] == []
        of_more = replace(facts, scored=[replace(facts.scored[0], out_of=120)])
        assert find_signals(of_more, rows, {}).queries[label, "q0"] == []


def test_many_are_skipped(tmp_path: Path) -> None:
    run = Finished(skipped=[("x", "text is null"), ("y", "text is null"), ("z", "fewer than two tokens")])
    run_dir = run.write(tmp_path)
    (signal,) = of_run(run_dir).run
    assert signal.title == "Many documents of pretrain were skipped"
    assert "3 of 15" in signal.detail and "text is null" in signal.detail


@pytest.mark.parametrize("candidates", [None, {"method": "bm25"}])
def test_none_has_a_score(tmp_path: Path, candidates: dict[str, Any] | None) -> None:
    entry = {"stage": "pretrain"} | ({"candidates": candidates} if candidates else {})
    skipped = [("x", "text is null"), ("y", "fewer than two tokens"), ("z", "text is null")]
    run_dir = Finished(documents=0, skipped=skipped, changes={"score": [entry]}).write(tmp_path)
    lines = signal_lines(of_run(run_dir))
    assert lines == [
        "No document of pretrain has a score: 3 were skipped, most often because: text is null. skipped.parquet names "
        "each one."
    ]


def test_a_query_without_a_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one, or all, of whose candidates no score is a number: nothing of that is in skipped.parquet."""
    scores = Finished().scores("pretrain")
    scores[:, 0] = np.nan
    monkeypatch.setattr(Finished, "scores", lambda self, label: scores)
    entry = {"stage": "pretrain", "candidates": {"method": "bm25"}}
    run = Finished(changes={"score": [entry]}, skipped=[("x", "text is null")])
    (line,) = signal_lines(of_run(run.write(tmp_path / "one")))
    assert line == "No candidate has a score: 1 of 2 queries (q0)"
    scores[:] = np.nan
    (line,) = signal_lines(of_run(Finished(changes={"score": [entry]}).write(tmp_path / "all")))
    assert line == "No candidate has a score: 2 of 2 queries (q0, q1)"


def test_lines_name_the_queries_once(tmp_path: Path) -> None:
    queries = [(f"q{n}", "Is it?", " yes") for n in range(9)]
    run = Finished(queries=queries, labels=("one", "two"), log_likelihood=-20.0, skipped=[("x", "text is null")] * 9)
    run_dir = run.write(tmp_path)
    lines = signal_lines(of_run(run_dir))
    assert len(lines) == 3 and "9 of 21" in lines[0] and "9 of 21" in lines[1]
    assert lines[2] == "The model did not prefer this completion: 9 of 9 queries (q0, q1, q2, q3, q4, …)"
