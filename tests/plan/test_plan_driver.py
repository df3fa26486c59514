"""What the plan says that the driver takes beside its libraries: what it holds of many blocks, pairs and candidates."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster import runs

from msif_ray.cluster.score_jobs import WindowShares
from msif_ray.cluster.top import join_windows
from msif_ray.config import parse_run
from msif_ray.plan import driver
from msif_ray.plan.estimate import Estimate
from msif_ray.plan.inputs import Inputs, PartBytes
from msif_ray.plan.tokens import Tally
from msif_ray.preflight import check


def planned(folder: Path, documents: int, tokens: int, **changes: Any) -> float:
    """Bytes for a corpus of so many documents of so many tokens each, in blocks of 256."""
    description = runs.two_stages(folder, "run") | changes
    description["cluster"]["documents_per_block"] = 256
    resolved = check(parse_run(description))
    resolved.rows["score.0"] = (documents,)
    tally = Tally(documents, 0, documents * tokens, documents * (tokens - 1), {tokens: documents})
    return driver.growth(Estimate(Inputs(resolved, {"score.0": tally}, {}, {}, PartBytes(0, 0, 0))))


def test_it_grows_with_blocks_top_documents_and_words(tmp_path: Path) -> None:
    score: dict[str, Any] = {"stage": "pretrain"}
    few, many = (planned(tmp_path, documents, 10, score=[score]) for documents in (256 * 10_000, 256 * 100_000))
    assert many - few == driver.BLOCK_BYTES * 90_000
    deep, deeper = (planned(tmp_path, 100_000, 10, score=[score], top=top) for top in (5_000, 10_000))
    assert deeper == pytest.approx(2 * deep)
    found = planned(tmp_path, 1_000_000, 100, score=[score | {"candidates": {"method": "bm25", "top": 10}}])
    assert found == driver.WORD_BYTES * 100_000_000


@pytest.mark.parametrize(("tokens", "maps"), [(10, 10), (300, 200)])
def test_a_pair_s_shares_take_what_is_counted(tokens: int, maps: int) -> None:
    kept, count, random = {}, 4000, np.random.default_rng(0)

    def gather() -> None:
        for number in range(count):
            window = WindowShares(f"d{number}", 0, 0, random.random(tokens), random.random(maps))
            kept.update(join_windows([window], {window.document_id: tokens}))

    tracemalloc.start()  # the process's own peak also depends on what earlier tests have freed
    gather()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held == pytest.approx(count * (driver.PAIR_BYTES + 4 * (tokens + maps)), rel=0.25)
