"""The plan's bytes of Parquet against parts that are written as the run writes them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from cluster import runs

from msif_ray.config import parse_run
from msif_ray.plan.make import make_plan
from msif_ray.preflight import check
from msif_ray.record import MEANING
from msif_ray.results.parts import Details, write_part

USABLE = [row for row in runs.BASE if row["text"] and row["id"] != "short"]


def written(folder: Path, maps: tuple[str, ...], wanted: Mapping[str, bool], block: int) -> int:
    """Bytes of the parts of all usable documents, in blocks of so many."""
    random, size = np.random.default_rng(1), 0
    queries = [str(query["id"]) for query in runs.QUERIES]
    for start in range(0, len(USABLE), block):
        some = USABLE[start : start + block]
        tokens = [len(row["text"].split()) + 1 for row in some]
        rows = (len(some), len(queries))
        details = Details(
            maps,
            random.standard_normal((*rows, len(maps))) if wanted.get("modules") else None,
            [random.standard_normal((len(queries), n)) for n in tokens] if wanted.get("tokens") else None,
            wanted.get("normalised", False),
            random.random(len(some)) if wanted.get("curvature_norm") else None,
        )
        path, ids = folder / f"{start}.parquet", [str(row["id"]) for row in some]
        scores, norms = random.standard_normal(rows), random.random(len(some))
        write_part(path, queries, ids, scores, norms, tokens, [], MEANING, details)
        size += path.stat().st_size
    return size


@pytest.mark.parametrize(
    "detail",
    [
        {"tokens": True},
        {"modules": True},
        {"normalised": True},
        {"curvature_norm": True},
        {"tokens": True, "modules": True, "normalised": True, "curvature_norm": True},
    ],
)
def test_small_parts_with_details(tmp_path: Path, detail: dict[str, bool]) -> None:
    """Blocks of four documents, whose footers are most of what they take."""
    description = runs.two_stages(tmp_path, "run") | {"detail": detail, "score": [{"stage": "pretrain"}]}
    run = parse_run(description)
    plan, maps = make_plan(run, measured=False), tuple(check(run).maps)
    planned = next(each.bytes for each in plan.stored if each.name == "scores of pretrain (Parquet)")
    assert planned == pytest.approx(written(tmp_path, maps, detail, block=4), rel=0.15)
