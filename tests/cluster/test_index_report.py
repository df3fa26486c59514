"""jobs/index_report.py on finished runs: what it calls exact is what the run wrote."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cluster import runs

from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.run import run

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.long]
JOB = Path(__file__).parents[2] / "jobs" / "index_report.py"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return runpy.run_path(str(JOB))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run, whose descriptions are told apart by the entry that comes first. Of float64: directions are of
    the run's type, and so is what an index gives them."""
    description = runs.two_stages(tmp_path_factory.mktemp("runs"), "run", "float64")
    run(parse_run(description))
    return description


def written(description: dict[str, Any], first: str, folder: Path) -> str:
    """A file with the description, in which this stage's scores are the first entry."""
    entries = sorted(description["score"], key=lambda entry: str(entry["stage"]) != first)
    path = folder / f"{first}.yaml"
    path.write_text(yaml.safe_dump(description | {"score": entries}))
    return str(path)


@pytest.mark.parametrize("stage", ["pretrain", "tune"])
def test_exact_scores_are_the_run_s(job: dict[str, Any], finished: dict[str, Any], stage: str, tmp_path: Path) -> None:
    """Of a stage of texts, and of one of prompts and completions."""
    case = job["load_case"](written(finished, stage, tmp_path), 1024, 1)
    exact, tokens = job["exact_scores"](case, job["Clock"]())
    found = runs.read_scores(finished["run_dir"], stage)
    documents = sorted({document for _, document in found})
    queries = [str(row["id"]) for row in runs.QUERIES]
    wanted = np.array([[found[query, document][0] for query in queries] for document in documents])
    assert np.abs(exact - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert tokens == sum(found[queries[0], document][2] for document in documents)


def test_texts_are_joined_and_nothing_else_is(job: dict[str, Any], finished: dict[str, Any], tmp_path: Path) -> None:
    alone, joined = (job["load_case"](written(finished, "pretrain", tmp_path), 3, join) for join in (1, 2))
    texts = [[each.text for block in case.blocks for each in block.documents] for case in (alone, joined)]
    assert len(texts[0]) == len(texts[1]) == 3 and texts[1][0] == "\n".join(texts[0][:2])
    with pytest.raises(UserError, match=r"^--join: only a corpus of plain texts"):
        job["load_case"](written(finished, "tune", tmp_path), 3, 2)


def test_it_prints_a_table_of_a_small_corpus(
    job: dict[str, Any], finished: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job["main"](written(finished, "tune", tmp_path), 1024, 1, "8:float32")
    cells = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:2] == ["8", "float32"] and float(cells[2]) > 0.99


def test_a_run_that_is_not_finished_is_named(job: dict[str, Any], finished: dict[str, Any], tmp_path: Path) -> None:
    other = finished | {"run_dir": str(tmp_path / "new")}
    with pytest.raises(UserError, match=r"has no queries carried back to pretrain; finish the run$"):
        job["load_case"](written(other, "pretrain", tmp_path), 4, 1)


def test_one_document_has_no_rank_correlation(job: dict[str, Any], finished: dict[str, Any], tmp_path: Path) -> None:
    case = job["load_case"](written(finished, "pretrain", tmp_path), 1, 1)
    with pytest.raises(UserError, match=r"^--documents: 1 of them has a score, and a rank correlation takes two"):
        job["exact_scores"](case, job["Clock"]())
