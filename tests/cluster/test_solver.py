"""Stages solved by conjugate gradients in whole runs on a real local Ray: against dense solves, resumed, kept back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import pyarrow.parquet as pq
import pytest
import reference
import reference_solve
import torch
from cluster import runs

from msif_ray import layout
from msif_ray.cluster.iterates import ANSWER, save_answer
from msif_ray.config import parse_run
from msif_ray.progress import Reporter, Step
from msif_ray.run import run
from msif_ray.store import read_json

pytestmark = pytest.mark.usefixtures("ray_cluster")
# Strong, so that few iterations solve a system: every one costs the test a fifth of a second.
STRENGTH = 100.0
SOLVER = {"kind": "cg", "iterations": 40, "documents": 5, "tolerance": 1e-5}


class InterruptionError(Exception):
    pass


class Watching(Reporter):
    """Remembers the steps and lines of a run, and may end it where a step's name says `end_at`."""

    def __init__(self, end_at: str | None = None) -> None:
        super().__init__()
        self.__dict__ |= {"steps": [], "lines": [], "end_at": end_at}

    def say(self, line: str) -> None:
        self.__dict__["lines"].append(line)

    @contextmanager
    def step(self, name: str, total: int | None) -> Iterator[Step]:
        self.__dict__["steps"].append(name)
        if self.__dict__["end_at"] is not None and self.__dict__["end_at"] in name:
            raise InterruptionError(name)
        with super().step(name, total) as step:
            yield step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("solver")


def described(folder: Path, run_dir: str, solver: dict[str, Any], strength: float = STRENGTH) -> dict[str, Any]:
    """Both stages solved, the queries two at a time: their directions and products take 61 kB each."""
    description = runs.two_stages(folder, run_dir, directions_memory=130_000)
    for stage in description["stages"]:
        stage["solver"] = dict(solver)
    description["stages"][0]["damping"] = {"relative": strength}
    description["stages"][1]["response"]["alpha"] = {"relative": strength}
    description["score"] = [{"stage": "pretrain"}]
    return description


@pytest.fixture(scope="module")
def resumed(folder: Path) -> tuple[str, Watching, Watching]:
    """A run that ended in the middle of the scored stage's solve, and was run again."""
    description = described(folder, "run", SOLVER)
    first, second = Watching(end_at="pretrain: iteration 3"), Watching()
    with pytest.raises(InterruptionError):
        run(parse_run(description), until="score", reporter=first)
    run(parse_run(description), until="score", reporter=second)
    return str(description["run_dir"]), first, second


def dense_scores(folder: Path) -> dict[runs.Pair, float]:
    """Scores by linear solves over all maps together: A (H + A)⁻¹ of the later stage, (H + C)⁻¹ of the scored one."""
    usable = [row for row in runs.BASE if row["text"] and row["id"] != "short"]
    specs, operators = [], []
    for index, (name, documents, max_tokens) in enumerate([("pretrain", usable, 12), ("tune", runs.TUNING, 8)]):
        model, tokenizer = models.load(folder / f"stage{index}")
        options: dict[str, Any] = {"seed": 3, "strength": STRENGTH, "damping": STRENGTH}
        specs.append(reference.StageSpec(name, model, tokenizer, documents, max_tokens, **options))
        operators.append(
            reference.StageSpec(name, model, tokenizer, documents[: SOLVER["documents"]], max_tokens, **options)
        )
    names = reference.tracked_names(specs[1].model)
    with torch.enable_grad():
        carried = reference_solve.query_gradients(specs[1], names, runs.QUERIES)
        for index in (1, 0):
            fit = reference.fit(specs[index], names)
            carried = reference_solve.solved(operators[index], fit, carried, scored=index == 0)
        found = {}
        for document in usable:
            cut = reference.windows(specs[0].tokenizer, document, 12)
            gradients = [reference.window_gradients(specs[0].model, names, *window) for window in cut]
            for row, query in enumerate(runs.QUERIES):
                score = sum(float((carried[name][row] * g[name]).sum()) for g in gradients for name in names)
                found[query["id"], document["id"]] = score
    return found


