"""Stages with other objectives on sharded ranks, from an index, as candidates, and solved by conjugate gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import reference
import reference_objectives
import reference_solve
from cluster import runs
from cluster.objective_runs import (
    ASKED,
    LABELLED,
    PAIRED,
    classifying,
    dense_classifying,
    dense_preferring,
    preferring,
)

from msif_ray.config import parse_run
from msif_ray.corpus.blocks import LOG_RATIOS
from msif_ray.run import run
from msif_ray.store import read_json

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.long, pytest.mark.timeout(900)]
# Strong, so that few iterations solve a system.
STRENGTH = 100.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


Make = Callable[[Path, str], dict[str, Any]]
KINDS = [pytest.param(classifying, dense_classifying, ASKED, id="classes")]
KINDS.append(pytest.param(preferring, dense_preferring, runs.QUERIES, id="preferences"))


@pytest.mark.parametrize(("make", "dense", "queries"), KINDS)
def test_ranks_that_shard_the_model_give_the_same_scores(folder: Path, make: Make, dense: Any, queries: Any) -> None:
    description = make(folder, f"sharded-{make.__name__}")
    description["cluster"]["ranks_per_replica"] = 2
    stages = dense(folder)
    description["score"] = [{"stage": stages[-1].name}]
    run(parse_run(description), until="score")
    expected = reference_objectives.scores(stages, queries, stages[-1].documents, len(stages) - 1)
    assert runs.largest_error(runs.read_scores(description["run_dir"], stages[-1].name), expected) < 1e-5


@pytest.mark.parametrize(("make", "dense", "queries"), KINDS)
def test_an_index_gives_the_same_scores_and_top_documents(folder: Path, make: Make, dense: Any, queries: Any) -> None:
    description = make(folder, f"indexed-{make.__name__}")
    stages = dense(folder)
    name = stages[-1].name
    description["index"] = [{"stage": name, "rank": 64, "dtype": "float64"}]
    description["score"] = [{"stage": name, "index": description["run_dir"]}]
    description["top"] = 2
    run(parse_run(description))
    expected = reference_objectives.scores(stages, queries, stages[-1].documents, len(stages) - 1)
    assert runs.largest_error(runs.read_scores(description["run_dir"], name), expected) < 1e-6
    rows = pq.read_table(f"{description['run_dir']}/top.parquet").to_pylist()
    assert rows and all(sum(row["token_scores"]) == pytest.approx(row["score"], rel=1e-4, abs=1e-6) for row in rows)


def test_of_an_index_the_top_pairs_alone_meet_the_reference_model(folder: Path) -> None:
    """And candidates alone, where there are some."""
    built = preferring(folder, "built")
    run(parse_run(built | {"index": [{"stage": "prefer", "rank": 64, "dtype": "float64"}]}), until="index")
    description = preferring(folder, "asked") | {"top": 1}
    for stage in description["stages"]:
        stage["factors"] = built["run_dir"] if stage["name"] != "pretrain" else None
    description["score"] = [
        {"stage": "prefer", "index": built["run_dir"]},
        {"stage": "prefer", "name": "some", "candidates": {"method": "bm25", "top": 1}},
    ]
    run(parse_run(description))
    stages = dense_preferring(folder)
    expected = reference_objectives.scores(stages, runs.QUERIES, PAIRED, 2)
    assert runs.largest_error(runs.read_scores(description["run_dir"], "prefer"), expected) < 1e-6
    some = runs.read_scores(description["run_dir"], "some")
    assert 0 < len(some) <= 3 and runs.largest_error(some, {pair: expected[pair] for pair in some}) < 1e-6
    read = {path.parent.name: read_json(path) for path in (folder / "asked" / "references").rglob("*.json")}
    assert set(read) == {"score.0", "score.1"}
    of_candidates = [read_json(path) for path in (folder / "asked" / "references" / "score.1").glob("*.json")]
    assert {name for block in of_candidates for name in block[LOG_RATIOS]} == {document for _, document in some}


@pytest.mark.parametrize(("make", "dense", "queries"), KINDS)
def test_conjugate_gradients_solve_the_stage(folder: Path, make: Make, dense: Any, queries: Any) -> None:
    """Scores of its own documents are by a linear solve over all maps together."""
    description = make(folder, f"solved-{make.__name__}")
    *_, stage = dense(folder)
    stage.damping = STRENGTH
    description["stages"][-1] |= {
        "damping": {"relative": STRENGTH},
        "solver": {"kind": "cg", "iterations": 40, "tolerance": 1e-5},
    }
    description["score"] = [{"stage": stage.name}]
    run(parse_run(description), until="score")
    names = reference.tracked_names(stage.model)
    gradients = [reference_objectives.query_gradient(stage, names, query) for query in queries]
    fit = reference_objectives.fit(stage, names)
    diagonal = reference_solve.strengths(stage, fit, scored=True)
    right = reference_objectives.flat(gradients)
    operator = reference_objectives.gauss_newton(stage, names) + diagonal.diag()
    answers = operator.double().inverse() @ right.T
    found = {pair: score for pair, (score, _, _) in runs.read_scores(description["run_dir"], stage.name).items()}
    own = reference_objectives.flat(
        [reference_objectives.document_gradients(stage, names, d)[0] for d in stage.documents]
    )
    wanted = own @ answers
    largest = float(wanted.abs().max())
    assert len(found) == len(stage.documents) * len(queries) and stage.documents in (LABELLED, PAIRED)
    for row, document in enumerate(stage.documents):
        for column, query in enumerate(queries):
            assert abs(found[query["id"], document["id"]] - float(wanted[row, column])) < 1e-4 * largest
