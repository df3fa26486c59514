"""What fact tracing leaves: `results.json`, a Parquet per table, all tables as Markdown, and a figure."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

matplotlib.use("Agg")
from matplotlib import pyplot

from msif_ray.store import replacing, write_atomic, write_json
from msif_ray.validate.fact_markdown import markdown, named
from msif_ray.validate.fact_tables import PLAIN, Row, examples, leanings, quality_rows, rankings, spreads
from msif_ray.validate.fact_tracing import BM25, FactTracing
from msif_ray.validate.tracing import INVERSE, PROXIMAL

TABLES = ("quality", "queries", "leanings", "spreads")


def results(experiment: FactTracing) -> dict[str, Any]:
    """All tables of the experiment, which is run where it was.

    Raises UserError where its folder holds parts of another setting.
    """
    experiment.check()
    traced, setting = experiment.traced(), experiment.setting
    found = rankings(traced, experiment.others(), experiment.tokens)
    quality, by_query = quality_rows(found, setting, experiment.seed)
    by_name = {(each.method, each.damping, each.normalised): each for each in found}
    chosen = by_name[PROXIMAL, experiment.dampings[0], INVERSE]
    return {
        "setting": experiment.about(),
        "quality": quality,
        "queries": by_query,
        "leanings": leanings(found, traced, experiment.tokens),
        "spreads": spreads(traced, experiment.tokens, setting.states),
        "examples": examples(chosen, by_name[BM25, None, PLAIN], setting),
    }


def write_facts(folder: Path, found: dict[str, Any]) -> None:
    """`results.json` (without what is by query), a Parquet per table, `tables.md` and `facts.png` under the folder."""
    write_json(folder / "results.json", {name: value for name, value in found.items() if name != "queries"})
    for table in TABLES:
        with replacing(folder / f"{table}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(found[table]), temporary)
    write_atomic(folder / "tables.md", markdown(found).encode())
    with replacing(folder / "facts.png") as temporary:
        draw_facts(found["quality"], temporary)


def draw_facts(rows: list[Row], path: Path) -> None:
    """MRR of every method: a bar for each normalisation, a panel for each group of documents."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    names = list(dict.fromkeys(named(row) for row in rows))
    normalised = list(dict.fromkeys(row["normalised"] for row in rows))
    height = 0.8 / len(normalised)
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(4 + 3 * len(groups), 1 + 0.75 * len(names)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, group in zip(axes[0], groups, strict=True):
        for place, kind in enumerate(normalised):
            own = [row for row in rows if row["group"] == group and row["normalised"] == kind]
            at = np.array([names.index(named(row)) for row in own]) + (place - (len(normalised) - 1) / 2) * height
            means = np.array([row["mrr"] for row in own])
            low, high = np.array([row["mrr_interval"] for row in own]).T
            sides = np.maximum([means - low, high - means], 0)
            axis.barh(at, means, height, xerr=sides, label=kind, ecolor="#333333", error_kw={"linewidth": 0.6})
        axis.set_title("documents: " + group, fontsize=9)
        axis.set_xlabel("MRR")
        axis.set_xlim(0, 1)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, format="png", dpi=100)
    pyplot.close(figure)
