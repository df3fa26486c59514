"""The examples' runs, on tiny models and inputs (see test_examples.py), on a real local Ray."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cluster import runs
from test_examples import described

from msif_ray.config import parse_run
from msif_ray.run import run

LONG = pytest.mark.long


@pytest.mark.timeout(600)
@pytest.mark.parametrize("example", ["dolly", pytest.param("bloomz", marks=LONG), pytest.param("olmo2", marks=LONG)])
def test_its_run_ends_with_scores(
    example: str, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = described(example, tmp_path, monkeypatch)
    run(parse_run(description))
    for entry in description["score"]:
        scores = runs.read_scores(description["run_dir"], entry.get("name", entry["stage"]))
        queries = {query for query, _ in scores}
        assert len(queries) == {"dolly": 2, "bloomz": 3, "olmo2": 1}[example]
        assert all(np.isfinite(score) and norm > 0 for score, norm, _ in scores.values())
        if example == "dolly":
            assert len(scores) == 2 * 4  # the candidates
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "stages.parquet").exists() == (example == "olmo2")
    if example == "olmo2":
        rows = pq.read_table(tmp_path / "run" / "stages.parquet").to_pylist()
        assert [row["stage"] for row in rows] == ["stage1", "stage2", "sft", "dpo"]
        assert all(0 < row["share"] < 1 for row in rows) and sum(row["share"] for row in rows) == pytest.approx(1)