@pytest.mark.timeout(900)
def test_scores_equal_dense_solves_of_both_stages_after_a_resume(
    folder: Path, resumed: tuple[str, Watching, Watching]
) -> None:
    run_dir, _, _ = resumed
    wanted = dense_scores(folder)
    found = {pair: score for pair, (score, _, _) in runs.read_scores(run_dir, "pretrain").items()}
    assert found.keys() == wanted.keys()
    largest = max(map(abs, wanted.values()))
    assert max(abs(found[pair] - wanted[pair]) for pair in wanted) < 1e-4 * largest


def test_a_resume_goes_on_at_the_iteration_that_was_reached(resumed: tuple[str, Watching, Watching]) -> None:
    _, first, second = resumed
    before = [step for step in first.steps if "pretrain: iteration" in step]
    assert [step.split(" of ")[0] for step in before] == [f"queries: pretrain: iteration {n}" for n in (1, 2, 3)]
    after = [step for step in second.steps if step.startswith(("queries: pretrain", "queries: tune"))]
    assert after[0].startswith("queries: pretrain: iteration 3 of 40")
    assert not any("tune" in step for step in after)
    # The other query's own beginning is the only one.
    assert sum("pretrain: iteration 1 of" in step for step in after) == 1


def test_residuals_against_time_are_reported(resumed: tuple[str, Watching, Watching]) -> None:
    run_dir, _, second = resumed
    folder = layout.directions(run_dir, "pretrain")
    rows = pq.read_table(layout.residuals_file(folder)).to_pylist()
    for stage in ("pretrain", "tune"):
        for query in ("query-0", "query-1", "query-2"):
            own = [row for row in rows if (row["stage"], row["query_id"]) == (stage, query)]
            assert [row["iteration"] for row in own] == list(range(len(own))) and 3 <= len(own) <= 41
            assert own[-1]["relative_residual"] <= 1e-5 < own[0]["relative_residual"]
            assert all(row["refined"] for row in own)
            seconds = [row["seconds"] for row in own]
            assert seconds[0] == 0 < seconds[1] and seconds == sorted(seconds)
    record = read_json(layout.run_record(run_dir))
    assert record["identity"]["run"]["stages"][0]["solver"] == SOLVER
    about = record["solvers"]["pretrain"]["tune"]
    assert about["documents"] == 5 and about["kept_ekfac"] == [] and about["relative_residual"]["cg"]["max"] <= 1e-5
    assert about["solved_together"] == [2, 1]  # by the memory for directions, which is no part of the run's identity
    assert set(record["strengths"]["pretrain"]) == {"pretrain.damping", "tune.alpha"}
    assert any(line.startswith("queries: pretrain: ") and "relative residual from" in line for line in second.lines)
    assert not layout.solves(folder).exists()


def test_what_a_solve_kept_goes_though_its_driver_ended_before_that(
    folder: Path, resumed: tuple[str, Watching, Watching]
) -> None:
    run_dir, _, _ = resumed
    solves = layout.solves(layout.directions(run_dir, "pretrain"))
    save_answer(solves / "tune" / "000000-000002", ANSWER, "a.map", torch.zeros(2, 3, 4))
    run(parse_run(described(folder, "run", SOLVER)), until="score")
    assert not solves.exists()


@pytest.mark.timeout(600)
def test_what_is_not_solved_keeps_the_answer_of_ekfac(folder: Path, resumed: tuple[str, Watching, Watching]) -> None:
    scores = {}
    said = Watching()
    for kind in ("cg", "ekfac"):
        solver = {"kind": "cg", "iterations": 2, "tolerance": 1e-5} if kind == "cg" else {"kind": "ekfac"}
        description = described(folder, kind, solver, strength=0.001)
        for stage in description["stages"]:
            stage["factors"] = resumed[0]
        run(parse_run(description), until="score", reporter=said)
        scores[kind] = runs.read_scores(description["run_dir"], "pretrain")
    assert scores["cg"] == scores["ekfac"]
    record = read_json(layout.run_record(str(folder / "cg")))
    assert record["solvers"]["pretrain"]["pretrain"]["kept_ekfac"] == ["query-0", "query-1", "query-2"]
    assert sum("3 of 3 queries are over 1e-05 and keep EK-FAC's answer" in line for line in said.lines) == 2
    without = read_json(layout.run_record(str(folder / "ekfac")))
    assert "solvers" not in without and "solver" not in without["identity"]["run"]["stages"][0]
