"""Four stages in one run on a real local Ray cluster: continued pre-training, added chat tokens, and an adapter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pyarrow.parquet as pq
import pytest
import reference
from adapters import adapted
from cluster import runs
from four_stages import NAMES, four_stages
from peft import PeftModel

from msif_ray.config import parse_run
from msif_ray.run import run
from msif_ray.store import read_json

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.long, pytest.mark.timeout(600)]
Scores = dict[runs.Pair, tuple[float, float, int]]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[reference.StageSpec]:
    """The last stage is an adapter of the one before, and here its merged model."""
    found = four_stages()
    tuned: PeftModel = adapted(found[2].model, "", lora_alpha=0.3, target_modules=["query_key_value", "dense_h_to_4h"])
    tuned.save_pretrained(folder_of(tmp_path_factory) / "stage3")
    found[3].tokenizer.save_pretrained(folder_of(tmp_path_factory) / "stage3")
    merged = tuned.merge_and_unload().requires_grad_(True)
    return [*found[:3], replace(found[3], model=merged, max_tokens=16)]


def folder_of(factory: pytest.TempPathFactory) -> Path:
    return factory.getbasetemp() / "four"


@pytest.fixture(scope="module")
def run_dir(stages: list[reference.StageSpec], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = folder_of(tmp_path_factory)
    described: list[dict[str, Any]] = []
    for index, stage in enumerate(stages):
        if index < 3:
            models.save(stage.model, stage.tokenizer, folder / f"stage{index}")
        columns = {"text": "text"} if index < 2 else {"prompt": "prompt", "completion": "completion"}
        path = runs.write_lines(folder / f"{stage.name}.jsonl", list(stage.documents))
        described.append(
            {
                "name": stage.name,
                "model": str(folder / f"stage{index}"),
                "documents": {"path": path, "id": "id", **columns},
                "fit": {"max_tokens": stage.max_tokens},
                "damping": {"relative": stage.damping},
            }
            | ({"response": {"kind": "proximal", "alpha": {"relative": stage.strength}}} if index else {})
        )
    described[3]["base"] = stages[2].name
    description = {
        "run_dir": str(folder / "run"),
        "seed": stages[0].seed,
        "stages": described,
        "queries": {"path": runs.write_lines(folder / "queries.jsonl", runs.QUERIES), "id": "id"},
        "score": [{"stage": stage.name} for stage in stages],
        "top": 2,
        "cluster": {"dtype": "float64", "gpus_per_rank": 0, "tokens_per_batch": 90, "documents_per_block": 16},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSIF_CACHE", str(folder / "cache"))
        run(parse_run(description))
    return str(folder / "run")


@pytest.fixture(scope="module")
def expected(stages: list[reference.StageSpec]) -> dict[str, Scores]:
    names = reference.tracked_names(stages[-1].model)
    fits = [reference.fit(stage, names) for stage in stages]
    return {
        stage.name: reference.scores(stages, runs.QUERIES, stage.documents, index, names, fits)[0]
        for index, stage in enumerate(stages)
    }


@pytest.mark.parametrize("stage", NAMES)
def test_every_stages_documents_are_scored_as_by_the_dense_reference(
    run_dir: str, expected: dict[str, Scores], stage: str
) -> None:
    assert runs.largest_error(runs.read_scores(run_dir, stage), expected[stage]) < 1e-6


def test_the_shares_by_stage_are_those_of_the_dense_scores(run_dir: str, expected: dict[str, Scores]) -> None:
    found = {(row["stage"], row["query_id"]): row for row in pq.read_table(f"{run_dir}/stages.parquet").to_pylist()}
    for query in (row["id"] for row in runs.QUERIES):
        own = {
            stage: np.array([s[0] for (q, _), s in pairs.items() if q == query]) for stage, pairs in expected.items()
        }
        supports = {stage: scores[scores > 0].sum() / len(scores) for stage, scores in own.items()}
        for stage in NAMES:
            row = found[stage, query]
            assert row["supports"] == pytest.approx(supports[stage], rel=1e-5)
            assert row["share"] == pytest.approx(supports[stage] / sum(supports.values()), rel=1e-5)
    page = (Path(run_dir) / "report.html").read_text(encoding="utf-8")
    assert "Which stage it comes from" in page


def test_run_json_says_that_a_stage_is_an_adapter(run_dir: str) -> None:
    record = read_json(Path(run_dir) / "run.json")
    assert record["identity"]["models"]["other"]["adapter"]["base"] == "chat"
    assert "matrices that were trained" in record["meaning"]["adapter"]
