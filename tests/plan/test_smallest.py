"""A plan can be made with the smallest value of every key that has one."""

from pathlib import Path
from typing import Any

import pytest
from cluster import runs
from cluster.objective_runs import preferring
from descriptions import changed

from msif_ray.config import Run, parse_run
from msif_ray.plan.make import make_plan

TINY = 1e-300
# By model and field, as the schema has them: where the key is in the description below, and its smallest value.
SMALLEST: dict[str, tuple[str, Any]] = {
    "Run.top": ("top", 1),
    "Fit.documents": ("stages.0.fit.documents", 1),
    "Fit.max_tokens": ("stages.0.fit.max_tokens", 2),
    "Strength.absolute": ("stages.0.damping", {"absolute": TINY}),
    "Strength.relative": ("stages.0.damping", {"relative": TINY}),
    "UnrolledResponse.rate": ("stages.1.response", {"kind": "unrolled", "rate": TINY, "steps": 10}),
    "UnrolledResponse.steps": ("stages.1.response", {"kind": "unrolled", "rate": 0.1, "steps": 1}),
    "CgSolver.iterations": ("stages.0.solver.iterations", 1),
    "CgSolver.documents": ("stages.0.solver.documents", 1),
    "CgSolver.tolerance": ("stages.0.solver.tolerance", TINY),
    "Queries.rank": ("queries.rank", 1),
    "Queries.energy": ("queries.energy", TINY),
    "Index.max_tokens": ("index.0.max_tokens", 2),
    "Index.rank": ("index.0.rank", 1),
    "Score.max_tokens": ("score.0.max_tokens", 2),
    "Score.out_of": ("score.0.out_of", len(runs.BASE)),  # the fewest that are not refused
    "Candidates.top": ("score.0.candidates.top", 1),
    "Replicas.min": ("cluster.replicas", {"min": 1, "max": 2}),
    "Replicas.max": ("cluster.replicas", {"min": 1, "max": 1}),
    "Cluster.ranks_per_replica": ("cluster.ranks_per_replica", 1),
    "Cluster.gpus_per_rank": ("cluster.gpus_per_rank", 0),
    "Cluster.cpus_per_rank": ("cluster.cpus_per_rank", 1),
    "Cluster.tokens_per_batch": ("cluster.tokens_per_batch", 1),
    "Cluster.documents_per_block": ("cluster.documents_per_block", 1),
    # Sizes, whose bounds are not in the schema.
    "Cluster.factor_memory": ("cluster.factor_memory", 1),
    "Cluster.directions_memory": ("cluster.directions_memory", 1),
    "Cluster.activations_memory": ("cluster.activations_memory", 0),
}
OTHER_RUNS = {"Packed.eos", "Preference.beta"}


def described(folder: Path) -> dict[str, Any]:
    """A run in which every key of SMALLEST has its place."""
    description = runs.two_stages(folder, "run")
    description["stages"][0]["solver"] = {"kind": "cg"}
    score = [{"stage": "pretrain", "candidates": {"method": "bm25"}}, {"stage": "tune"}]
    return description | {"index": [{"stage": "pretrain"}], "score": score}


def test_every_bounded_key_is_tried() -> None:
    schema = Run.model_json_schema()
    bounded = {
        f"{model}.{field}"
        for model, about in (schema["$defs"] | {"Run": schema}).items()
        for field, each in about.get("properties", {}).items()
        if any({"minimum", "exclusiveMinimum"} & kind.keys() for kind in [each, *each.get("anyOf", [])])
    }
    assert bounded <= SMALLEST.keys() | OTHER_RUNS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_value_is_planned(folder: Path, name: str) -> None:
    description = described(folder)
    changed(description, *SMALLEST[name])
    assert all(each.bytes > 0 for each in make_plan(parse_run(description), measured=False).stored)


def test_the_smallest_values_of_other_documents_are_planned(tmp_path: Path) -> None:
    preferences = preferring(tmp_path, "preferring")
    changed(preferences, "stages.2.objective", {"kind": "dpo", "beta": TINY})
    packed = runs.two_stages(tmp_path, "packed")
    rows = [{"ids": [3, 4, 5, 0, 6, 7, 0]}]
    documents = {"path": runs.write_lines(tmp_path / "rows.jsonl", rows)}
    packed["stages"][0]["documents"] = documents | {"packed": {"ids": "ids", "attention": "row", "eos": 0}}
    for description in (preferences, packed):
        assert make_plan(parse_run(description), measured=False).steps


@pytest.mark.long
def test_all_of_them_at_once_are_measured(folder: Path) -> None:
    description = described(folder)
    for name, (key, value) in SMALLEST.items():
        if name not in ("Queries.energy", "Replicas.min"):  # which exclude another
            changed(description, key, value)
    assert all(step.hours is not None and step.hours > 0 for step in make_plan(parse_run(description)).steps)
